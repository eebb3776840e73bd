"""Draws how far a reward model can be followed: proxy and gold over the distance from the base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from agentpref.errors import ConfigError, MissingDependency
from agentpref.home import replacing

if TYPE_CHECKING:
    from agentpref.evaluation.frontier import Frontier

KINDS = (".svg", ".png", ".pdf")


def require_plots(path: Path) -> None:
    """Say what is missing before the work begins.

    Raises:
        ConfigError: the file's kind is not one of :data:`KINDS`, or its folder is not there.
        MissingDependency: matplotlib is not installed.
    """
    if path.suffix.lower() not in KINDS:
        raise ConfigError(f"--plot is {str(path)!r}, but must end in {', '.join(KINDS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot is {str(path)!r}, but its folder is not there")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependency(
            "--plot needs matplotlib; install it with `pip install 'agentpref[report]'`"
        ) from error


def draw(found: Frontier, path: Path) -> None:
    """Draw a frontier into a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    curve = [one for one in found.points if one.n is not None]
    gold = "cross-fitted" if found.gold == "cross-fitted" else f"by {found.gold}"
    for name, marker, label in (("proxy", "o", "proxy"), ("gold", "s", f"gold, {gold}")):
        values = [getattr(one, name) for one in curve]
        (line,) = axes.plot([one.kl for one in curve], values, marker=marker, label=label)
        for one in found.points:
            if one.n is None:
                axes.plot(one.kl, getattr(one, name), marker="*", ms=12, color=line.get_color())
    for one in found.points:
        text = str(one.n) if one.n is not None else one.policy.rpartition("-")[0]
        axes.annotate(text, (one.kl, one.gold), xytext=(3, -12), textcoords="offset points")
    axes.axhline(0.5, color="grey", linewidth=1, linestyle=":")
    axes.set(
        xlabel="KL from the base, nats per answer",
        ylabel="better than one answer of the base",
        title=f"{found.reward}, by n",
    )
    axes.legend(loc="lower right")
    with replacing(path) as draft:
        figure.savefig(draft, format=path.suffix.lower().removeprefix("."))
