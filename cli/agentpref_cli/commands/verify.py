"""`verify`: whether what a home holds is what was recorded in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.options import reading
from agentpref_cli.terminal import BAD, GOOD, WARN, print_result, progress, say, table

if TYPE_CHECKING:
    from agentpref.record.integrity import Findings
    from agentpref.serve.backend import Revision
    from agentpref.serve.registry import Registry


def verify(
    home: options.Home = None,
    sample: Annotated[
        bool,
        typer.Option("--sample", help="Look at a random part, in seconds."),
    ] = False,
    rows: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rows of each table to sample.")
    ] = 1000,
    as_json: options.AsJson = False,
) -> None:
    """Check all messages, rows and adapters.

    Hashes what has a hash, follows every reference, reads what waits in the spill, and exits 1
    where anything is not what was recorded. Nothing is repaired. A sample looks at the adapters
    that serve, and says how many rows of each table it looked at.
    """
    from agentpref.record.integrity import examine

    with reading(home) as connection, progress(as_json) as report:
        found = examine(connection, sample=rows if sample else None, progress=report)
    problems = [problem._asdict() for problem in found.problems]
    problems += _spoilt_revisions(home, serving_only=sample)
    value = {
        "problems": problems,
        "looked_at": {name: looked._asdict() for name, looked in found.looked_at.items()},
        "waiting": found.waiting,
        "torn": found.torn,
    }
    print_result(as_json, value, lambda: _show(found, problems, sample))
    raise typer.Exit(1 if problems else 0)


def _spoilt_revisions(folder: Path | None, *, serving_only: bool) -> Iterator[dict[str, str]]:
    """Find the revisions, of whichever namespace, whose files are not those that were published."""
    from agentpref.home import Home
    from agentpref.serve.registry import Registry, namespaces_with_revisions

    home = Home.open(folder)
    for name in namespaces_with_revisions(home):
        registry = Registry(home, namespace=name)
        for revision in _serving(registry) if serving_only else _kept(registry):
            if what := _spoilt(revision):
                yield {"table": "revision", "key": revision.revision_id, "what": what}


def _kept(registry: Registry) -> list[Revision]:
    return [one for one in registry.list() if one.pruned_at is None]


def _serving(registry: Registry) -> list[Revision]:
    state = registry.state()
    return [one for one in registry.list() if one.revision_id in (state.live, state.canary)]


def _spoilt(revision: Revision) -> str | None:
    from agentpref.errors import RevisionError
    from agentpref.serve.validate import check_published

    try:
        check_published(revision)
    except RevisionError as error:
        return str(error)
    return None


def _show(found: Findings, problems: list[dict[str, Any]], sampled: bool) -> None:
    if sampled:
        looked_at = [(name, looked.rows, looked.of) for name, looked in found.looked_at.items()]
        table(("table", "looked at", "of about"), looked_at)
    _show_spill(found)
    _show_problems(problems, "was looked at" if sampled else "is recorded")


def _show_spill(found: Findings) -> None:
    if found.waiting:
        entries = "1 entry waits" if found.waiting == 1 else f"{found.waiting} entries wait"
        say(f"{entries} in the spill for the next log that writes to this home", WARN)
    if found.torn:
        lines = "1 line" if found.torn == 1 else f"{found.torn} lines"
        say(f"{lines} of the spill cut off by a crash, before being acknowledged", WARN)


def _show_problems(problems: list[dict[str, Any]], what: str) -> None:
    if not problems:
        say(f"all that {what} is as it was written", GOOD)
        return
    table(("table", "key", "what"), [tuple(problem.values()) for problem in problems])
    say(f"problems: {len(problems)}; restore what they name from a backup", BAD)
