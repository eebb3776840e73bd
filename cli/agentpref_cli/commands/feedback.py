"""`retract`: takes back what somebody said of a run."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from agentpref.types import Source
from agentpref_cli import options
from agentpref_cli.terminal import GOOD, WARN, print_result, say

if TYPE_CHECKING:
    from agentpref.prefer.retractions import Standing


def retract(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="The run that was judged.")],
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
    before = _standing(home, run_id)
    with Log(home) as log:
        taken = log.retract(
            run_id, None if everything else key, against=against, source=source, user_id=user_id
        )
    after = _standing(home, run_id)
    count = _count(before) - _count(after)
    said = [row.key if row.correction is None else "correction" for row in after.feedback]
    counts = Counter([*said, *("comparison" for _ in after.comparisons)])
    value = {"run": run_id, "retraction": taken, "retracted": count, "left": dict(counts)}
    print_result(as_json, value, lambda: _show(count, counts))


def _standing(home: options.Home, run_id: str) -> Standing:
    """What counts of what was said of a run."""
    from agentpref.prefer.retractions import withdraw
    from agentpref.record.store import Store

    with options.reading(home) as connection:
        store = Store(connection)
        store.run(run_id)  # raises UnknownRun
        return withdraw(*store.judgements(run_id))


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
