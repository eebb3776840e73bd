"""Sample the answers of the demo on a real model: ``python -m benchmarks.real_answers``.

SmolLM2-135M-Instruct answers the questions of ``data/everyday_questions.txt`` at temperature .9 and
top-p .9, twice each, through the in-process engine; and twice more with the hint that the file has
for some of them, as an app would try another prompt. Nobody chose among the answers: all of them
are written, in the order of the questions, and cut ones are marked. Rounding may choose another
word on another machine, and in other company: requests are answered together.

A line of the file is one question: ``{"tag", "question", "answers": [{"text", "whole"}, …]}``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

QUESTIONS = Path(__file__).parent / "data" / "everyday_questions.txt"
OUT = Path(__file__).parents[1] / "cli" / "agentpref_cli" / "demo" / "data" / "smollm2.jsonl.gz"
ANSWERS = 2
TEMPERATURE = 0.9
TOP_P = 0.9
MAX_TOKENS = 160
TOGETHER = 40


def questions() -> Iterator[tuple[str, str, str]]:
    """Each question with its tag and its hint, which may be empty, in the order of the file."""
    tag = hint = ""
    for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
        if line.startswith("# tag: "):
            tag, hint = line.removeprefix("# tag: "), ""
        elif line.startswith("# hint: "):
            hint = line.removeprefix("# hint: ")
        elif line:
            yield tag, line, hint


def sample(model: str) -> Iterator[dict[str, Any]]:
    """Ask the model every question, many at a time; yield the rows in order."""
    from agentpref.models.base import load_base
    from agentpref.serve.backend import GenerationRequest
    from agentpref.types import BASE
    from agentpref_adapters.transformers import TransformersBackend

    asked = list(questions())

    def answer(prompt: str, seed: int) -> dict[str, Any]:
        request = GenerationRequest(
            ({"role": "user", "content": prompt},),
            max_tokens=MAX_TOKENS,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            seed=seed,
        )
        reply = backend.generate(BASE, request)
        return {"text": reply.message["content"], "whole": reply.finish_reason == "stop"}

    with (
        closing(
            TransformersBackend(load_base(model, precision="auto"), max_batch=TOGETHER)
        ) as backend,
        ThreadPoolExecutor(TOGETHER) as threads,
    ):
        rows = [
            (
                {"tag": tag, "question": question},
                [
                    threads.submit(answer, prompt, ANSWERS * number + one)
                    for prompt in ([question, f"{question} {hint}"] if hint else [question])
                    for one in range(ANSWERS)
                ],
            )
            for number, (tag, question, hint) in enumerate(asked)
        ]
        for row, answers in rows:
            yield {**row, "answers": [each.result() for each in answers]}


def main() -> None:
    """Sample, and write the file; the same rows give the same bytes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_answers", description=__doc__)
    parser.add_argument(
        "--model", required=True, help="a folder of benchmarks.real_model, or a name"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    lines = []
    for row in sample(options.model):
        lines.append(json.dumps(row, ensure_ascii=False))
        print(lines[-1], flush=True)
    options.out.write_bytes(
        gzip.compress("".join(f"{line}\n" for line in lines).encode(), 9, mtime=0)
    )
    print(
        f"{options.out}: {len(lines)} questions, {options.out.stat().st_size:,} bytes",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
