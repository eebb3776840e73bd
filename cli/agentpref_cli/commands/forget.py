"""`forget`: remove what a user said, or what is old, and say what is still to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.terminal import GOOD, WARN, cell, confirm, print_result, progress, say

if TYPE_CHECKING:
    from agentpref.types import Progress


def forget(
    user_id: Annotated[
        str | None,
        typer.Option("--user-id", metavar="ID", help="Whom, by the id that your app logs."),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="AGE", help="Runs of this age, e.g. 90d (s m h d w)."),
    ] = None,
    home: options.Home = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="With --older-than: even if the clock looks wrong."),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Remove what a user said, or what is old.

    Removes runs, all that was said of them, and their text from every page of the disk. With
    --user-id, it also marks the revisions whose training saw it, and says how to rebuild. What was
    interrupted is finished by calling again. Exits 0 when it is done.
    """
    if (user_id is None) == (older_than is None):
        raise typer.BadParameter(
            "name one of them, and one only", param_hint="--user-id, --older-than"
        )
    if force and older_than is None:
        raise typer.BadParameter("goes with --older-than only", param_hint="--force")
    age = None if older_than is None else _seconds(older_than)
    what = (
        f"everything that user {user_id!r} said" if age is None else f"all older than {older_than}"
    )
    confirm(f"Remove {what} from {_folder(home)}, for good?", yes)
    with progress(as_json) as reporter:
        value = _removed(home, user_id, age, force, reporter)
    print_result(as_json, value, lambda: _show(value))


def _removed(
    home: Path | None,
    user_id: str | None,
    age: float | None,
    force: bool,
    reporter: Progress | None,
) -> dict[str, Any]:
    from dataclasses import asdict

    from agentpref.record.deletion.forget import forget as forget_user
    from agentpref.record.deletion.retention import expire

    if user_id is not None:
        return forget_user(home, user_id, progress=reporter).to_mapping()
    return asdict(expire(home, older_than=age or 0.0, force=force, progress=reporter))


def _folder(home: Path | None) -> Path:
    from agentpref.home import Home

    return Home.open(home).path


def _seconds(text: str) -> float:
    seconds = options.parse_age(text)
    if seconds is None:
        raise typer.BadParameter(
            f"{text!r} is no age; give a number and one of s, m, h, d, w, such as 90d",
            param_hint="--older-than",
        )
    return seconds


_COUNTED = ("runs", "feedback", "comparisons", "messages")


def _show(removed: Mapping[str, Any]) -> None:
    say("removed: " + ", ".join(f"{name} {removed[name]}" for name in _COUNTED), GOOD)
    if removed["shared"]:
        say(f"messages that other runs hold too, and that stay: {removed['shared']}")
    if removed.get("revisions"):
        say(f"tainted, their training having seen it: {', '.join(removed['revisions'])}", WARN)
    for rebuild in removed.get("rebuild", ()):
        served = ", ".join(rebuild["tainted"])
        say(f"{cell(rebuild['namespace'])} is served by {served}; to rebuild:", WARN)
        for command in rebuild["commands"]:
            print(f"  {command}")  # in one piece, to be copied
