"""`init` and `stats`: make a home, and count what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.options import reading
from agentpref_cli.terminal import GOOD, moment, print_result, say, table


def init(home: options.Home = None, as_json: options.AsJson = False) -> None:
    """Make a home folder; one that exists stays as it is."""
    from agentpref.home import Home
    from agentpref.record.database import connect

    existed = Home(Home.resolve(home)).database.exists()
    created = Home.create(home)
    connect(created).close()
    print_result(
        as_json,
        {"home": str(created.path), "existed": existed},
        lambda: say(f"{'already a home' if existed else 'made a home'}: {created.path}", GOOD),
    )


def stats(
    home: options.Home = None,
    namespace: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only this one [default: each].", show_default=False),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Count what was logged, by namespace."""
    from agentpref.record.store import Store

    with reading(home) as connection:
        store = Store(connection)
        names = store.namespaces() if namespace is None else [namespace]
        counts = {name: store.stats(name) for name in names}
    print_result(as_json, counts, lambda: _show_counts(counts))


def _show_counts(counts: Mapping[str, Mapping[str, Any]]) -> None:
    if not counts:
        say("nothing is logged yet")
        return
    names = ("runs", "threads", "users", "feedback", "corrections", "comparisons")
    rows = [
        (namespace, *(found[name] for name in names), moment(found["last_at"]))
        for namespace, found in counts.items()
    ]
    table(("namespace", *names, "last run"), rows)
