"""`updates`: list what came of every update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.commands.update import VERDICTS
from agentpref_cli.terminal import GOOD, WARN, moment, print_result, say, table

if TYPE_CHECKING:
    from agentpref.record.journal import Entry
    from agentpref.serve.status import ServingState

_SHORT = 13
"""How much of an update's id is shown: the millisecond in which it began."""

_TO_THE_MINUTE = 16


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

    Updates that ended alike are one line, which counts them. `agentpref report ID` shows one, and
    says why it failed; each ID that this lists is the beginning of one. `serves` says which of
    their revisions is live, and which is the canary, today.
    """
    from agentpref.record.journal import listed
    from agentpref.serve.status import read_state

    with options.reading(home, namespace) as connection:
        entries = listed(connection, namespace, limit)
        names = {entry.namespace for entry in entries}
        states = {name: read_state(connection, name) for name in names}
    rows = [_row(entry, states[entry.namespace]) for entry in entries]
    print_result(as_json, {"updates": rows}, lambda: _show(rows))


def _row(entry: Entry, state: ServingState) -> dict[str, Any]:
    report = entry.report
    counts, accuracy = report.get("counts", {}), report.get("accuracy", {}).values()
    total = sum(found["pairs"] for found in accuracy)
    before, after = (
        sum(found["pairs"] * found[when] for found in accuracy) / total if total else None
        for when in ("before", "after")
    )
    serves = {state.canary: "canary", state.live: "live"}
    trained = "trained" if "trained" in counts or not entry.in_ledger else "new"  # 0.1.0 wrote new
    return {
        "update_id": entry.update_id,
        "created_at": entry.created_at,
        "namespace": entry.namespace,
        "verdict": entry.verdict,
        "pairs": counts.get(trained, 0),
        "thumbs": counts.get(f"{trained}_thumbs", 0),
        "decisions": counts.get(f"{trained}_decisions", 0),
        "set_aside": sum(
            one["examples"]
            for one in report.get("set_aside", ())
            if one["update_id"] == entry.update_id
        ),
        "attempts": max(1, len(report.get("attempts", ()))) if report.get("training") else 0,
        "before": before,
        "after": after,
        "seconds": report.get("seconds"),
        "revision": entry.revision,
        "serves": serves.get(entry.revision) if entry.revision else None,
        "times": entry.times,
        "first_at": entry.first_at,
        "notes": list(report.get("notes", ())),
    }


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table that fits into 80 columns where there is one namespace."""
    if not rows:
        return say("no update yet; run `agentpref update` first")
    lines: list[dict[str, object]] = []
    for row in rows:
        many = f" × {row['times']:,}" if row["times"] > 1 else ""
        known = (row[name] for name in ("before", "after") if row[name] is not None)
        shares = [f"{share:.2f}".lstrip("0") for share in known]
        line = {
            "time": moment(row["created_at"])[:_TO_THE_MINUTE],
            "namespace": row["namespace"],
            "verdict": row["verdict"].replace("_", " ") + many,
            "examples": row["pairs"] + row["thumbs"] + row["decisions"],
            "accuracy": " -> ".join(shares) or None,
            "took": None if row["seconds"] is None else f"{row['seconds']:,.0f} s",
            "serves": row["serves"],
            "id": (row["revision"] or "").rpartition("-")[0] or row["update_id"][:_SHORT],
        }
        lines.append(line)
    columns = list(lines[0])
    if len({row["namespace"] for row in rows}) == 1:
        columns.remove("namespace")
    styles = {name.replace("_", " "): style for name, (_, style, _) in VERDICTS.items()}
    styles |= {"live": GOOD, "canary": WARN}
    return table(columns, [[line[name] for name in columns] for line in lines], styles=styles)
