"""Is a panel as right as its best judge, and does a corrected win rate cover the truth?

The panel is measured on LLMBar: six real judges' verdicts on 100 pairs, of which 30 are gold for it
in each of 200 random splits, and 70 are left to be right on. The correction is measured on made-up
judges whose errors are known. Seeds are fixed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from agentpref.prefer.judges.calibration import GoldVerdict
from agentpref.prefer.judges.panel import STRENGTH, WEIGHT, Panel, cross_validated, fit_panel
from agentpref.prefer.judges.winrate import WinRate, corrected_win_rate
from agentpref.types import Winner
from benchmarks._report import Target, at_least, at_most

SPLITS, GOLD = range(200), 30
FRESH = range(5_000, 7_000)
"""Splits that the prior was not chosen on."""

ALLOWED = 0.01
"""So much less right than a single judge may a panel be."""

STRENGTHS, WEIGHTS = (0.3, 1.0, 3.0, 10.0, 30.0), (1.0, 2.0, 4.0)

_DATA = Path(__file__).parents[1] / "data" / "llmbar.json"
_SIGNS: Mapping[str | None, float] = {"1": 0.5, "2": -0.5, None: 0.0}
_ROUNDING = 1e-9

Side = Literal["a", "b"]
Verdicts = Sequence[Mapping[str, float]]


def targets(panel: Mapping[str, Any], coverage: Mapping[str, Any]) -> list[Target]:
    """What was promised of both measurements."""
    promised = [
        at_most(f"panel: splits more than {ALLOWED} below {name}", panel[f"below_{name}"], 0)
        for name in ("chosen", "best")
    ]
    for name, found in coverage.items():
        promised += [
            at_least(f"corrected win rate, {name}: coverage", found["corrected"], 0.93),
            at_most(f"raw win rate, {name}: coverage", found["raw"], 0.5),
        ]
    return promised


def panel_on_llmbar() -> dict[str, Any]:
    """The panel beside single judges and a majority, with the shipped prior and with others.

    ``splits`` has for each split the accuracies, ties counting half, of the panel, of the judge
    ``chosen`` by the same gold, of the judge that is ``best`` on the 70 that are left (nobody knows
    it beforehand), and of the majority. The prior was chosen on these splits; ``fresh`` has the
    summary of 2,000 others.
    """
    said, gold = _llmbar()
    shipped = _splits(said, gold, STRENGTH, WEIGHT)
    whole = cross_validated(said, gold)
    worse = [dict(one) for one in said]
    for row in worse:
        del row["GPT-4"]
    return {
        **_summary(shipped),
        "cross_validated_on_all": _accuracy(whole, gold),
        "priors": {
            f"strength {strength:g}, weight {weight:g}": _summary(
                _splits(said, gold, strength, weight)
            )
            for strength in STRENGTHS
            for weight in WEIGHTS
        },
        "fresh": _summary(_splits(said, gold, STRENGTH, WEIGHT, seeds=FRESH)),
        "without_gpt4": _summary(_splits(worse, gold, STRENGTH, WEIGHT)),
        "gold_15": _summary(_splits(said, gold, STRENGTH, WEIGHT, size=15)),
        "gold_50": _summary(_splits(said, gold, STRENGTH, WEIGHT, size=50)),
        "splits": shipped,
    }


def _llmbar() -> tuple[list[dict[str, float]], list[Side]]:
    """Signed verdicts by judge, and the better answer, of each pair."""
    rows = json.loads(_DATA.read_text(encoding="utf-8"))
    said = [
        {name: sum(_SIGNS[one] for one in both) for name, both in row["verdicts"].items()}
        for row in rows
    ]
    return said, ["a" if row["label"] == "1" else "b" for row in rows]


def _splits(
    said: Verdicts,
    gold: Sequence[Side],
    strength: float,
    weight: float,
    size: int = GOLD,
    seeds: range = SPLITS,
) -> list[dict[str, Any]]:
    """The accuracies in each split."""
    found = []
    singles = {name: Panel({name: 1.0}) for name in said[0]}
    for seed in seeds:
        order = random.Random(seed).sample(range(len(gold)), len(gold))
        known, rest = order[:size], order[size:]

        def right(vote: Callable[[Mapping[str, float]], Winner], among: Sequence[int]) -> float:
            return _accuracy([vote(said[one]) for one in among], [gold[one] for one in among])

        panel = fit_panel(
            [said[one] for one in known],
            [gold[one] for one in known],
            strength=strength,
            weight=weight,
        )
        chosen = max(singles, key=lambda name: right(_vote(singles[name]), known))
        found.append(
            {
                "seed": seed,
                "panel": right(_vote(panel), rest),
                "chosen": right(_vote(singles[chosen]), rest),
                "chosen_judge": chosen,
                "best": max(right(_vote(one), rest) for one in singles.values()),
                "majority": right(_majority, rest),
            }
        )
    return found


def _vote(panel: Panel) -> Callable[[Mapping[str, float]], Winner]:
    return lambda said: panel.vote(said)[0]


def _majority(said: Mapping[str, float]) -> Winner:
    total = sum((one > 0) - (one < 0) for one in said.values())
    return "a" if total > 0 else "b" if total < 0 else "tie"


def _accuracy(votes: Sequence[Winner], gold: Sequence[Side]) -> float:
    """The share of right votes; a tie counts half."""
    points = [0.5 if vote == "tie" else vote == one for vote, one in zip(votes, gold, strict=True)]
    return sum(points) / len(points)


def _summary(splits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means, minima, and in how many splits the panel falls short of a single judge."""
    found: dict[str, Any] = {}
    for name in ("panel", "chosen", "best", "majority"):
        values = [one[name] for one in splits]
        found[f"mean_{name}"], found[f"min_{name}"] = sum(values) / len(values), min(values)
    for name in ("chosen", "best"):
        for who, key in (("panel", f"below_{name}"), ("majority", f"majority_below_{name}")):
            off = [one[who] - one[name] for one in splits]
            found[key] = sum(one < -ALLOWED - _ROUNDING for one in off)
            found[f"least_{who}_minus_{name}"] = min(off)
    return found


def corrected_coverage(resamples: int = 1_000) -> dict[str, Any]:
    """How often the intervals of raw and corrected win rate cover the true one.

    Each judge is named for its errors; in each resample its pairs and its gold are drawn anew.
    ``without`` is the share of resamples in which no corrected rate is given, because the judge may
    be a coin; these are left out of ``corrected``.
    """
    judges = {
        "likes length": _MadeUp(truth=0.4, longer_right=0.95, shorter_right=0.6, long=0.8),
        "often wrong": _MadeUp(truth=0.7, longer_right=0.8, shorter_right=0.75, long=0.5),
        "often ties": _MadeUp(truth=0.9, longer_right=0.95, shorter_right=0.85, ties=0.2, long=0.6),
        "little gold": _MadeUp(truth=0.3, longer_right=0.9, shorter_right=0.75, gold=30, long=0.6),
        "few pairs": _MadeUp(truth=0.3, longer_right=0.85, shorter_right=0.7, pairs=150, long=0.7),
    }
    return {name: judge.coverage(resamples) for name, judge in judges.items()}


class _MadeUp:
    """A judge whose errors are known, and two policies of which the first wins in ``truth``."""

    def __init__(
        self,
        *,
        truth: float,
        longer_right: float,
        shorter_right: float,
        long: float,
        ties: float = 0.1,
        pairs: int = 300,
        gold: int = 60,
    ) -> None:
        self.truth, self.long, self.ties, self.pairs, self.gold = truth, long, ties, pairs, gold
        self.right = {True: longer_right, False: shorter_right}

    def coverage(self, resamples: int) -> dict[str, float]:
        """The share of intervals that cover the truth, and their mean width and error."""
        found = [self.resample(random.Random(seed)) for seed in range(resamples)]
        raw = [one.raw for one in found if one.raw is not None]
        corrected = [one.corrected for one in found if one.corrected is not None]
        return {
            "truth": self.truth,
            "raw": sum(one.low <= self.truth <= one.high for one in raw) / len(raw),
            "corrected": sum(o.low <= self.truth <= o.high for o in corrected) / len(corrected),
            "without": 1 - len(corrected) / resamples,
            "raw_error": sum(one.value for one in raw) / len(raw) - self.truth,
            "corrected_error": sum(o.value for o in corrected) / len(corrected) - self.truth,
            "raw_width": sum(one.high - one.low for one in raw) / len(raw),
            "corrected_width": sum(o.high - o.low for o in corrected) / len(corrected),
        }

    def resample(self, rng: random.Random) -> WinRate:
        """Pairs and gold drawn anew, and what is made of them."""
        scores, longer, known = list[float](), list[bool | None](), list[GoldVerdict]()
        for _ in range(self.pairs):
            wins, is_longer = rng.random() < self.truth, rng.random() < self.long
            score = self._score(rng, wins == is_longer)
            scores.append(score if wins else 1 - score)
            longer.append(is_longer)
        for _ in range(self.gold):
            longer_is_better = rng.random() < 0.5
            winners: Mapping[float, Winner] = {1.0: "a", 0.5: "tie", 0.0: "b"}
            said = winners[self._score(rng, longer_is_better)]
            known.append(GoldVerdict("made up", "a", said, said, "a" if longer_is_better else "b"))
        return corrected_win_rate(scores, longer, known)

    def _score(self, rng: random.Random, longer_is_better: bool) -> float:
        """The judge's score of the better answer."""
        if rng.random() < self.ties:
            return 0.5
        return float(rng.random() < self.right[longer_is_better])
