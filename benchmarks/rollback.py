"""How soon people's thumbs prove a worse revision worse, and how often they accuse a good one.

Simulated thumbs, one a conversation; .80 are likes. A revision that is ten points worse serves
after 2,000 thumbs of its predecessor (in time), or beside it as a canary with 10 % or 50 % of the
threads. Every thumb is followed by a look. ``share`` is how many of the trials found it within 400
thumbs of the worse revision, and ``median`` how many it took.

Then 10,000 thumbs of a revision that is no worse: the share of trials that accuse it at any of the
10,000 looks; likewise for a canary that is no better and would be promoted. Last, what no test in
time can tell from a worse revision: users whose mood falls by ten points over the 10,000 thumbs,
whichever revision serves.

Run as `python -m benchmarks.rollback`; needs no model and no extra. Four minutes on one core.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from functools import cache
from math import log
from statistics import median

from agentpref.serve.sequential import Rate, lower_in_time, lower_together
from benchmarks._report import Target, at_least, at_most, print_report

LIKED, DROP, ALPHA = 0.8, 0.1, 0.05
BEFORE, WITHIN, LONG = 2000, 400, 10_000
ENOUGH = -log(ALPHA)
HISTORIES = 16
"""How many histories of the predecessor the trials in time share: each costs its own bounds."""

Mood = Callable[[int], float]


def main() -> None:
    """Simulate, print a line for each case, and end with the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=400, help="trials of each case")
    trials = parser.parse_args().trials
    figures: dict[str, float] = {}
    targets: list[Target] = []

    def steady(_: int) -> float:
        return LIKED

    def falling(n: int) -> float:
        return LIKED - DROP * n / LONG

    found = {"in_time": in_time(trials, WITHIN, steady, DROP, seed=1)}
    for weight in (0.1, 0.5):
        found[f"canary_{weight:.0%}"] = beside(trials, weight, WITHIN, steady, DROP, seed=2)
    for name, took in found.items():
        share = sum(n is not None for n in took) / trials
        figures[f"{name}.share"] = share
        figures[f"{name}.median"] = median(n or float("inf") for n in took)
        print(f"{name:<12} found {share:6.1%}  median {figures[f'{name}.median']:.0f} thumbs")
        targets.append(at_least(f"{name}.share", share, 0.8))

    quiet = {"in_time": in_time(trials, LONG, steady, 0, seed=3)}
    for weight in (0.1, 0.5):
        long = int(LONG * weight)
        name = f"canary_{weight:.0%}"
        quiet[name] = beside(trials, weight, long, steady, 0, seed=4)
        quiet[f"{name}.better"] = beside(trials, weight, long, steady, 0, seed=5, better=True)
        quiet[f"{name}.mood"] = beside(trials, weight, long, falling, 0, seed=6)
    for name, took in quiet.items():
        share = sum(n is not None for n in took) / trials
        figures[f"{name}.false"] = share
        print(f"{name:<18} accused {share:6.1%} in {LONG:,} thumbs without a difference")
        targets.append(at_most(f"{name}.false", share, ALPHA))

    moody = in_time(trials, LONG, falling, 0, seed=7)
    figures["in_time.mood"] = sum(n is not None for n in moody) / trials
    print(f"in_time            accused {figures['in_time.mood']:6.1%} while the mood falls")
    print_report("rollback", figures, targets)


def in_time(trials: int, votes: int, mood: Mood, drop: float, *, seed: int) -> list[int | None]:
    """After how many votes each trial finds the live revision worse than its predecessor."""
    draw, past = random.Random(seed), random.Random(0)
    histories = [sum(past.random() < LIKED for _ in range(BEFORE)) for _ in range(HISTORIES)]
    took: list[int | None] = []
    for trial in range(trials):
        most = bounds(Rate(histories[trial % HISTORIES], BEFORE))
        likes, at = 0, None
        for n in range(1, votes + 1):
            likes += draw.random() < mood(n) - drop
            if likes <= most(n):
                at = n
                break
        took.append(at)
    return took


@cache
def bounds(before: Rate) -> Callable[[int], int]:
    """The most likes among n votes that are still proof, by n; -1: none. Fewer are more proof."""

    @cache
    def most(n: int) -> int:
        likes = -1 if n == 1 else most(n - 1)
        while likes < n and lower_in_time(before, Rate(likes + 1, n)) >= ENOUGH:
            likes += 1
        return likes

    return most


def beside(
    trials: int,
    weight: float,
    votes: int,
    mood: Mood,
    drop: float,
    *,
    seed: int,
    better: bool = False,
) -> list[int | None]:
    """After how many of its votes each trial finds the canary worse than live, or better."""
    draw = random.Random(seed)

    def stream(counted: list[int]) -> Iterator[tuple[bool, bool]]:
        total = 0
        while counted[0] < votes:
            total += 1
            is_new = draw.random() < weight
            counted[0] += is_new
            liked = draw.random() < mood(total) - drop * is_new
            yield is_new, liked != better

    took: list[int | None] = []
    for _ in range(trials):
        counted = [0]
        is_found = any(log_e >= ENOUGH for log_e in lower_together(stream(counted)))
        took.append(counted[0] if is_found else None)
    return took


if __name__ == "__main__":
    main()
