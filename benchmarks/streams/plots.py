"""The plots of all rows, as SVG: accuracy over nights, forgetting against KL, R as heat maps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.streams.rows import Row
from benchmarks.streams.table import Lived, Lives, Place, half_width, lives_of

_HEATED = ("naive", "full-ungated", "full", "joint")
_COLORS = [mpl.colormaps["tab20"](number) for number in range(20)]


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write all plots into a folder of their own in ``out``; return their files."""
    lives = lives_of(rows)
    folder = out / "streams"
    folder.mkdir(parents=True, exist_ok=True)
    models = list(dict.fromkeys(model for model, _ in lives))
    files = []
    for number, model in enumerate(models):
        suffix = f"-{number}" if number else ""
        own = {key: arms for key, arms in lives.items() if key[0] == model}
        drawn = {"accuracy": _accuracy(own), "forgetting": _forgetting(own), "matrices": _heat(own)}
        for name, figure in drawn.items():
            figure.suptitle(model, fontsize=8)
            files.append(_saved(figure, folder / f"{name}{suffix}.svg"))
    return files


def _saved(figure: Figure, file: Path) -> Path:
    """Without the time and with a fixed salt, so that equal plots are equal files."""
    with mpl.rc_context({"svg.hashsalt": "streams", "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None})
    return file


def _accuracy(lives: Lives) -> Figure:
    """Mean accuracy on the nights so far, above by ranking and below by what is written."""
    figure = Figure(figsize=(3.2 * len(lives) + 1.5, 5.2), layout="constrained")
    axes = figure.subplots(2, len(lives), squeeze=False, sharex="col")
    handles: dict[str, Any] = {}
    for column, ((_, stream), arms) in enumerate(lives.items()):
        for row, name in enumerate(("ranking", "behaviour")):
            axis = axes[row][column]
            for arm, own in arms.items():
                handles[arm] = _line(axis, arm, own, name)
            axis.set_title(stream if row == 0 else "", fontsize=9)
            axis.set_xlabel("night" if row else "")
            axis.set_ylabel(("ranking", "written")[row] if column == 0 else "")
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    return figure


def _line(axis: Any, arm: str, lives: Mapping[Place, Lived], name: str) -> Any:
    shortest = min(len(life.rows) for life in lives.values())
    nights = range(1, shortest)
    means = [[statistics.fmean(life.rows[n][name][:n]) for life in lives.values()] for n in nights]
    middle = [statistics.fmean(values) for values in means]
    (line,) = axis.plot(nights, middle, marker="o", markersize=3, color=_color(arm))
    if len(lives) > 1:
        half = [half_width(values) for values in means]
        low, high = ([m + sign * h for m, h in zip(middle, half, strict=True)] for sign in (-1, 1))
        axis.fill_between(nights, low, high, alpha=0.12, color=_color(arm), linewidth=0)
    axis.set_xticks(list(nights))
    return line


def _color(arm: str) -> Any:
    from benchmarks.streams.arms import ARMS

    return _COLORS[list(ARMS).index(arm)]


def _forgetting(lives: Lives) -> Figure:
    """Every life as a point: KL from the base after the last night, and what was forgotten."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    points: dict[str, tuple[list[float], list[float]]] = {}
    for arms in lives.values():
        for arm, own in arms.items():
            kls, lost = points.setdefault(arm, ([], []))
            kls += [life.last["kl"] for life in own.values()]
            lost += [life.ranking.forgetting for life in own.values()]
    for arm, (kls, lost) in points.items():
        axis.scatter(kls, lost, s=14, color=_color(arm), label=arm)
    axis.set_xlabel("KL from the base, nats a token")
    axis.set_ylabel("forgetting F")
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def _heat(lives: Lives) -> Figure:
    """R on the ranking, a mean over seeds, for some arms in each stream (forward order)."""
    chosen = [arm for arm in _HEATED if any(arm in arms for arms in lives.values())]
    rows, columns = len(lives), max(1, len(chosen))
    figure = Figure(figsize=(2.6 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for line, ((_, stream), arms) in zip(axes, lives.items(), strict=True):
        for axis, arm in zip(line, chosen, strict=False):
            own = [life for (_, order), life in arms.get(arm, {}).items() if order == "forward"]
            axis.set_axis_off()
            if not own:
                continue
            axis.set_axis_on()
            _one_heat(axis, own)
            axis.set_title(f"{stream}, {arm}", fontsize=8)
    return figure


def _one_heat(axis: Any, lives: Sequence[Lived]) -> None:
    shortest = min((life.ranking for life in lives), key=lambda matrix: len(matrix.strata))
    size = len(shortest.strata)
    values = [
        [statistics.fmean(life.ranking.rows[i][j] for life in lives) for j in range(size)]
        for i in range(size + 1)
    ]
    axis.imshow(values, vmin=0.4, vmax=1.0, cmap="viridis")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axis.text(
                j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=6, color="w"
            )
    axis.set_xticks(range(size), [str(j + 1) for j in range(size)], fontsize=6)
    axis.set_yticks(range(size + 1), ["base", *(str(i + 1) for i in range(size))], fontsize=6)
