"""`thumbs` and `retract`: say what was thought of a run, and take it back."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agentpref.types import Source
from agentpref_cli import options
from agentpref_cli.terminal import GOOD, WARN, print_result, say

if TYPE_CHECKING:
    from agentpref.prefer.retractions import Standing

_RUN = "The run, by its id or a beginning of it that is its own."


def thumbs(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help=_RUN)],
    direction: Annotated[
        Literal["up", "down"], typer.Argument(metavar="up|down", help="Liked, or disliked.")
    ],
    comment: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Why, in your own words.", show_default=False),
    ] = None,
    user_id: Annotated[
        str | None,
        typer.Option(
            "--user-id",
            metavar="ID",
            help="Who it was [default: nobody named].",
            show_default=False,
        ),
    ] = None,
    source: Annotated[Source, typer.Option(help="Who judged.")] = "human",
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Give a run a thumbs up or down.

    A voter's newest thumb counts; retract takes it back.
    """
    from agentpref.record.log import Log

    run = _found(home, run_id)
    with Log(home) as log:
        said = log.thumbs(run, direction == "up", comment, source, user_id)
    value = {"run": run, "feedback": said, "up": direction == "up"}
    print_result(as_json, value, lambda: say(f"thumbs {direction} on run {run}", GOOD))


def retract(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help=_RUN)],
    key: Annotated[
        str,
        typer.Option(metavar="KEY", help="What to take back: a key, correction, or comparison."),
    ] = "thumbs",
    everything: Annotated[
        bool, typer.Option("--all", help="Take back everything that the voter said of the run.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Only the comparison with this run.", show_default=False),
    ] = None,
    user_id: Annotated[
        str | None,
        typer.Option(
            "--user-id",
            metavar="ID",
            help="Who said it [default: nobody was named].",
            show_default=False,
        ),
    ] = None,
    source: Annotated[Source, typer.Option(help="Who judged.")] = "human",
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Take back what somebody said of a run; updates train on it no more.

    The rows stay as history, and a revision that was trained on them stays as it is. To delete
    them, use forget.
    """
    from agentpref.record.log import Log

    if against is not None and not everything and key == "thumbs":
        key = "comparison"
    run = _found(home, run_id)
    other = None if against is None else _found(home, against)
    before = _standing(home, run)
    with Log(home) as log:
        taken = log.retract(
            run, None if everything else key, against=other, source=source, user_id=user_id
        )
    after = _standing(home, run)
    count = _count(before) - _count(after)
    said = [row.key if row.correction is None else "correction" for row in after.feedback]
    counts = Counter([*said, *("comparison" for _ in after.comparisons)])
    value = {"run": run, "retraction": taken, "retracted": count, "left": dict(counts)}
    print_result(as_json, value, lambda: _show(count, counts))


def _found(home: options.Home, name: str) -> str:
    """The id of a run that its user named."""
    from agentpref.record.finding import find_prefix

    with options.reading(home) as connection:
        return find_prefix(connection, name)


def _standing(home: options.Home, run_id: str) -> Standing:
    """What counts of what was said of a run."""
    from agentpref.prefer.retractions import withdraw
    from agentpref.record.store import Store

    with options.reading(home) as connection:
        return withdraw(*Store(connection).judgements(run_id))


def _count(standing: Standing) -> int:
    return len(standing.feedback) + len(standing.comparisons)


def _show(count: int, left: Counter[str]) -> None:
    if count:
        say(f"taken back: {count}", GOOD)
    else:
        say("this voter has said no such thing; check RUN, --key, --user-id and --source", WARN)
    if left:
        others = ", ".join(f"{key} {number}" for key, number in sorted(left.items()))
        say(f"said of this run and not taken back: {others}")
