"""`forget`: removes what a user said, or old runs, and prints the commands that rebuild."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.terminal import GOOD, WARN, cell, confirm, print_result, progress, say


def forget(
    user_id: Annotated[
        str | None,
        typer.Option("--user-id", metavar="ID", help="The user, by the id that your app logs."),
    ] = None,
    unnamed: Annotated[
        bool,
        typer.Option("--unnamed", help="All who were logged while the home's user.keys was lost."),
    ] = False,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="AGE", help="Runs of this age, e.g. 90d (s m h d w)."),
    ] = None,
    home: options.Home = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --older-than: even if the clock looks wrong.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Remove what a user said, or old runs.

    Removes runs, everything that was said of them, and their text from every page of the disk. With
    --user-id or --unnamed, it also marks the revisions that were trained on it, and prints the
    commands that rebuild. If it is interrupted, the same command completes it. Exits 0 when it is
    done.
    """
    from dataclasses import asdict

    from agentpref.home import Home
    from agentpref.record.deletion.forget import forget as forget_user
    from agentpref.record.deletion.forget import forget_unnamed
    from agentpref.record.deletion.removal import expire

    if [user_id is not None, unnamed, older_than is not None].count(True) != 1:
        raise typer.BadParameter(
            "give exactly one of them", param_hint="--user-id, --unnamed, --older-than"
        )
    if force and older_than is None:
        raise typer.BadParameter("needs --older-than", param_hint="--force")
    if older_than is None:
        who = "everybody without a name" if unnamed else f"user {user_id!r}"
        age, what = 0.0, f"everything that {who} said"
    else:
        age, what = options.parse_age(older_than, "--older-than"), f"all older than {older_than}"
    place = Home.open(home)
    confirm(f"Remove {what} from {place.path}, for good?", yes)
    with progress(as_json) as report:
        if unnamed:
            value = forget_unnamed(place, progress=report).to_mapping()
        elif user_id is not None:
            value = forget_user(place, user_id, progress=report).to_mapping()
        else:
            value = asdict(expire(place, older_than=age, force=force, progress=report))
    print_result(as_json, value, lambda: _show(value))


def _show(removed: Mapping[str, Any]) -> None:
    counted = ("runs", "feedback", "comparisons", "messages")
    say("removed: " + ", ".join(f"{name} {removed[name]}" for name in counted), GOOD)
    if removed["shared"]:
        say(f"messages that stay, because other runs contain them: {removed['shared']}")
    if removed.get("revisions"):
        say(f"tainted, because they were trained on it: {', '.join(removed['revisions'])}", WARN)
    show_rebuild(removed)


def show_rebuild(removed: Mapping[str, Any]) -> None:
    """Print the commands that rebuild each namespace that a tainted revision serves."""
    for rebuild in removed.get("rebuild", ()):
        served = ", ".join(rebuild["tainted"])
        say(f"{cell(rebuild['namespace'])} is served by {served}; to rebuild:", WARN)
        for command in rebuild["commands"]:
            print(f"  {command}")  # in one piece, to be copied
