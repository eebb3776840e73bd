"""`backup` and `merge`: a copy of a home that is in use, and several homes united into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.terminal import BAD, GOOD, WARN, print_result, progress, say, table

if TYPE_CHECKING:
    from agentpref.record.transfer.backup import Backup


def backup(
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="Where to: a missing or an empty folder.")
    ],
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Copy a home, also while it is in use.

    The copy is a home too: database, adapters, and the keys of its users' names. It holds all that
    was acknowledged before the command began, and is there as a whole or not at all.
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

    A row that was changed since it was logged, or that no log would have written, is refused and
    named. Who was forgotten in one home is forgotten in this one. Revisions, and what serves, stay
    with the home that trained them. Done again, or after an interruption, it adds what is missing.
    """
    from agentpref.record.transfer.merge import merge

    with progress(as_json) as report:
        done = [merged.to_mapping() for merged in merge(home, others, progress=report)]
    print_result(as_json, {"merged": done}, lambda: _show_merge(done))


def _show_backup(done: Backup) -> None:
    revisions = "1 revision" if done.revisions == 1 else f"{done.revisions} revisions"
    say(f"copied {done.bytes / 1e6:,.1f} MB and {revisions} to {done.path}", GOOD)
    if done.missing:
        say(f"not in the home, so not in the copy: {', '.join(done.missing)}", WARN)


_KINDS = ("runs", "feedback", "comparisons")
_COUNTS = ("added", "known", "conflicts", "forgotten", "refused")


def _show_merge(done: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (Path(one["home"]).name, kind, *(one[kind][count] for count in _COUNTS))
        for one in done
        for kind in _KINDS
    ]
    table(("home", "rows", *_COUNTS), rows)
    for one in done:
        _show_forgotten(one)
    named = [
        (Path(one["home"]).name, *refusal.values()) for one in done for refusal in one["named"]
    ]
    if named:
        table(("home", "table", "key", "not let in"), named)
        count = sum(
            one[kind]["conflicts"] + one[kind]["refused"] for one in done for kind in _KINDS
        )
        say(f"rows not let in: {count}; look at those homes with `agentpref verify`", BAD)


def _show_forgotten(one: Mapping[str, Any]) -> None:
    if one["keys"]:
        say(
            f"{Path(one['home']).name} names its users under a key of its own; give hosts one "
            "user.keys, so that one user has one name",
            WARN,
        )
    if one["forgot"] is not None:
        removed = ", ".join(f"{kind} {one['forgot'][kind]}" for kind in _KINDS)
        say(f"forgotten there, so removed here: {removed}", WARN)
        for rebuild in one["forgot"]["rebuild"]:
            say(f"{rebuild['namespace']} is served by what saw it; to rebuild:", WARN)
            for command in rebuild["commands"]:
                print(f"  {command}")  # in one piece, to be copied
