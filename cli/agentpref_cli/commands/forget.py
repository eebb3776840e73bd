"""`forget`: removes what a user said, one run, or old runs, and says how to rebuild."""

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
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="ID", help="One run, with all that was said of it."),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="AGE", help="Runs of this age, e.g. 90d (s m h d w)."),
    ] = None,
    home: options.Home = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Remove nothing; say what would be removed.")
    ] = False,
    yes: options.Yes = False,
    missing_ok: Annotated[
        bool,
        typer.Option(
            "--missing-ok", help="With --user-id, --run: exit 0 if nothing of it is in the home."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --older-than: even if the clock looks wrong.")
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Remove what a user said, one run, or old runs.

    Removes runs, everything that was said of them, and their text from every page of the disk. With
    --user-id, --unnamed and --run, it also marks the revisions that were trained on it, and prints
    the commands that rebuild. If it is interrupted, the same command completes it.

    Exits 0 when it is done, 1 if the user or the run is not in the home, 75 while an update or
    another removal runs.
    """
    from dataclasses import asdict

    from agentpref.home import Home
    from agentpref.record.deletion.forget import forget as forget_user
    from agentpref.record.deletion.forget import forget_run, forget_unnamed
    from agentpref.record.deletion.removal import expire

    if [user_id is not None, unnamed, run is not None, older_than is not None].count(True) != 1:
        raise typer.BadParameter(
            "give exactly one of them", param_hint="--user-id, --unnamed, --run, --older-than"
        )
    if force and older_than is None:
        raise typer.BadParameter("needs --older-than", param_hint="--force")
    if missing_ok and older_than is not None:
        raise typer.BadParameter("needs --user-id or --run", param_hint="--missing-ok")
    age = 0.0 if older_than is None else options.parse_age(older_than, "--older-than")
    what = f"all older than {older_than}"
    if older_than is None:
        who = "everybody without a name" if unnamed else f"user {user_id!r}"
        what = f"run {run!r}" if run is not None else f"everything that {who} said"
    place = Home.open(home)
    if not dry_run:
        confirm(f"Remove {what} from {place.path}, for good?", yes)
    with progress(quiet) as report:
        how: Any = {"dry_run": dry_run, "progress": report}
        if older_than is not None:
            value = asdict(expire(place, older_than=age, force=force, **how))
        elif unnamed:
            value = forget_unnamed(place, **how).to_mapping()
        elif run is not None:
            value = forget_run(place, run, missing_ok=missing_ok, **how).to_mapping()
        else:
            value = forget_user(place, user_id or "", missing_ok=missing_ok, **how).to_mapping()
    print_result(as_json, value | {"dry_run": dry_run}, lambda: _show(value, dry_run))


def _show(removed: Mapping[str, Any], dry_run: bool) -> None:
    counted = ("runs", "feedback", "comparisons", "messages")
    counts = ", ".join(f"{name} {removed[name]}" for name in counted)
    say(f"would remove: {counts}" if dry_run else f"removed: {counts}", WARN if dry_run else GOOD)
    if removed["shared"]:
        stay = "would stay" if dry_run else "stay"
        say(f"messages that {stay}, because other runs contain them: {removed['shared']}")
    if removed.get("revisions"):
        tainted = "would be tainted" if dry_run else "tainted"
        names = ", ".join(removed["revisions"])
        say(f"{tainted}, because they were trained on it: {names}", WARN)
    if dry_run:
        say("nothing was removed; run it again without --dry-run")
    else:
        show_rebuild(removed)


def show_rebuild(removed: Mapping[str, Any]) -> None:
    """Print the commands that rebuild each namespace that a tainted revision serves."""
    for rebuild in removed.get("rebuild", ()):
        served = ", ".join(rebuild["tainted"])
        say(f"{cell(rebuild['namespace'])} is served by {served}; to rebuild:", WARN)
        for command in rebuild["commands"]:
            print(f"  {command}")  # in one piece, to be copied
