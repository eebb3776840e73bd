"""`updates`: list what came of every update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.commands.update import VERDICTS
from agentpref_cli.terminal import moment, print_result, say, table

if TYPE_CHECKING:
    from agentpref.record.journal import Entry

_SHORT = 13
"""How much of an update's id is shown: the millisecond in which it began."""


def updates(
    home: options.Home = None,
    namespace: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only this one [default: all].", show_default=False),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=0, metavar="N", help="How many of the newest to list.")
    ] = 20,
    as_json: options.AsJson = False,
) -> None:
    """List the updates, the newest first: also those that failed, or found nothing new.

    Updates that ended alike in a row are one line, which counts them. `agentpref report ID` shows
    one, and says why it failed.
    """
    from agentpref.record.journal import listed

    with options.reading(home) as connection:
        rows = [_row(entry) for entry in listed(connection, namespace, limit)]
    print_result(as_json, {"updates": rows}, lambda: _show(rows))


def _row(entry: Entry) -> dict[str, Any]:
    report = entry.report
    counts, accuracy = report.get("counts", {}), report.get("accuracy", {}).values()
    total = sum(found["pairs"] for found in accuracy)
    before, after = (
        sum(found["pairs"] * found[when] for found in accuracy) / total if total else None
        for when in ("before", "after")
    )
    # Reports of 0.1.0 count what was trained under "new".
    trained = counts.get("trained", counts.get("new", 0) if entry.in_ledger else 0)
    return {
        "update_id": entry.update_id,
        "created_at": entry.created_at,
        "namespace": entry.namespace,
        "verdict": entry.verdict,
        "pairs": trained + counts.get("trained_thumbs", 0),
        "before": before,
        "after": after,
        "seconds": report.get("seconds"),
        "revision": entry.revision,
        "times": entry.times,
        "first_at": entry.first_at,
        "notes": list(report.get("notes", ())),
    }


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return say("no update yet; run `agentpref update` first")
    lines = []
    for row in rows:
        verdict = row["verdict"].replace("_", " ")
        many = f" × {row['times']:,}" if row["times"] > 1 else ""
        shares = (None if row[name] is None else f"{row[name]:.2f}" for name in ("before", "after"))
        seconds = None if row["seconds"] is None else round(row["seconds"])
        lines.append(
            (
                moment(row["created_at"]), row["namespace"], verdict + many, row["pairs"], *shares,
                seconds, row["revision"], row["update_id"][:_SHORT],
            )
        )  # fmt: skip
    styles = {name.replace("_", " "): style for name, (_, style, _) in VERDICTS.items()}
    columns = ("time", "namespace", "verdict", "pairs", "before", "after", "seconds")
    return table((*columns, "revision", "update"), lines, styles=styles)
