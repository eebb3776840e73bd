"""`verify`: checks that a home holds what was recorded in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentpref_cli import options
from agentpref_cli.options import reading
from agentpref_cli.terminal import BAD, GOOD, WARN, print_result, progress, say, table

if TYPE_CHECKING:
    from agentpref.record.integrity import Findings, Problem


def verify(
    home: options.Home = None,
    sample: Annotated[
        bool,
        typer.Option("--sample", help="Check a random part, in seconds."),
    ] = False,
    rows: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rows of each table to sample.")
    ] = 1000,
    as_json: options.AsJson = False,
) -> None:
    """Check all messages, rows and adapters.

    Hashes every message and adapter again, tests the columns of every run and judgement, follows
    every reference, and reads the spill. Exits 1 if anything differs from what was recorded.
    Repairs nothing. A sample checks the adapters that serve, and prints how many rows of each table
    it checked.
    """
    from agentpref.record.integrity import examine

    with reading(home) as connection, progress(as_json) as report:
        found = examine(connection, sample=rows if sample else None, progress=report)
    problems = [*found.problems, *_changed_revisions(home, serving_only=sample)]
    value = {
        "problems": [problem._asdict() for problem in problems],
        "looked_at": {name: looked._asdict() for name, looked in found.looked_at.items()},
        "waiting": found.waiting,
        "torn": found.torn,
    }
    print_result(as_json, value, lambda: _show(found, problems, sample))
    raise typer.Exit(1 if problems else 0)


def _changed_revisions(folder: Path | None, *, serving_only: bool) -> Iterator[Problem]:
    """Find the revisions of all namespaces whose files differ from what was published."""
    from agentpref.errors import RevisionError
    from agentpref.home import Home
    from agentpref.record.integrity import Problem
    from agentpref.serve.registry import Registry, namespaces_with_revisions
    from agentpref.serve.validate import check_published

    home = Home.open(folder)
    for name in namespaces_with_revisions(home):
        registry = Registry(home, namespace=name)
        serving = (registry.state().live, registry.state().canary)
        for revision in registry.list():
            is_checked = revision.revision_id in serving or not serving_only
            try:
                if is_checked and revision.pruned_at is None:
                    check_published(revision)
            except RevisionError as error:
                yield Problem("revision", revision.revision_id, str(error))


def _show(found: Findings, problems: list[Problem], sampled: bool) -> None:
    if sampled:
        looked_at = [(name, looked.rows, looked.of) for name, looked in found.looked_at.items()]
        table(("table", "checked", "of about"), looked_at)
    if found.waiting:
        entries = "1 entry waits" if found.waiting == 1 else f"{found.waiting} entries wait"
        say(f"{entries} in the spill until the next log writes to this home", WARN)
    if found.torn:
        lines = "1 line was" if found.torn == 1 else f"{found.torn} lines were"
        say(f"{lines} cut off in the spill by a crash, before being acknowledged", WARN)
    if problems:
        table(("table", "key", "what"), problems)
        say(f"problems: {len(problems)}; restore these rows from a backup", BAD)
    else:
        say(f"{'the sampled part' if sampled else 'everything'} is as it was recorded", GOOD)
