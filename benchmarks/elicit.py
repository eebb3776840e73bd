"""How many labels does it take, if those that tell most are asked for first?

    python -m benchmarks.elicit --seeds 5

A pool has the statements of four traits with two answers each, and their labels, which are told
when they are asked for: 20 at random, and then 20 at a time by each rule, with a reward model
fitted after each time. ``labels`` is how many it takes to reach .95 of the held-out accuracy that
all labels of the pool give. With ``noise``, so many of the labels are flipped; every rule is asked
as it is, and ``shipped`` is what agentpref does: it estimates the noise from 40 pairs
of repeated labels, and then takes the default or chance. The last line of the output is one JSON
object.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentpref.elicitation.acquisition import (
    RULES,
    candidates,
    choose,
    noise_of_agreement,
    rule_for,
)
from agentpref.learn.encode import encode
from agentpref.learn.features import FeatureReader
from agentpref.models.base import load_base
from agentpref.reward.heads import Heads, Judged, fit
from benchmarks._report import Target, at_most, print_report
from benchmarks.streams.catalogue import Sizes, trait_night

TRAITS = ("conscientiousness", "risk-seeking", "agreeableness", "interest-in-music")
SIZES = Sizes(new=250, proving=40, measured=100)
BATCH, MOST, REPEATED = 20, 600, 40
SHIPPED = "shipped"


def main() -> None:
    """Measure each rule, without and with noise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--noise", default="0,0.2")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of peft
    found: dict[str, Any] = {}
    targets: list[Target] = []
    pools = [_Pool(seed) for seed in range(options.seeds)]
    for noise in map(float, options.noise.split(",")):
        rows = {rule: [pool.labels(rule, noise) for pool in pools] for rule in (*RULES, SHIPPED)}
        mean = {rule: sum(row) / len(row) for rule, row in rows.items()}
        share = mean[SHIPPED] / mean["random"]
        found[f"noise {noise:g}"] = {"labels": rows, "mean": mean, "of random": share}
        most = 0.67 if noise == 0 else 1.05
        targets.append(at_most(f"noise {noise:g}: labels, of those at random", share, most))
    print_report("elicit", found, targets)


class _Pool:
    """The pairs of a seed: those to ask for, and those to measure on."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        base = load_base("tiny")
        reader = FeatureReader(base)
        parts: dict[bool, list[Any]] = {False: [], True: []}
        for trait in TRAITS:
            night = trait_night(trait, "", SIZES, seed)
            for held_out, items in ((False, night.logged), (True, night.measured)):
                examples = [item.example(trait, n) for n, item in enumerate(items)]
                rows = encode(examples, base.template, max_length=512).rows
                for row, features in zip(rows, reader.read(rows), strict=True):
                    apart = features.answers[0] - features.answers[1]
                    parts[held_out].append((features.prompt, apart, row.example.example_id))
        self._pool, self._measured = _judged(parts[False]), _judged(parts[True])

    def labels(self, rule: str, noise: float) -> int:
        """How many labels reach the goal; one more than there may be where none do."""
        rng = random.Random(f"{self._seed} {noise}")
        flipped = np.array([rng.random() < noise for _ in range(len(self._pool))])
        turn = np.where(flipped, -1.0, 1.0).astype(np.float32)
        pool = replace(self._pool, said=self._pool.said * turn[:, None])
        goal = 0.95 * self._accuracy(fit(pool))
        chosen: Any = rule if rule != SHIPPED else rule_for(self._estimated(noise))
        asked = rng.sample(range(len(pool)), BATCH)
        while True:
            heads = fit(_only(pool, asked))
            if self._accuracy(heads) >= goal:
                return len(asked)
            if len(asked) >= MOST:
                return MOST + 1
            left = [n for n in range(len(pool)) if n not in set(asked)]
            picked = choose(
                candidates(heads, pool.at[left], pool.said[left]), BATCH, chosen, seed=len(asked)
            )
            asked += [left[number] for number in picked]

    def _estimated(self, noise: float) -> float:
        """The noise as repeated labels tell it."""
        rng = random.Random(f"{self._seed} {noise} repeated")
        pairs = [[rng.random() < noise for _ in range(2)] for _ in range(REPEATED)]
        return noise_of_agreement(sum(a == b for a, b in pairs) / REPEATED)

    def _accuracy(self, heads: Heads) -> float:
        margins = heads.margins(self._measured.at, self._measured.said).mean(1)
        return float((margins > 0).mean())


def _judged(rows: Sequence[tuple[NDArray[Any], NDArray[Any], str]]) -> Judged:
    n, ones = len(rows), np.ones(len(rows))
    return Judged(
        np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows]),
        np.zeros(n, bool), ones, 0.05 * ones, ones, tuple(row[2] for row in rows),
    )  # fmt: skip


def _only(judged: Judged, numbers: Sequence[int]) -> Judged:
    parts = (judged.at, judged.said, judged.lone, judged.sign, judged.noise, judged.weight)
    at, said, lone, sign, noise, weight = (part[list(numbers)] for part in parts)
    prompts = tuple(judged.prompts[number] for number in numbers)
    return Judged(at, said, lone, sign, noise, weight, prompts)


if __name__ == "__main__":
    main()
