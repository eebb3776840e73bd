"""`backup` and `merge`: copies a home that is in use, and brings other homes into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.commands.forget import show_rebuild
from agentpref_cli.terminal import BAD, GOOD, WARN, print_result, progress, say, table

if TYPE_CHECKING:
    from agentpref.record.transfer.backup import Backup


def backup(
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="A missing or empty folder for the copy.")
    ],
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Copy a home, also while it is in use.

    The copy is a home too: database, adapters and user keys. It holds everything that was
    acknowledged before the command began. A backup that fails leaves no copy.
    """
    from agentpref.record.transfer.backup import backup

    with progress(as_json) as report:
        done = backup(home, target, progress=report)
    print_result(as_json, asdict(done), lambda: _show_backup(done))


def merge(
    others: Annotated[
        list[Path], typer.Argument(metavar="OTHER...", help="The homes to bring in.")
    ],
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Bring into a home what other homes logged, each row once.

    Copies and verifies each other home first; one that fails verification gives nothing. The other
    homes are not changed. A user who was forgotten in one of them is forgotten in this one.
    Revisions, and what serves, are not merged. After an interruption, run the same command again.
    """
    from agentpref.record.transfer.merge import merge

    with progress(as_json) as report:
        done = [merged.to_mapping() for merged in merge(home, others, progress=report)]
    print_result(as_json, {"merged": done}, lambda: _show_merge(done))


def _show_backup(done: Backup) -> None:
    revisions = "1 revision" if done.revisions == 1 else f"{done.revisions} revisions"
    say(f"copied {done.bytes / 1e6:,.1f} MB and {revisions} to {done.path}", GOOD)
    if done.missing:
        say(f"without a folder in the home, so not copied: {', '.join(done.missing)}", WARN)


_KINDS = ("runs", "feedback", "comparisons")
_COUNTS = ("added", "known", "conflicts", "forgotten")


def _show_merge(done: Sequence[Mapping[str, Any]]) -> None:
    names = [Path(one["home"]).name for one in done]
    rows = [
        (name, kind, *(one[kind][count] for count in _COUNTS))
        for name, one in zip(names, done, strict=True)
        for kind in _KINDS
    ]
    table(("home", "rows", *_COUNTS), rows)
    for name, one in zip(names, done, strict=True):
        _show_forgotten(name, one)
        if one["conflicts"]:
            rows = [(name, conflict["table"], conflict["key"]) for conflict in one["conflicts"]]
            table(("home", "table", "key"), rows)
            count = sum(one[kind]["conflicts"] for kind in _KINDS)
            say(f"rows in conflict: {count}; the row that was here first stays", BAD)


def _show_forgotten(name: str, one: Mapping[str, Any]) -> None:
    if one["keys"]:
        say(
            f"{name} hashes its users under another key; give all hosts the same user.keys, so "
            "that one user has one hash",
            WARN,
        )
    if one["forgot"] is not None:
        removed = ", ".join(f"{kind} {one['forgot'][kind]}" for kind in _KINDS)
        say(f"forgotten in {name}, so removed here: {removed}", WARN)
        show_rebuild(one["forgot"])
