"""`keys`: which keys of feedback are preferences, and on which scale their scores are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.terminal import GOOD, WARN, moment, print_result, say, table

if TYPE_CHECKING:
    from agentpref.record.declared import KeyUse

app = typer.Typer(
    help="Say which keys of feedback are preferences; thumbs always is.", no_args_is_help=True
)

_Key = Annotated[str, typer.Argument(metavar="KEY", help="The key of the scores.")]


@app.command("list")
def list_(
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """List the keys that have scores or were declared, by source."""
    from agentpref.record.declared import uses

    with options.reading(home, namespace) as connection:
        found = uses(connection, namespace)
    value = {"keys": [use._asdict() | {"declared": use.declared} for use in found]}
    print_result(as_json, value, lambda: _show(found))


@app.command("declare", short_help="Declare that scores under a key are preferences.")
def declare_(
    key: _Key,
    low: Annotated[float, typer.Option(metavar="SCORE", help="The lowest score.")] = 0,
    high: Annotated[float, typer.Option(metavar="SCORE", help="The highest score.")] = 1,
    replace: Annotated[
        bool, typer.Option("--replace", help="Give a declared key another scale, for new scores.")
    ] = False,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Declare that the scores under a key are preferences: liked above the middle of their scale.

    Scores that were given before count too.
    """
    from contextlib import closing

    from agentpref.home import Home
    from agentpref.record.database import connect, translated
    from agentpref.record.declared import declare

    place = Home.open(home)
    with translated(place), closing(connect(place)) as connection:
        declare(connection, namespace, key, (low, high), replace=replace)
    value: dict[str, Any] = {"namespace": namespace, "key": key, "low": low, "high": high}
    text = f"scores under {key} are preferences, from {low:g} to {high:g}"
    print_result(as_json, value, lambda: say(text, GOOD))


@app.command("undeclare", short_help="Take a declaration back; the scores are kept.")
def undeclare_(
    key: _Key,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Take a declaration back: the scores are kept, and train nothing any more."""
    from contextlib import closing

    from agentpref.home import Home
    from agentpref.record.database import connect, translated
    from agentpref.record.declared import undeclare

    place = Home.open(home)
    with translated(place), closing(connect(place)) as connection:
        was = undeclare(connection, namespace, key)
    value = {"namespace": namespace, "key": key, "was_declared": was}
    text = f"scores under {key} train nothing any more"
    print_result(
        as_json, value, lambda: say(text, GOOD) if was else say(f"{key} was not declared", WARN)
    )


def _show(found: Sequence[KeyUse]) -> None:
    if not found:
        return say("no key has a score, and none was declared")
    rows = [
        (
            use.key,
            use.source,
            use.scores,
            "preference" if use.declared else "measurement",
            "-" if use.low is None else f"{use.low:g} to {use.high:g}",
            moment(use.since),
        )
        for use in found
    ]
    return table(("key", "source", "scores", "counts as", "scale", "since"), rows)
