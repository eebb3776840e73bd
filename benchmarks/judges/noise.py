"""Is it worth measuring how wrong a judge is, and asking it in both orders?

A judge of statements of a persona trait is wrong about a quarter of them. It is calibrated on a
file of people's comparisons, and compares what a home has, through the same functions as
``agentpref judge``. The bundled model is then trained on the pairs that the home makes of that, by
the shipped settings and without the gate, and measured on the true answers to further statements:

    measured    each pair counts with the judge's noise ε as calibrated
    fixed       each pair counts with ε = .05, as if a person had said it
    both        the judge also follows the position of the answers, in half of its questions, and
                is asked in both orders
    single      the same judge is asked in one order, and what it says is logged as it is
    exact       nobody is wrong: what could be learned from as many statements

``robust`` is ``measured`` with another loss (``loss.kind``), and is only shown. A seed is a trait,
statements and the order of training; its arms differ in nothing else. A judge that its calibration
does not trust trains nothing, and leaves the base as it is: right in half.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from agentpref import Log
from agentpref.config import LossSettings, UpdateConfig
from agentpref.home import Home
from agentpref.judging import calibrate_judge, judge_runs
from agentpref.prefer.walk import walk_pairs
from agentpref.record.database import connect
from agentpref.record.pages import Selection
from agentpref.testing import FakeJudge
from agentpref.types import BASE, Example, Message, Winner
from benchmarks._report import Target, at_least
from benchmarks.false_promotions import comparison
from benchmarks.streams.rows import Row, Rows, say

NOISE, POSITION, FIXED = 0.25, 0.5, 0.05
SIZES, GOLD, FRESH = (300, 600), 100, 300
"""Statements that the judge compares, that people compared, and that accuracy is measured on."""

SEEDS = 5
ARMS = ("measured", "fixed", "robust", "both", "single", "exact")

_PERSONA = Path(__file__).parents[1] / "data" / "persona"
_ANSWERS = ("Yes", "No")


def measure(out: Path, seeds: int = SEEDS, first: int = 0) -> dict[str, Any]:
    """Compute the seeds that have no row in ``out``, and sum up each size."""
    rows = Rows(out)
    trains: _Trains | None = None
    for judged in SIZES:
        for seed in range(first, first + seeds):
            key = {"seed": seed, "judged": judged, "noise": NOISE, "position": POSITION}
            if not rows.find(key):
                trains = trains or _Trains()
                row = {**key, **_seed(trains, seed, judged)}
                rows.append(row)
                say(f"noise, {judged}, seed {seed}: {row['accuracy']}, {row['seconds']:.0f} s")
    return {f"{judged} judged": summary(rows.find({"judged": judged})) for judged in SIZES}


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Means of the arms, and the differences that were promised, seed by seed."""
    rows = sorted(rows, key=lambda row: row["seed"])
    arms = [arm for arm in ARMS if all(arm in row["accuracy"] for row in rows)]
    found = {arm: [row["accuracy"][arm] for row in rows] for arm in arms}
    gains = {
        "measured - fixed": [m - f for m, f in zip(found["measured"], found["fixed"], strict=True)],
        "both - single": [b - s for b, s in zip(found["both"], found["single"], strict=True)],
    }
    return {
        "seeds": [row["seed"] for row in rows],
        "mean": {arm: sum(values) / len(values) for arm, values in found.items()},
        "accuracy": found,
        "epsilon": {
            judge: [row["epsilon"][judge] for row in rows] for judge in ("noisy", "biased")
        },
        "pairs": {
            arm: [row["pairs"][arm] for row in rows] for arm in ("measured", "both", "single")
        },
        "wrong": {
            arm: [row["wrong"][arm] for row in rows] for arm in ("measured", "both", "single")
        },
        "gains": gains,
        "mean_gains": {name: sum(values) / len(values) for name, values in gains.items()},
    }


def targets(found: dict[str, Any]) -> list[Target]:
    """What was promised of the noise."""
    promised = []
    for size, one in found.items():
        worst = min(one["gains"]["measured - fixed"])
        better, both = (one["mean_gains"][n] for n in ("measured - fixed", "both - single"))
        mean = f"noise, {size}: measured ε against .05, mean"
        promised += [
            at_least(f"noise, {size}: measured ε against .05, the worst seed", worst, 0),
            Target(mean, better, "> 0", better > 0),
            at_least(f"noise, {size}: both orders against one, mean", both, 0.05),
        ]
    return promised


def _seed(trains: _Trains, seed: int, size: int) -> dict[str, Any]:
    """One seed: a judge at work in a home, and a training for each arm."""
    started, rng = time.monotonic(), random.Random(f"noise {seed}")
    files = sorted(_PERSONA.glob("*.jsonl"))
    lines = files[seed % len(files)].read_text(encoding="utf-8").splitlines()
    drawn = rng.sample([json.loads(line) for line in lines], size + GOLD + FRESH)
    truth = {each["statement"]: each["answer"] for each in drawn}
    pairs = [comparison(statement, answer, flip=False) for statement, answer in truth.items()]
    judged, gold, fresh = pairs[:size], pairs[size : size + GOLD], pairs[size + GOLD :]
    with tempfile.TemporaryDirectory() as folder:
        examples, epsilon = _judged(Path(folder), judged, gold, _Truth(pairs), seed, rng)
    arms = _arms(examples, judged)
    right = {one.prompt.id: _better(one) for one in judged}
    return {
        "trait": files[seed % len(files)].stem,
        "epsilon": epsilon,
        "accuracy": {arm: trains.accuracy(*given, fresh, seed) for arm, given in arms.items()},
        "pairs": {arm: len(_trained(rows)) for arm, (rows, _) in arms.items()},
        "wrong": {arm: _wrong(_trained(rows), right) for arm, (rows, _) in arms.items()},
        "seconds": round(time.monotonic() - started, 1),
    }


def _arms(
    examples: Mapping[str, list[Example]], judged: Sequence[Example]
) -> dict[str, tuple[Sequence[Example], LossSettings]]:
    """What each arm trains on, and the loss that it sets."""
    return {
        "measured": (examples["noisy"], LossSettings()),
        "fixed": (examples["noisy"], LossSettings(noise=FIXED)),
        "robust": (examples["noisy"], LossSettings(kind="robust")),
        "both": (examples["biased"], LossSettings()),
        "single": (examples["single"], LossSettings()),
        "exact": (judged, LossSettings(noise=FIXED)),
    }


def _judged(
    folder: Path,
    judged: Sequence[Example],
    gold: Sequence[Example],
    truth: _Truth,
    seed: int,
    rng: random.Random,
) -> tuple[dict[str, list[Example]], dict[str, float | None]]:
    """The pairs that a home makes of what judges say, and the judges' measured noise."""
    file = folder / "gold.jsonl"
    file.write_text("".join(json.dumps(_row(one)) + "\n" for one in gold), encoding="utf-8")
    noisy = FakeJudge(truth, noise=NOISE, seed=seed, name="noisy")
    biased = FakeJudge(truth, noise=NOISE, position=POSITION, seed=seed, name="biased")
    examples: dict[str, list[Example]] = {}
    epsilon: dict[str, float | None] = {}
    home = folder / "home"
    orders = {one.prompt.id: rng.sample(_ANSWERS, 2) for one in judged}
    for namespace in ("noisy", "biased", "single"):
        with Log(home, namespace=namespace) as log:
            for one in judged:
                asked, answers = one.prompt.messages, [_said(t) for t in orders[one.prompt.id]]
                a, b = (log.record(asked, answer, tags=["persona"]) for answer in answers)
                if namespace == "single":
                    (verdict,) = biased.judge([asked], [(answers[0], answers[1])])
                    log.compare(a, b, winner=verdict.winner, user_id="unfiltered")
    for judge in (noisy, biased):
        calibrated = calibrate_judge(home, judge, namespace=judge.name, gold=file, tag="persona")
        epsilon[judge.name] = calibrated.trusted.get("persona")
        if calibrated.trusted:
            judge_runs(home, judge, namespace=judge.name, recheck=0)
    with closing(connect(Home.open(home))) as connection:
        for namespace in ("noisy", "biased", "single"):
            found = walk_pairs(connection, Selection(namespace), UpdateConfig().held_out)
            examples[namespace] = list(found)
    return examples, epsilon


class _Truth:
    """Which of two answers is the right one."""

    def __init__(self, pairs: Sequence[Example]) -> None:
        self._right = {_text(one.prompt.messages[-1]): _text(_better(one)) for one in pairs}

    def __call__(self, question: str, a: str, b: str) -> Winner:
        return "a" if self._right[question] == a else "b"


class _Trains:
    """One bundled model that is trained anew for each arm."""

    def __init__(self) -> None:
        from agentpref.learn.cache import LogpCache
        from agentpref.learn.learner import Learner
        from agentpref.models.base import load_base

        self._folder = tempfile.TemporaryDirectory()
        self._connection = connect(Home.create(Path(self._folder.name) / "home"))
        base = load_base("tiny")
        cache = LogpCache(self._connection, base.numbers, BASE)
        caches: Any = {"base": cache, "live": cache}
        self._learner = Learner(base, None, UpdateConfig(), caches=caches)

    def accuracy(
        self, examples: Sequence[Example], loss: LossSettings, fresh: Sequence[Example], seed: int
    ) -> float:
        """Train on what is not held out, and say in how many fresh statements it is right."""
        from agentpref.prove.evaluate import policy_scores
        from agentpref.prove.metrics import accuracy

        if not _trained(examples):  # the base ranks as a coin does, for it is its own reference
            return 0.5
        learner = self._learner
        learner.config = UpdateConfig(seed=seed, loss=loss)
        with learner.trial(learner.encode(_trained(examples))):
            return accuracy(policy_scores(learner, "candidate", learner.encode(fresh)))


def _trained(examples: Sequence[Example]) -> list[Example]:
    return [one for one in examples if not one.held_out]


def _wrong(examples: Sequence[Example], right: dict[str, Message]) -> float:
    """The share of pairs whose chosen answer is the wrong one."""
    wrong = sum(_text(_better(one)) != _text(right[one.prompt.id]) for one in examples)
    return wrong / max(1, len(examples))


def _row(one: Example) -> dict[str, Any]:
    return {
        "prompt": list(one.prompt.messages),
        "chosen": [_better(one)],
        "rejected": [one.completions[1].message],
    }


def _better(one: Example) -> Message:
    return one.completions[0].message


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _text(message: Message) -> str:
    return str(message["content"])
