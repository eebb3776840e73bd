"""How right is the reward model, does it forget, and what does best-of-N win by it?

    python -m benchmarks.reward                     nights, noise and best-of-N on the bundled model
    python -m benchmarks.reward --parts nights --seeds 5

``nights`` logs five traits that pull against each other, one a night, and fits after each. BWT is
the mean over all but the last of the accuracy at the end less that right after a trait's own night,
on 100 pairs a trait that no fit has seen. ``dpo`` is the same accuracy of one update on all pairs
with default settings. ``best`` draws answers to ordinary requests from the bundled model, lets a
rule compare some (shorter is better, politeness is worth sixty characters), fits a reward model on
that, and asks the rule whether the best of n is better than the first of them, on other requests.
``frontier`` asks over n, for a model of few and noisy labels, and whether ``auto`` finds the best
n. ``throughput`` compares with eight plain samples. The last line of the output
is one JSON object.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

import agentpref
from agentpref import Log
from agentpref.evaluation.overoptimisation import measure_frontier
from agentpref.models.base import load_base
from agentpref.models.decoding import Decoding
from agentpref.prefer.examples import is_held_out
from agentpref.reward import fit_reward, open_reward
from agentpref.reward.model import RewardModel
from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.serve.best import BestOf
from agentpref.testing.judges import drawn
from agentpref.types import BASE, Message, Prompt
from agentpref_adapters.transformers import TransformersBackend
from benchmarks._report import Target, at_least, at_most, print_report
from benchmarks.online import Rule
from benchmarks.streams.catalogue import Sizes, trait_night
from benchmarks.streams.items import Night
from benchmarks.streams.subjects import requests

TRAITS = (
    "conscientiousness", "risk-seeking", "agreeableness", "interest-in-music", "openness",
)  # fmt: skip
SIZES = Sizes(new=300, proving=40, measured=100)
PROMPTS, TESTED, DRAWN, ROUND = 300, 100, 8, 20
TOKENS, TEMPERATURE = 64, 0.9

Options = argparse.Namespace
NS = (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default="nights,best,frontier")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--model", default="tiny")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of peft
    found: dict[str, Any] = {}
    targets: list[Target] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts.split(","):
            measure, promised = PARTS[part]
            found[part] = measure(Path(folder), options)
            targets += promised(found[part])
    print_report("reward", found, targets)


# --- Nights ---


def nights(folder: Path, options: Options) -> dict[str, Any]:
    """Five traits, one a night."""
    return {
        str(seed): _five_nights(folder / f"nights-{seed}", options.model, seed)
        for seed in range(options.first, options.first + options.seeds)
    }


def _five_nights(place: Path, model: str, seed: int) -> dict[str, Any]:
    streams = [trait_night(trait, "", SIZES, seed) for trait in TRAITS]
    accuracies: list[list[float]] = []
    seconds, errors = [], []
    for night in streams:
        _log(place, night)
        begun = time.perf_counter()
        report = fit_reward(place, model=model)
        seconds.append(round(time.perf_counter() - begun, 1))
        errors.append(report.quality.calibration_error)
        reward = open_reward(place)
        accuracies.append([_accuracy(reward, one) for one in streams])
    own = [row[number] for number, row in enumerate(accuracies)]
    last = accuracies[-1]
    bwt = sum(end - then for end, then in zip(last[:-1], own[:-1], strict=True)) / (len(own) - 1)
    updated = agentpref.update(place, model=model)
    dpo = agentpref.Registry(place).live()
    policy = None
    if dpo is not None:
        policy = [updated.accuracy.get(one.name, {}).get("after") for one in streams]
    return {
        "last": last,
        "mean": sum(last) / len(last),
        "bwt": bwt,
        "own": own,
        "calibration_error": errors,
        "seconds": seconds,
        "dpo": policy,
        "reward on the update's pairs": {
            name: one[1] for name, one in report.quality.strata.items()
        },
    }


def _log(place: Path, night: Night) -> None:
    with Log(place) as log:
        for item in night.logged:
            a = log.record([*item.messages], item.chosen, tags=[night.name])
            b = log.record([*item.messages], item.rejected, tags=[night.name])
            log.compare(a, b, winner="a", user_id="ana")


def _accuracy(reward: RewardModel, night: Night) -> float:
    right = 0
    for item in night.measured:
        better, worse = reward.score([*item.messages], [item.chosen, item.rejected])
        right += better.mean > worse.mean
    return right / len(night.measured)


def of_nights(found: dict[str, Any]) -> list[Target]:
    """What was promised of nights."""
    rows = found.values()
    errors = [row["calibration_error"][-1] for row in rows]
    return [
        at_least("nights: BWT, worst seed", min(row["bwt"] for row in rows), -0.03),
        at_most("nights: calibration error, mean", sum(errors) / len(errors), 0.05),
    ]


# --- Best of n ---


def best(folder: Path, options: Options) -> dict[str, Any]:
    """The best of eight against the first of them."""
    with _Drawn(options.model) as drawn_:
        found: dict[str, Any] = {}
        for seed in range(options.first, options.first + options.seeds):
            reward = drawn_.reward(folder / f"best-{seed}", PROMPTS, noise=0.0, seed=seed)
            chosen = [drawn_.choose(reward, number, DRAWN) for number in range(TESTED)]
            wins = [drawn_.wins(number, place) for number, place in enumerate(chosen)]
            found[str(seed)] = {"win rate": sum(wins) / len(wins)}
        return found


def of_best(found: dict[str, Any]) -> list[Target]:
    """What was promised of best-of-eight."""
    return [
        at_least(
            "best of 8: win rate, worst seed", min(r["win rate"] for r in found.values()), 0.75
        )
    ]


def frontier(folder: Path, options: Options) -> dict[str, Any]:
    """What ``auto`` finds for a model of 100 pairs with a quarter of the labels flipped.

    ``crossed`` is the n that models of halves of the labels choose, and ``gold`` what the rule says
    of the best of n. ``planted`` is the same with a rule that people never told: neither short nor
    long; it judges itself, and the n is its.
    """
    with _Drawn(options.model) as drawn_:
        found: dict[str, Any] = {}
        for seed in range(options.first, options.first + options.seeds):
            place = folder / f"frontier-{seed}"
            reward = drawn_.reward(place, 100, noise=0.25, seed=seed, may_fail=True)
            if reward is None:
                found[str(seed)] = {"fitted": False}
                continue
            crossed, gold, planted = (
                measure_frontier(
                    place, answer=lambda *_: drawn_.answer, judge=judge, samples=max(NS),
                    temperature=TEMPERATURE, max_tokens=TOKENS,
                )
                for judge in (None, Rule("shorter and polite"), _Moderate("moderate"))
            )  # fmt: skip
            found[str(seed)] = {
                "fitted": True,
                "auto": crossed.best_n,
                "turns": crossed.turns,
                "proxy": {str(one.n): round(one.proxy, 4) for one in gold.points},
                "crossed": {str(one.n): round(one.gold, 4) for one in crossed.points},
                "gold": {str(one.n): round(one.gold, 4) for one in gold.points},
                "planted": {str(one.n): round(one.gold, 4) for one in planted.points},
                "planted auto": planted.best_n,
                "planted turns": planted.turns,
                "planted budget": planted.kl_budget,
            }
            print(seed, found[str(seed)], flush=True)
        return found


class _Moderate(Rule):
    """Answers of some sixty characters are best."""

    def _score(self, text: str) -> float:
        return -abs(len(text) - 60.0)


def of_frontier(found: dict[str, Any]) -> list[Target]:
    """What was promised of ``auto``, of the seeds that have a reward model."""
    rows = [row for row in found.values() if row["fitted"]]
    if not rows:
        return []
    near = {
        name: [_gain(row[name], row[auto]) >= 0.9 * max(_gain(row[name], n) for n in NS)
               for row in rows]
        for name, auto in (("gold", "auto"), ("planted", "planted auto"))
    }  # fmt: skip
    return [
        at_least(f"frontier: {name}, seeds in which auto gains .9 of the best n", fmean(own), 0.9)
        for name, own in near.items()
    ]


def _gain(curve: dict[str, float], n: int) -> float:
    return curve[str(n)] - 0.5


class _Drawn:
    """Requests, answers of the bundled model to them, and a rule that compares these."""

    def __init__(self, model: str) -> None:
        self.model, self._known = model, dict[Any, Reply]()
        self._rule = Rule("shorter and polite")
        found: list[tuple[Message, ...]] = []
        for request in requests("reward"):
            messages: tuple[Message, ...] = ({"role": "user", "content": request.text},)
            if messages not in found and not is_held_out(messages, 0.0):
                found.append(messages)
            if len(found) == PROMPTS + TESTED:
                break
        self._trained, self._measured = found[:PROMPTS], found[PROMPTS:]

    def __enter__(self) -> _Drawn:
        self._backend = TransformersBackend(self.model)
        return self

    def __exit__(self, *at: object) -> None:
        self._backend.close()

    def answer(self, revision: str, request: GenerationRequest) -> Reply:
        """An answer of the base, drawn once."""
        key = (str(request.messages), request.seed)
        if key not in self._known:
            self._known[key] = self._backend.generate(revision, request)
        return self._known[key]

    def _answers(self, prompts: Sequence[tuple[Message, ...]], count: int) -> list[list[str]]:
        requests_ = [
            GenerationRequest(messages, max_tokens=TOKENS, temperature=TEMPERATURE, seed=seed)
            for messages in prompts
            for seed in range(count)
        ]
        with ThreadPoolExecutor(16) as pool:
            replies = [*pool.map(lambda one: self._backend.generate(BASE, one), requests_)]
        texts = [str(reply.message["content"]) for reply in replies]
        return [texts[start : start + count] for start in range(0, len(texts), count)]

    @cached_property
    def _pairs(self) -> list[list[str]]:
        return self._answers(self._trained, 2)

    @cached_property
    def _many(self) -> list[list[str]]:
        return self._answers(self._measured, DRAWN)

    def reward(
        self, place: Path, pairs: int, *, noise: float, seed: int, may_fail: bool = False
    ) -> Any:
        """A reward model of what the rule says of so many pairs of answers."""
        shutil.rmtree(place, ignore_errors=True)
        with Log(place) as log:
            for messages, (a, b) in [*zip(self._trained, self._pairs, strict=True)][:pairs]:
                winner = self._rule.winner(a, b)
                if winner == "tie":
                    continue
                if drawn(seed, "noise", str(messages)) < noise:
                    winner = "b" if winner == "a" else "a"
                runs = [log.record([*messages], text, tags=["chat"]) for text in (a, b)]
                log.compare(*runs, winner=winner, user_id="ana")
        report = fit_reward(place, model=self.model)
        if report.verdict != "kept" and may_fail:
            return None
        return open_reward(place)

    def scores(self, reward: RewardModel, number: int, n: int) -> list[float]:
        """The lower bounds of the first n answers to a measured request."""
        answers = self._many[number][:n]
        return [one.lower for one in reward.score(self._measured[number], answers)]

    def choose(self, reward: RewardModel, number: int, n: int) -> int:
        """The place of the best of the first n answers."""
        scores = self.scores(reward, number, n)
        return max(range(n), key=scores.__getitem__)

    def wins(self, number: int, place: int) -> float:
        """Whether an answer is better than the first one, by the rule; a tie is a half."""
        winner = self._rule.winner(self._many[number][place], self._many[number][0])
        return {"a": 1.0, "b": 0.0, "tie": 0.5}[winner]


# --- What best-of-N costs ---


def throughput(folder: Path, options: Options) -> dict[str, Any]:
    """Tokens a second of the best of eight, and of eight plain samples of one ``generate``.

    Each arm answers the same requests once in each round, one after the other; ratios are of the
    processor time and the wall time of a round.
    """
    place = folder / "throughput"
    with _Drawn(options.model) as drawn_:
        reward = drawn_.reward(place, PROMPTS, noise=0.0, seed=0)
    drawn_tokens: list[int] = []

    def rank(request: GenerationRequest, replies: Sequence[Reply]) -> list[float]:
        drawn_tokens.extend(len(one.token_ids) for one in replies)
        scores: list[float] = reward.rank(request, replies)
        return scores

    backend = BestOf(TransformersBackend(options.model), rank)
    base, rows = load_base(options.model), list[dict[str, float]]()
    asked: list[tuple[Message, ...]] = [
        ({"role": "user", "content": one.text},) for one in islice(requests("reward"), ROUND)
    ]

    model: Any = base.model

    def plain() -> int:
        count = 0
        for messages in asked:
            text = base.template.render(Prompt("", messages))
            given = base.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            found = model.generate(
                given, attention_mask=given.new_ones(given.shape), do_sample=True, temperature=0.9,
                top_k=0, max_new_tokens=64, num_return_sequences=DRAWN,
            )  # fmt: skip
            count += int((found[:, given.shape[1] :] != Decoding.of(base).pad).sum())
        return count

    def best_of() -> int:
        drawn_tokens.clear()
        for messages in asked:
            wanted = GenerationRequest(messages, max_tokens=64, temperature=0.9, best_of=DRAWN)
            backend.generate(BASE, wanted)
        return sum(drawn_tokens)

    for _ in range(max(5, options.seeds)):
        row = {}
        for name, arm in (("plain", plain), ("best", best_of)):
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = arm()
            row[f"{name} per second"] = tokens / (time.perf_counter() - wall)
            row[f"{name} per processor second"] = tokens / (time.process_time() - cpu)
        rows.append(row)
    backend.close()
    return {"rounds": rows}


def of_throughput(found: dict[str, Any]) -> list[Target]:
    """What was promised of the cost."""
    ratios = [row["best per second"] / row["plain per second"] for row in found["rounds"]]
    return [at_least("best of 8: tokens a second, of plain samples'", median(ratios), 0.8)]


PARTS = {
    "nights": (nights, of_nights),
    "best": (best, of_best),
    "frontier": (frontier, of_frontier),
    "throughput": (throughput, of_throughput),
}

if __name__ == "__main__":
    main()
