"""Makes one table of all rows: means over seeds and orders, with 95 % intervals.

A life is one arm in one stream with one seed and order. Its measures are those of Lopez-Paz &
Ranzato (1706.08840) and of Chaudhry et al. (1801.10112), see ``agentpref.prove.metrics``, on the
ranking of held-out pairs and again on what is written, by the stream's rule.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from agentpref.prove.metrics import RMatrix, recovery
from benchmarks._report import Target
from benchmarks.streams.arms import ARMS, FROZEN
from benchmarks.streams.catalogue import STREAMS
from benchmarks.streams.rows import Row

_SERVED = ("promoted",)


@dataclass(frozen=True)
class Lived:
    """One life by its rows, in order: the base's, then one a night."""

    rows: Sequence[Row]

    @cached_property
    def ranking(self) -> RMatrix:
        """R on the ranking of pairs."""
        return self._matrix("ranking")

    @cached_property
    def behaviour(self) -> RMatrix:
        """R on what is written."""
        return self._matrix("behaviour")

    def _matrix(self, name: str) -> RMatrix:
        nights = len(self.rows) - 1
        values = tuple(tuple(row[name][:nights]) for row in self.rows)
        return RMatrix(tuple(self.rows[0]["columns"][:nights]), values)

    @property
    def last(self) -> Row:
        """The row of the last night."""
        return self.rows[-1]

    def against_base(self, name: str) -> float:
        """A measure after the last night, as a ratio to the base's."""
        base = float(self.rows[0][name])
        return float(self.last[name]) / base if base else math.nan

    @property
    def learned(self) -> float:
        """Mean accuracy on each night's own pairs right after it."""
        return diagonal(self.ranking)

    @property
    def dip(self) -> float:
        """The worst fall of the old strata's mean accuracy inside any update; 0 without a look."""
        falls = [0.0]
        for before, row in zip(self.rows, self.rows[1:], strict=False):
            if row["inside"]:
                old = before["ranking"][: row["night"] - 1]
                falls.append(min(row["inside"]) - statistics.fmean(old))
        return min(falls)

    @property
    def cpu(self) -> list[float]:
        """The processor's seconds of each night, in which other work hardly shows."""
        return [float(row["cpu"]) for row in self.rows[1:]]

    @property
    def served(self) -> int:
        """How many nights ended with a new revision that serves."""
        return sum(row["verdict"] in _SERVED for row in self.rows[1:])


Key = tuple[str, str]  # model, with its settings where there are any; stream
Place = tuple[int, str]  # seed, order
Lives = dict[Key, dict[str, dict[Place, Lived]]]


def lives_of(rows: Iterable[Row]) -> Lives:
    """Lives by stream, arm, seed and order; a life without its base's row or any night is left."""
    found: dict[tuple[Key, Place, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: int(row["night"])):
        found.setdefault((_key(row), (row["seed"], row["order"]), row["arm"]), []).append(row)
    lives: Lives = {}
    for (key, place, arm), own in found.items():
        base = found.get((key, place, FROZEN))
        if base is not None and arm != FROZEN:
            lives.setdefault(key, {}).setdefault(arm, {})[place] = Lived([base[0], *own])
    return {
        key: {arm: lives[key][arm] for arm in ARMS if arm in lives[key]}
        for key in sorted(lives, key=lambda key: (key[0], STREAMS.index(key[1])))
    }


def _key(row: Row) -> Key:
    words = [row["model"], row["base"][:6], "+".join(map(str, row["sizes"]))]
    return " ".join([*words, *([str(row["settings"])] if row["settings"] else [])]), row["stream"]


@dataclass(frozen=True)
class Column:
    """A column of the table: a value of each life, and how it is written."""

    title: str
    value: Callable[[Lived], float | None]
    form: str = "{:.3f}"


COLUMNS = (
    Column("ACC", lambda life: life.ranking.acc),
    Column("BWT", lambda life: life.ranking.bwt, "{:+.3f}"),
    Column("FWT", lambda life: life.ranking.fwt, "{:+.3f}"),
    Column("F", lambda life: life.ranking.forgetting, "{:+.3f}"),
    Column("new", lambda life: life.learned),
    Column("ACC written", lambda life: life.behaviour.acc),
    Column("F written", lambda life: life.behaviour.forgetting, "{:+.3f}"),
    Column("new written", lambda life: diagonal(life.behaviour)),
    Column("KL", lambda life: life.last["kl"]),
    Column("perplexity ÷ base", lambda life: life.against_base("perplexity")),
    Column("capability ÷ base", lambda life: life.against_base("capability")),
    Column("dip inside", lambda life: life.dip, "{:+.3f}"),
    Column("nights served", lambda life: life.served, "{:.1f}"),
    Column("CPU s a night", lambda life: statistics.fmean(life.cpu), "{:.1f}"),
)


def document(rows: Sequence[Row], promises: Sequence[Target], plots: Sequence[Path]) -> str:
    """The page: what was measured, the promises, a table a stream, every seed, and the plots."""
    lives = lives_of(rows)
    commits = ", ".join(sorted({row["commit"] for row in rows if row["commit"]}))
    parts = [
        "# Streams of nights",
        "Made by `make bench-streams` from the rows in `benchmarks/data/streams.jsonl`; do not "
        f"edit. Commits that were measured: {commits or 'unknown'}.",
        "ACC, BWT, FWT and F are on the ranking of held-out pairs that no home has seen, `new` is "
        "the mean accuracy on a night's own pairs right after it; *written* are the same by a rule "
        "on greedy answers. KL is from the base, in nats a token. `dip inside` is the worst fall "
        "of the older nights' accuracy at any moment of an update (not looked at in `full`, which "
        "serves its predecessor meanwhile, and in `joint`). A night's CPU seconds are those of "
        "`agentpref.update`; `a third from` is the night from which a night costs at most a third "
        "of joint training, by the straight line through the nights of both. Recovery is of the "
        "means over all lives. In brackets: 95 % intervals of the mean over seeds and orders (t).",
        "## Promises",
        _promises(promises),
    ]
    for key in lives:
        parts += [f"## {key[1]}, {key[0]}", _stream_table(lives[key]), _seed_table(lives[key])]
    if found := slopes(lives):
        lines = (f"- {name}: R² {value:.2f} over {count} lives" for name, value, count in found)
        parts += ["## Forgetting on KL, over all arms and seeds", "\n".join(lines)]
    parts += [f"![{plot.stem}]({plot.parent.name}/{plot.name})" for plot in plots]
    return "\n\n".join(parts) + "\n"


def _promises(found: Sequence[Target]) -> str:
    if not found:
        return "None can be told from these rows."
    lines = (
        f"| {target.name} | {target.value:.3f} | {target.target} | "
        f"{'holds' if target.holds else '**fails**'} |"
        for target in found
    )
    return "\n".join(["| promise | measured | target | |", "|---|---|---|---|", *lines])


def _stream_table(arms: Mapping[str, Mapping[Place, Lived]]) -> str:
    titles = [
        "arm",
        "lives",
        *(column.title for column in COLUMNS),
        "recovery",
        "CPU ÷ joint, last",
        "a third from",
    ]
    lines = [_line(titles), _line(["---"] * len(titles))]
    for arm, lives in arms.items():
        cells = [column_cell(column, lives.values()) for column in COLUMNS]
        closed, night = recovered(arms, arm), a_third_from(arms, arm)
        rest = [
            "–" if closed is None else f"{closed:.2f}",
            with_interval([*ratios(arms, arm).values()], "{:.2f}"),
            "–" if night is None else str(night),
        ]
        lines.append(_line([f"`{arm}`", str(len(lives)), *cells, *rest]))
    return "\n".join(lines)


def _seed_table(arms: Mapping[str, Mapping[Place, Lived]]) -> str:
    """ACC and F of every life, so that nothing hides in a mean."""
    places = sorted({place for lives in arms.values() for place in lives})
    titles = ["ACC / F by seed", *(f"{seed} {order}" for seed, order in places)]
    lines = [_line(titles), _line(["---"] * len(titles))]
    for arm, lives in arms.items():
        cells = [
            f"{lives[place].ranking.acc:.3f} / {lives[place].ranking.forgetting:+.3f}"
            if place in lives
            else ""
            for place in places
        ]
        lines.append(_line([f"`{arm}`", *cells]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def column_cell(column: Column, lives: Iterable[Lived]) -> str:
    """A column's mean over lives with its interval."""
    return with_interval([column.value(life) for life in lives], column.form)


def with_interval(values: Sequence[float | None], form: str) -> str:
    """A mean with its 95 % interval by Student's t; without one where there is a single value."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "–"
    mean = form.format(statistics.fmean(known))
    if len(known) == 1:
        return mean
    half = half_width(known)
    return f"{mean} [{form.format(statistics.fmean(known) - half)}, " + (
        f"{form.format(statistics.fmean(known) + half)}]"
    )


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean."""
    from scipy.stats import t

    spread = statistics.stdev(values) / math.sqrt(len(values))
    return float(t.ppf(0.975, len(values) - 1)) * spread


def recovered(arms: Mapping[str, Mapping[Place, Lived]], arm: str) -> float | None:
    """Recovery of an arm between naive and joint, by the mean ACC of the lives that all three have.

    A ratio of means: where naive hardly forgets, the gap of a single life is mostly chance.
    """
    three = [arms.get(name, {}) for name in (arm, "naive", "joint")]
    places = set.intersection(*map(set, three))
    if not places:
        return None
    return recovery(*(statistics.fmean(lives[p].ranking.acc for p in places) for lives in three))


def ratios(arms: Mapping[str, Mapping[Place, Lived]], arm: str) -> dict[Place, float]:
    """The last night's processor seconds by those of the joint arm in the same night."""
    joint = arms.get("joint", {})
    found = {}
    for place in arms[arm].keys() & joint.keys():
        own, other = arms[arm][place].cpu, joint[place].cpu
        if len(own) == len(other) and other[-1]:
            found[place] = own[-1] / other[-1]
    return found


def a_third_from(arms: Mapping[str, Mapping[Place, Lived]], arm: str) -> int | None:
    """The first night whose processor time is at most a third of joint training's, extrapolated.

    ``None`` where the arm's cost grows as fast as a third of joint training's.
    """
    joint = arms.get("joint", {})
    places = [place for place in arms[arm] if place in joint]
    fits = []
    for lives in (arms[arm], joint):
        points = [
            (number, spent)
            for place in places
            # The first night replays nothing.
            for number, spent in enumerate(lives[place].cpu[1:], 2)
        ]
        if len({number for number, _ in points}) < 2:
            return None
        fits.append(statistics.linear_regression(*zip(*points, strict=True)))
    own, other = fits
    slope, ahead = other.slope / 3 - own.slope, own.intercept - other.intercept / 3
    return max(1, math.ceil(ahead / slope)) if slope > 0 else None


def slopes(lives: Lives) -> list[tuple[str, float, int]]:
    """R² of forgetting on KL, across the arms and seeds of each stream and of each model."""
    found = []
    groups: dict[str, list[Lived]] = {}
    for (model, stream), arms in lives.items():
        own = [life for lived in arms.values() for life in lived.values() if len(life.rows) > 2]
        groups[f"{stream}, {model}"] = own
        groups.setdefault(f"all streams, {model}", []).extend(own)
    for name, own in groups.items():
        points = [(life.last["kl"], life.ranking.forgetting) for life in own]
        if (
            len(points) > 2
            and len({kl for kl, _ in points}) > 1
            and len({f for _, f in points}) > 1
        ):
            found.append(
                (name, statistics.correlation(*zip(*points, strict=True)) ** 2, len(points))
            )
    return found


def diagonal(matrix: RMatrix) -> float:
    """The mean of R[i, i]: how well each night was learned, right after it."""
    return statistics.fmean(matrix.rows[j + 1][j] for j in range(len(matrix.strata)))


def figures(rows: Sequence[Row]) -> dict[str, object]:
    """Means by stream and arm, for the last line of the output."""
    found: dict[str, object] = {}
    for (model, stream), arms in lives_of(rows).items():
        found[f"{stream}, {model}"] = {
            arm: {
                column.title: round(statistics.fmean(values), 4)
                for column in COLUMNS
                if (values := [v for v in map(column.value, lives.values()) if v is not None])
            }
            | {"lives": len(lives)}
            for arm, lives in arms.items()
        }
    return found
