"""Which learning rate and how many epochs suit a real model: ``python -m benchmarks.real_sweep``.

SmolLM2-135M-Instruct (``benchmarks.real_model`` fetches it) learns from comparisons of its own
answers, of which the shorter is preferred: the data and the rule of the demo. Every point of the
grid trains once per seed, from the base, with all other settings at their defaults. A seed chooses
the order of the pairs and the adapter's first weights. It resumes where it was stopped:

    python -m benchmarks.real_sweep --rates 5e-5,1e-4,2e-4 --epochs 2 --seeds 0,1
    python -m benchmarks.real_sweep --resume --rates 1e-4 --epochs 1,3 --seeds 0,1

Reported of each point are accuracy on the held-out pairs, the mean words of greedy answers to the
held-out questions (of at most 160 tokens) and their ratio to the base's, the share that is shorter
than the base's (half where equal), how many were empty or cut off, KL(π_0 ‖ π_θ) in nats a token,
and processor seconds of training (of all threads). There is no gate. The last line is one JSON
object; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agentpref.config import UpdateConfig
from agentpref.learn.learner import Learner
from agentpref.models.base import load_base
from agentpref.models.continuation import greedy
from agentpref.models.tokenizer import encode_prompt
from agentpref.prefer.examples import is_held_out
from agentpref.prove.evaluate import kl_from_base, policy_scores
from agentpref.prove.metrics import accuracy
from agentpref.types import Completion, Example, Prompt
from agentpref_cli.demo.real_model import fetch
from agentpref_cli.demo.real_people import SHORTER, Answer, questions
from agentpref_cli.demo.real_story import MAX_TOKENS
from benchmarks._report import print_report
from benchmarks.train.runs import Ledger, Run, say

HELD_OUT = 0.3
"""More than the default, for there are 160 questions only."""

METRICS = ("accuracy", "words", "ratio", "shorter", "empty", "cut_off", "kl", "seconds")


class Point(NamedTuple):
    """One setting of the grid."""

    learning_rate: float
    epochs: int

    def config(self, seed: int) -> UpdateConfig:
        """The settings of an update; all others stay at their defaults."""
        return UpdateConfig(
            seed=seed,
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            held_out=HELD_OUT,
            precision="auto",
        )

    def __str__(self) -> str:
        return f"{self.learning_rate:g}/{self.epochs} epochs"


def main() -> None:
    """Measure the grid that was asked for, and end with the JSON object."""
    options = _options()
    model = options.model or str(fetch(say=say))
    ledger = Ledger(options.work / "real.jsonl", resume=options.resume)
    base = ledger.once("base", lambda: _timed(lambda: answers_of_base(model))).result["answers"]
    found: dict[Point, list[dict[str, Any]]] = {}
    for seed, rate, epochs in itertools.product(options.seeds, options.rates, options.epochs):
        point = Point(rate, epochs)

        def learn(point: Point = point, seed: int = seed) -> Run:
            return _timed(lambda: measure(model, point.config(seed), base))

        result = ledger.once(f"{point}/seed {seed}", learn).result
        say(f"{point}/seed {seed}: " + ", ".join(f"{name} {result[name]:.3f}" for name in METRICS))
        found.setdefault(point, []).append(result)
    print_table(found)
    points = [
        {**point._asdict(), "seeds": results, **_means(results)} for point, results in found.items()
    ]
    print_report("real_sweep", {"points": points}, [])


def measure(model: str, config: UpdateConfig, base: Sequence[str]) -> dict[str, Any]:
    """Train at one point, and say what became of ranking and of answers."""
    learner = Learner(load_base(model, precision=config.precision), None, config)
    pairs = comparisons()
    rows = learner.encode([pair for pair in pairs if not pair.held_out])
    held_out = learner.encode([pair for pair in pairs if pair.held_out])
    learner.score("base", rows)  # which is no part of training
    started = time.process_time()
    report = learner.fit(rows, new=len(rows))
    seconds = time.process_time() - started
    kl = kl_from_base(learner, held_out, seed=config.seed)
    right = accuracy(policy_scores(learner, "candidate", held_out))
    answers = write(learner)
    return {
        "steps": report.steps,
        "pairs": len(rows),
        "held_out": len(held_out),
        "accuracy": right,
        **lengths(answers, base),
        "kl": kl,
        "seconds": seconds,
    }


def answers_of_base(model: str) -> dict[str, Any]:
    """What the base writes to the held-out questions."""
    config = UpdateConfig(precision="auto")
    learner = Learner(load_base(model, precision=config.precision), None, config)
    return {"answers": [answer.text for answer in write(learner)]}


def lengths(answers: Sequence[Answer], base: Sequence[str]) -> dict[str, float]:
    """How long answers are, in words, beside the base's."""
    words, before = [a.words for a in answers], [Answer(text).words for text in base]
    shorter = [(new < old) + (new == old) / 2 for new, old in zip(words, before, strict=True)]
    return {
        "words": statistics.fmean(words),
        "ratio": statistics.fmean(words) / statistics.fmean(before),
        "shorter": statistics.fmean(shorter),
        "empty": sum(not answer.text.strip() for answer in answers),
        "cut_off": sum(not answer.whole for answer in answers),
    }


def write(learner: Learner) -> list[Answer]:
    """The candidate's greedy answers to the held-out questions; a new candidate is the base."""
    asked = [one for one in questions(SHORTER.tag) if one.is_held_out(HELD_OUT)]
    prompts = [encode_prompt(Prompt("", one.messages), learner.base.template) for one in asked]
    with learner.policy("candidate") as model:
        tokens, _ = greedy(model, prompts, learner.decoding, limit=MAX_TOKENS)
    ends = learner.decoding.end_tokens
    return [Answer(learner.decoding.text(ids), ids[-1] in ends) for ids in tokens]


def comparisons() -> list[Example]:
    """The demo's comparisons, in which the shorter answer is preferred."""
    return [
        Example(
            example_id=f"shorter/{number}",
            namespace="sweep",
            created_at=0.0,
            prompt=Prompt(f"shorter/{number}", tuple(row["prompt"])),
            completions=(
                Completion(row["chosen"][0], 1.0),
                Completion(row["rejected"][0], 0.0),
            ),
            origin="comparison",
            tag=SHORTER.tag,
            held_out=is_held_out(row["prompt"], HELD_OUT),
        )
        for number, row in enumerate(SHORTER.comparisons())
    ]


def print_table(found: Mapping[Point, Sequence[Mapping[str, Any]]]) -> None:
    """Means over the seeds, for people."""
    print(f"{'rate/epochs':18}" + "".join(f"{name:>10}" for name in METRICS))
    for point, results in found.items():
        means = _means(results)
        print(f"{point!s:18}" + "".join(f"{means[name]:10.3f}" for name in METRICS))


def _means(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: statistics.fmean(result[name] for result in results) for name in METRICS}


def _timed(work: Any) -> Run:
    started, cpu = time.perf_counter(), time.process_time()
    result = work()
    return Run(time.perf_counter() - started, time.process_time() - cpu, 0.0, result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def numbers(kind: type) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    parser.add_argument("--rates", type=numbers(float), default=[5e-5, 1e-4, 2e-4])
    parser.add_argument("--epochs", type=numbers(int), default=[2])
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1])
    parser.add_argument("--model", help="a folder or a hub's name [default: fetch SmolLM2]")
    parser.add_argument("--work", type=Path, default=Path(".bench-sweep"))
    parser.add_argument("--resume", action="store_true", help="keep what was measured before")
    return parser.parse_args()


if __name__ == "__main__":
    main()
