"""The charts of the page, drawn by matplotlib as SVG that takes the page's colours.

Each colour below stands for one of the page's, so that a chart is right in the dark, too. Text
stays text. Figures are as wide as a phone is, in points, and grow with the page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from agentpref.printable import escaped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 5.0
_INK, _MUTED, _BEFORE, _AFTER, _BAD = "#010101", "#020202", "#030303", "#040404", "#050505"
_COLOURS = {_INK: "ink", _MUTED: "muted", _BEFORE: "before", _AFTER: "after", _BAD: "bad"}
_STYLE: Any = {  # matplotlib's type names every key that there is
    "svg.fonttype": "none",  # text, which a reader can select and hear
    "svg.hashsalt": "agentpref",  # the same page of the same home
    "text.parse_math": False,  # a tag may be called $x$
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_MOST_TAGS = 12
_LONGEST = 30
_COIN = 0.5


def bars(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Accuracy before and after by tag, with intervals; ``None`` if there is nothing to draw."""
    shown = rows[:_MOST_TAGS]
    if not shown:
        return None
    with _figure(0.9 + 0.72 * len(shown)) as (figure, axes):
        for place, row in enumerate(shown):
            label = f"{_cut(row['tag'])} ({row['pairs']})"
            axes.text(0, place - 0.34, label, va="bottom", fontsize=10)
            for when, offset, colour in (("before", -0.15, _BEFORE), ("after", 0.15, _AFTER)):
                one = row[when]
                name = when if place == 0 else None
                axes.barh(place + offset, one["share"], 0.26, color=colour, label=name)
                if one["low"] is not None:
                    ends = (one["low"], one["high"])
                    axes.plot(
                        ends, (place + offset,) * 2, color=_INK, linewidth=1.2, marker="|", ms=5
                    )
        axes.axvline(_COIN, color=_MUTED, linewidth=1, linestyle=(0, (3, 3)))
        axes.set(xlim=(0, 1), ylim=(len(shown) - 0.5, -0.75), yticks=[], xlabel="held-out accuracy")
        axes.spines["left"].set_visible(False)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
        told = (
            f"{row['tag']}: {row['before']['share']:.2f} before, {row['after']['share']:.2f} "
            f"after, on {row['pairs']} pairs"
            for row in shown
        )
        return _svg(figure, "bars", "Held-out accuracy before and after, by tag", "; ".join(told))


def heat(history: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Accuracy by tag and revision; ``None`` with fewer than two revisions."""
    shown = [row for row in history if row["revision"]]
    if len(shown) < 2:
        return None
    pairs: dict[str, float] = {}
    for row in shown:
        for tag, found in row["accuracy"].items():
            pairs[tag] = pairs.get(tag, 0) + found["pairs"]
    tags = sorted(pairs, key=lambda tag: (-pairs[tag], tag))[:_MOST_TAGS]
    with _figure(0.9 + 0.42 * len(tags)) as (figure, axes):
        from matplotlib.patches import Rectangle

        for column, row in enumerate(shown):
            for line, tag in enumerate(tags):
                if tag not in row["accuracy"]:
                    continue
                share = row["accuracy"][tag]["after"]
                colour = _AFTER if share >= _COIN else _BAD
                strength = min(1.0, 2 * abs(share - _COIN)) * 0.75
                corner = (column - 0.5, line - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, alpha=strength, lw=0))
                if len(shown) <= 12:
                    text = f"{share:.2f}".removeprefix("0")
                    axes.text(column, line, text, ha="center", va="center", fontsize=9)
        every = max(1, len(shown) // 12)
        axes.set(
            xlim=(-0.5, len(shown) - 0.5),
            ylim=(len(tags) - 0.5, -0.5),
            xlabel="revision",
            yticks=range(len(tags)),
            xticks=range(0, len(shown), every),
        )
        axes.set_yticklabels([_cut(tag, 18) for tag in tags])
        axes.set_xticklabels([_figure_of(row["revision"]) for row in shown[::every]])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        told = f"{len(tags)} tags by {len(shown)} revisions; the table below has the numbers"
        return _svg(figure, "heat", "Accuracy by tag after each revision", told)


def divergence(history: Sequence[Mapping[str, Any]]) -> Markup | None:
    """KL from the base over the updates, and the budget; ``None`` if it was never measured."""
    shown = [row for row in history if row["kl"] is not None]
    if not shown:
        return None
    with _figure(2.3) as (figure, axes):
        places = range(len(shown))
        kept = [place for place in places if shown[place]["revision"]]
        refused = [place for place in places if not shown[place]["revision"]]
        kls = [row["kl"] for row in shown]
        axes.plot(kept, [kls[place] for place in kept], color=_AFTER, marker="o", label="published")
        if refused:
            axes.plot(
                refused, [kls[place] for place in refused], color=_BAD, marker="x", linestyle="",
                label="not published",
            )  # fmt: skip
        budgets = [row["kl_budget"] for row in shown]
        if all(budget is not None for budget in budgets):
            axes.step(
                [-0.4, *places, len(shown) - 0.6],
                [budgets[0], *budgets, budgets[-1]],
                where="mid",
                color=_MUTED,
                linestyle=(0, (3, 3)),
                label="budget",
            )
        every = max(1, len(shown) // 10)
        axes.set(
            ylim=(0, None),
            xlim=(-0.5, len(shown) - 0.5),
            ylabel="nats per token",
            xticks=places[::every],
        )
        axes.set_xticklabels(
            [_figure_of(row["revision"]) if row["revision"] else "–" for row in shown[::every]]
        )
        axes.set_xlabel("update, by its revision")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
        last = shown[-1]
        told = f"{last['kl']:.3f} after the last of {len(shown)} updates"
        return _svg(figure, "kl", "KL from the base model over the updates", told)


@contextmanager
def _figure(height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of a height in inches, with one pair of axes, in the page's style."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's reader has other fonts
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """The figure as an SVG element with ids of its own, the page's colours, and words."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    opening = re.match(r"<svg[^>]*>", text)
    assert opening is not None
    box = re.search(r'viewBox="[^"]*"', opening[0])
    assert box is not None
    words = f'<title id="{name}-title">{escape(escaped(title))}</title>'
    words += f'<desc id="{name}-desc">{escape(escaped(description))}</desc>'
    labelled = f'role="img" aria-labelledby="{name}-title {name}-desc"'
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return Markup(f"<svg {namespaces} {box[0]} {labelled}>{words}{text[opening.end() :]}")


def _cut(text: str, most: int = _LONGEST) -> str:
    """A text that fits, on one line."""
    text = escaped(" ".join(text.split()))
    return text if len(text) <= most else text[: most - 1] + "…"


def _figure_of(revision: str) -> str:
    """The number of a revision: ``3`` for ``rev-000003-…``."""
    number = revision.split("-")[1] if revision.count("-") > 1 else revision
    return number.lstrip("0") or number
