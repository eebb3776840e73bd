"""One night of TRL's: the script that an expert would run from cron around DPOTrainer.

… nights_trl prepare QUESTIONS --out DIR           writes token ids beside the questions
… nights_trl night QUESTIONS --script replay|all --night N --adapters DIR --out DIR
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from agentpref.config import UpdateConfig
from agentpref.models.template import ChatTemplate
from benchmarks.train import jobs, trl_arm

_BATCH = UpdateConfig().batch_size
_RATE = 2e-3  # what our trainer takes for the bundled model


def prepare(questions: Path) -> None:
    """Encode all questions as our trainer does, and write the ids beside them."""
    from transformers import AutoTokenizer

    from agentpref.learn.encode import encode
    from agentpref.models.base import BUNDLED, find_base
    from agentpref.types import Completion, Example, Prompt

    tokenizer = AutoTokenizer.from_pretrained(find_base(BUNDLED))
    nights: list[dict[str, list[Any]]] = []
    for asked in json.loads(questions.read_text(encoding="utf-8")):
        pairs = [
            Example(
                str(number),
                "bench",
                0.0,
                Prompt(str(number), ({"role": "user", "content": q["text"]},)),
                (
                    Completion({"role": "assistant", "content": q["liked"]}, 1.0),
                    Completion({"role": "assistant", "content": q["disliked"]}, 0.0),
                ),
                "comparison",
                held_out=q["proves"],
            )
            for number, q in enumerate(asked)
        ]
        rows = encode(pairs, ChatTemplate(tokenizer), max_length=1024).rows
        night: dict[str, list[Any]] = {"train": [], "prove": []}
        for row in rows:
            side = "prove" if row.example.held_out else "train"
            night[side].append([row.prompt, *row.completions])
        nights.append(night)
    _ids(questions).write_text(json.dumps(nights), encoding="utf-8")


def _ids(questions: Path) -> Path:
    return questions.with_suffix(".ids.json")


def rows_of(questions: Path, script: str, night: int) -> tuple[list[jobs.Ids], list[jobs.Ids]]:
    """What is trained on in a night, in order, and what is then evaluated on."""
    nights = json.loads(_ids(questions).read_text(encoding="utf-8"))[: night + 1]
    rng = random.Random(night)
    new = nights[-1]["train"]
    old = [row for earlier in nights[:-1] for row in earlier["train"]]
    if script == "replay":
        old = rng.sample(old, min(len(old), len(new)))
    train = [*new, *old]
    rng.shuffle(train)
    prove = [row for one in nights for row in one["prove"]]
    return [jobs.Ids(*row) for row in train], [jobs.Ids(*row) for row in prove]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train from the adapter of the night before, evaluate, and save the new one."""
    from agentpref.models.base import BUNDLED, find_base

    train, prove = rows_of(options.questions, options.script, options.night)
    whole = -(-len(train) // _BATCH) * _BATCH
    job = jobs.Job("tiny", str(find_base(BUNDLED)), "nights", whole, _BATCH, _RATE, ())
    last = options.adapters / str(options.night - 1) / "adapter_model.safetensors"
    setting = trl_arm.tuned(job, options.dtype, options.micro)
    with tempfile.TemporaryDirectory() as scratch:
        init = last if options.night else None
        trainer = trl_arm.trainer_for(job, train, init, setting, Path(scratch), prove=prove)
        trainer.train()
        found = trainer.evaluate()
        trainer.model.save_pretrained(options.adapters / str(options.night))
    return {"accuracy": found["eval_rewards/accuracies"], "rows": len(train), "proved": len(prove)}


def main() -> None:
    """Prepare, or run one night."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("prepare", "night"))
    parser.add_argument("questions", type=Path)
    parser.add_argument("--script", choices=("replay", "all"), default="replay")
    parser.add_argument("--night", type=int, default=0)
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--dtype", choices=trl_arm.DTYPES, default="float32")
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    trl_arm.quiet()
    if options.what == "prepare":
        prepare(options.questions)
    else:
        (options.out / "result.json").write_text(json.dumps(run(options)), "utf-8")


if __name__ == "__main__":
    main()
