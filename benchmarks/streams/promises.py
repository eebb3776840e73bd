"""The promises of issue 18 about streams, as far as the rows can tell of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from agentpref.config import UpdateConfig
from benchmarks._report import Target, at_least, at_most
from benchmarks.streams.catalogue import COINS
from benchmarks.streams.rows import Row
from benchmarks.streams.rules import SHORTER
from benchmarks.streams.table import (
    Lived,
    Place,
    diagonal,
    lives_of,
    ratios,
    recovered,
    slopes,
)

KL_BUDGET = UpdateConfig().gate.budget


def targets(rows: Sequence[Row]) -> list[Target]:
    """One target for each promise, stream and model."""
    lives, found = lives_of(rows), list[Target]()
    for (model, stream), arms in lives.items():
        for target in _of_stream(stream, arms, is_bundled=model.startswith("tiny ")):
            name = f"{stream} {target.name} ({model})"
            found.append(Target(name, target.value, target.target, target.holds))
    for model in {model for model, _ in lives}:
        for target in _between_streams({s: arms for (m, s), arms in lives.items() if m == model}):
            name = f"{target.name} ({model})"
            found.append(Target(name, target.value, target.target, target.holds))
    for name, value, _ in slopes(lives):
        if name.startswith("all streams"):
            found.append(at_least(f"R² of forgetting on KL, {name}", value, 0.7))
    return found


def _of_stream(
    stream: str, arms: Mapping[str, Mapping[Place, Lived]], *, is_bundled: bool
) -> Iterable[Target]:
    means = {arm: _Means(lives.values()) for arm, lives in arms.items() if lives}
    naive, full = means.get("naive"), means.get("full")
    if naive and stream == "S2":
        yield at_least("naive forgets", naive.of(lambda life: life.ranking.forgetting), 0.10)
    if naive and full and stream in ("S1", "S2"):
        lost, kept = (m.of(lambda life: life.ranking.forgetting) for m in (naive, full))
        cut = 1 - kept / lost if lost > 0 else math.nan
        yield at_least("forgetting cut", cut, 0.75 if stream == "S1" else 0.65)
        yield at_least("BWT", full.of(lambda life: life.ranking.bwt), -0.03)
        new = full.of(lambda life: life.learned) - naive.of(lambda life: life.learned)
        yield at_least("new stratum less naive's", new, -0.02)
    if full:
        yield at_most("perplexity", full.of(lambda life: life.against_base("perplexity")), 1.02)
        capable = full.of(lambda life: life.against_base("capability"))
        yield at_least("capability", capable, 0.97 if is_bundled else 0.98)
    if stream in ("S1", "S2") and full and (closed := recovered(arms, "full")) is not None:
        yield at_least("recovery", closed, 0.9)
    if full and (times := ratios(arms, "full")):
        yield at_most("last night by joint's", statistics.fmean(times.values()), 1 / 3)
    if full and stream == "S7":
        yield at_least("good nights promoted or known", full.of(_learned), 1.0)
        yield at_most("coin nights promoted", full.of(_coins), 0.0)
        yield at_most("KL at the end", full.of(lambda life: float(life.last["kl"])), KL_BUDGET)
    if naive and full and stream == "S3-untagged":
        written = [m.of(lambda life: diagonal(life.behaviour)) for m in (full, naive)]
        yield at_least("new style less naive's", written[0] - written[1], -0.10)
    if full and stream.startswith("S3") and not is_bundled:
        yield at_most("words where shorter is liked, by base's", full.of(_words), 0.7)
        yield at_least("answers shorter than base's", full.of(_wins), 0.75)
    if full and stream == "S3-tagged":
        yield at_least("kept of what was gained in writing", full.of(_kept), 0.9)


def _between_streams(
    streams: Mapping[str, Mapping[str, Mapping[Place, Lived]]],
) -> Iterable[Target]:
    acc = {
        stream: _Means(arms["full"].values()).of(lambda life: life.ranking.acc)
        for stream, arms in streams.items()
        if "full" in arms
    }
    if {"S1", "S4"} <= acc.keys():
        yield at_least("S4 less S1", acc["S4"] - acc["S1"], -0.03)
    if {"S1", "S5"} <= acc.keys():
        yield at_least("S5 by S1", acc["S5"] / acc["S1"], 0.9)


class _Means:
    def __init__(self, lives: Iterable[Lived]) -> None:
        self._lives = list(lives)

    def of(self, value: Callable[[Lived], float]) -> float:
        return statistics.fmean(map(value, self._lives))


def _learned(life: Lived) -> float:
    """The share of the nights with a true preference that serve, or that live knew already."""
    good = [row["verdict"] for row in life.rows[1:] if row["name"] not in COINS]
    return sum(verdict in ("promoted", "nothing_to_gain") for verdict in good) / len(good)


def _coins(life: Lived) -> float:
    coins = [row["verdict"] for row in life.rows[1:] if row["name"] in COINS]
    return statistics.fmean(verdict == "promoted" for verdict in coins) if coins else 0.0


def _shorter(life: Lived) -> list[int]:
    """The nights in which shorter answers are liked, from 0."""
    columns = life.behaviour.strata
    return [j for j, name in enumerate(columns) if name.endswith(SHORTER.name)]


def _words(life: Lived) -> float:
    """Length of the answers right after the nights that like them shorter, by the base's."""
    nights = _shorter(life)
    own = sum(life.rows[j + 1]["words"][j] for j in nights)
    return float(own / sum(life.rows[0]["words"][j] for j in nights))


def _wins(life: Lived) -> float:
    return statistics.fmean(life.behaviour.rows[j + 1][j] for j in _shorter(life))


def _kept(life: Lived) -> float:
    """How much of the earlier nights' gain in behaviour is left at the end."""
    r = life.behaviour
    earlier = range(len(r.strata) - 1)
    gained = sum(r.rows[j + 1][j] - r.rows[0][j] for j in earlier)
    left = sum(r.rows[-1][j] - r.rows[0][j] for j in earlier)
    return left / gained if gained > 0 else math.nan
