"""Write the data that the demo ships: ``python -m benchmarks.demo_data``.

Two persona traits and a third for the planted bad update, as they stand in ``benchmarks/data``; and
requests of the bundled model's own grammar, each with the short answer that the night's users like
and a longer one, or a tool call, that they do not.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from agentpref.prefer.examples import is_held_out
from benchmarks import persona
from benchmarks.tiny_model import corpus, dialogues

TRAITS = ("conscientiousness", "risk-seeking", "interest-in-music")
OUT = Path(__file__).parents[1] / "cli" / "agentpref_cli" / "demo" / "data"
HELD_OUT, TRAIN = 180, 300


def main() -> None:
    """Write all files."""
    OUT.mkdir(parents=True, exist_ok=True)
    for trait in TRAITS:
        shutil.copy(persona.FOLDER / f"{trait}.jsonl", OUT)
    lines = [json.dumps(row) + "\n" for row in style_rows(random.Random(0))]
    (OUT / "style.jsonl").write_text("".join(lines), encoding="utf-8")


def style_rows(rng: random.Random) -> list[dict[str, str]]:
    """Distinct requests, :data:`HELD_OUT` of them on the side that proves."""
    wanted = {True: HELD_OUT, False: TRAIN}
    rows: dict[str, dict[str, str]] = {}
    while any(wanted.values()):
        request = dialogues.draw_request(rng)
        side = is_held_out(corpus.ask(request.text), corpus.SHARE)
        if request.text in rows or not wanted[side]:
            continue
        wanted[side] -= 1
        longer = rng.choice([style for style in dialogues.STYLES if style != "plain"])
        rows[request.text] = {
            "text": request.text,
            "liked": dialogues.answer(request, "plain"),
            "disliked": dialogues.answer(request, longer),
        }
    return list(rows.values())


if __name__ == "__main__":
    main()
