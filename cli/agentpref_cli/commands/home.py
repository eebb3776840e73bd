"""`init`, `stats` and `verify`: make a home, count what is in it, and check it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.opening import reading
from agentpref_cli.terminal import BAD, GOOD, answer, moment, say, table

if TYPE_CHECKING:
    from agentpref.serve.backend import Revision


def init(home: options.Home = None, as_json: options.AsJson = False) -> None:
    """Make a home folder; one that exists stays as it is."""
    from agentpref.record.database import connect
    from agentpref.record.home import Home

    existed = Home(Home.resolve(home)).database.exists()
    created = Home.create(home)
    connect(created).close()
    answer(
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
    answer(as_json, counts, lambda: _show_counts(counts))


def verify(home: options.Home = None, as_json: options.AsJson = False) -> None:
    """Check all messages, rows and adapters.

    Hashes what has a hash, follows every reference, and exits 1 where anything is not what was
    recorded. Nothing is repaired.
    """
    from agentpref.record.store import Store

    with reading(home) as connection:
        problems = [problem._asdict() for problem in Store(connection).verify()]
    problems += _spoilt_revisions(home)
    answer(as_json, {"problems": problems}, lambda: _show_problems(problems))
    raise typer.Exit(1 if problems else 0)


def _spoilt_revisions(folder: Path | None) -> Iterator[dict[str, str]]:
    """Find the revisions, of whichever namespace, whose files are not those that were published."""
    from agentpref.record.home import Home
    from agentpref.serve.registry import Registry, namespaces_with_revisions

    home = Home.open(folder)
    for name in namespaces_with_revisions(home):
        for revision in Registry(home, namespace=name).list():
            if what := _spoilt(revision):
                yield {"table": "revision", "key": revision.revision_id, "what": what}


def _spoilt(revision: Revision) -> str | None:
    from agentpref.errors import RevisionError
    from agentpref.serve.validate import check_published

    try:
        check_published(revision)
    except RevisionError as error:
        return str(error)
    return None


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


def _show_problems(problems: Sequence[Mapping[str, str]]) -> None:
    if not problems:
        say("all that is recorded is as it was written", GOOD)
        return
    table(("table", "key", "what"), [tuple(problem.values()) for problem in problems])
    say(f"problems: {len(problems)}; restore what they name from a backup", BAD)
