"""`init`, `stats`, `pairs`, `backup`, `merge` and `ship`: make, count, copy and merge homes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref.printable import in_namespace
from agentpref_cli import options
from agentpref_cli.commands.forget import show_rebuild
from agentpref_cli.terminal import (
    BAD,
    GOOD,
    WARN,
    cell,
    moment,
    one_line,
    print_result,
    progress,
    say,
    table,
)

if TYPE_CHECKING:
    from agentpref.prefer.examples import ExampleSet
    from agentpref.record.transfer.backup import Backup
    from agentpref.types import Message

DECLARE = "if they are preferences, declare their key with agentpref keys declare"
"""What to do about scores under a key that nobody declared."""

_SHOWN = 60
_KINDS = ("runs", "feedback", "comparisons")
_COUNTS = ("added", "known", "conflicts", "forgotten")


def init(home: options.Home = None, as_json: options.AsJson = False) -> None:
    """Make a home folder; an existing home stays as it is."""
    from agentpref.home import Home
    from agentpref.record.database import connect

    existed = Home(Home.resolve(home)).database.exists()
    created = Home.create(home)
    connect(created).close()
    print_result(
        as_json,
        {"home": str(created.path), "existed": existed},
        lambda: say(f"{'already a home' if existed else 'made a home'}: {created.path}", GOOD),
    )


def stats(
    home: options.Home = None,
    namespace: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only this one [default: all].", show_default=False),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Count what was logged, per namespace, and what of it does not count.

    These are the scores under keys that are no preferences, and the examples that updates
    set aside, as `agentpref report` explains.
    """
    from agentpref.record.asides import number_aside
    from agentpref.record.declared import undeclared
    from agentpref.record.store import Store

    with options.reading(home, namespace) as connection:
        store = Store(connection)
        names = store.namespaces() if namespace is None else [namespace]
        counts = {
            name: store.stats(name)
            | {
                "set_aside": number_aside(connection, name),
                "undeclared": undeclared(connection, name),
            }
            for name in names
        }
    print_result(as_json, counts, lambda: _show_counts(counts))


def _show_counts(counts: Mapping[str, Mapping[str, Any]]) -> None:
    if not counts:
        return say("nothing is logged yet")
    names = ("namespace", "runs", "threads", "users", "feedback", "corrections", "comparisons")
    rows = [
        {"namespace": namespace, **found, "last run": moment(found["last_at"])}
        for namespace, found in counts.items()
    ]
    table((*names, "last run"), rows)
    for namespace, found in counts.items():
        if found["undeclared"]:
            keys = ", ".join(f"{cell(key)} {scores}" for key, scores in found["undeclared"].items())
            say(f"scores in {cell(namespace)} that train nothing: {keys}; {DECLARE}", WARN)
        if found["set_aside"]:
            command = in_namespace("agentpref update --again", namespace)
            say(
                f"examples in {cell(namespace)} that updates set aside: "
                f"{found['set_aside']}; `{command}` takes them in again",
                WARN,
            )
    return None


def pairs(
    home: options.Home = None,
    namespace: options.Namespace = "default",
    limit: Annotated[
        int, typer.Option(min=0, metavar="N", help="How many of the newest pairs to show.")
    ] = 5,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN",
            help="Only prompts judged since then: 1d (s m h d w), or a date [default: all].",
            show_default=False,
        ),
    ] = None,
    held_out: options.HeldOut = None,
    as_json: options.AsJson = False,
) -> None:
    """Count the pairs that an update would use, and show the newest.

    Prompts are held out as by the namespace's last update, unless --held-out says otherwise.
    """
    from agentpref.prefer.examples import read_examples
    from agentpref.record.store import Store

    start = None if since is None else options.parse_since(since, time.time(), "--since")
    with options.reading(home, namespace) as connection:
        share = options.held_out_share(connection, namespace, held_out)
        found = read_examples(Store(connection), namespace, held_out=share, since=start)
    value = {
        "held_out": share,
        "strata": _strata(found),
        "thumbs": len(found.thumbs),
        "left_out": dict(found.left_out),
        "newest": [
            {
                "pair": pair.example_id,
                "tag": pair.tag,
                "origin": pair.origin,
                "held_out": pair.held_out,
                "prompt": _text(pair.prompt.messages[-1]),
                "chosen": _text(pair.completions[0].message),
                "rejected": _text(pair.completions[-1].message),
            }
            for pair in found.pairs[::-1][:limit]
        ],
    }
    print_result(as_json, value, lambda: _show_pairs(value, since))


def _strata(found: ExampleSet) -> list[dict[str, Any]]:
    counts = Counter((pair.tag, pair.origin, pair.held_out) for pair in found.pairs)
    return [
        {"tag": t, "origin": o, "train": counts[t, o, False], "held_out": counts[t, o, True]}
        for t, o in sorted({(tag, origin) for tag, origin, _ in counts})
    ]


def _text(message: Message) -> str:
    """The text of a message, or the tool calls of a message without text."""
    return str(message.get("content") or message.get("tool_calls") or "")


def _show_pairs(value: dict[str, Any], since: str | None) -> None:
    from agentpref.types import HELD_OUT

    if not value["strata"]:
        when = "yet" if since is None else f"since {since}"
        say(f"no pairs {when}: compare two answers to a prompt, correct one, or import a file")
    else:
        table(("tag", "origin", "train", "held_out"), value["strata"])
    if value["newest"]:
        columns = ("prompt", "chosen", "rejected")
        rows = [
            (row["pair"][:8], *(one_line(row[name], _SHOWN) for name in columns))
            for row in value["newest"]
        ]
        table(("pair", *columns), rows)
    if value["held_out"] != HELD_OUT:
        say(f"share of the prompts that is held out: {value['held_out']:g}")
    if value["thumbs"]:
        say(f"lone thumbs, trained beside the pairs: {value['thumbs']}")
    for reason, count in value["left_out"].items():
        cure = f"; {DECLARE}" if reason == "undeclared_key" else ""
        say(f"left out, {reason.replace('_', ' ')}: {count}{cure}")


def backup(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET", help="A missing or empty folder for the copy.", readable=False
        ),
    ],
    home: options.Home = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Copy a home, also while it is in use.

    The copy is a home too: database, adapters and user keys. It holds everything that was
    acknowledged before the command began. A backup that fails leaves no copy.
    """
    from agentpref.record.transfer.backup import backup

    with progress(quiet) as report:
        done = backup(home, target, progress=report)
    print_result(as_json, asdict(done), lambda: _show_backup(done))


def merge(
    others: Annotated[
        list[str],
        typer.Argument(
            metavar="OTHER...",
            help="The homes to bring in, or where `agentpref ship` wrote: an address or a folder.",
        ),
    ],
    home: options.Home = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Bring into a home what other homes logged, each row once.

    Copies and verifies each other home first; one that fails verification gives nothing. The other
    homes are not changed. A user who was forgotten in one of them is forgotten in this one.
    Revisions, and what serves, are not merged. After an interruption, run the same command again.

    Of segments, it reads those that are new. One that is damaged gives nothing, and the command
    exits 1. Segments that hold what was forgotten here are replaced by ones without it.
    """
    from agentpref.record.transfer.merge import merge

    with progress(quiet) as report:
        done = [merged.to_mapping() for merged in merge(home, others, progress=report)]
    print_result(as_json, {"merged": done}, lambda: _show_merge(done))
    if any(one["refused"] for one in done):
        raise typer.Exit(1)


def ship(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            help="Where to: s3://…, gs://…, az://…, any other of fsspec, or a folder.",
        ),
    ],
    home: options.Home = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Write what is new in a home to object storage, for a home that merges it.

    Each segment is written once and never changes, except that what was forgotten in this home is
    removed from all of them. After an interruption, run the same command again.
    """
    from agentpref.record.transfer.ship import ship

    with progress(quiet) as report:
        done = ship(home, url, progress=report).to_mapping()
    print_result(as_json, done, lambda: _show_shipment(done))
    if done["unreadable"]:
        raise typer.Exit(1)


def _show_shipment(done: Mapping[str, Any]) -> None:
    rows = ", ".join(f"{kind} {done[kind]}" for kind in _KINDS)
    say(f"shipped to {done['url']}: {rows}, in segments {len(done['segments'])}", GOOD)
    _show_segments(done)


def _show_segments(done: Mapping[str, Any]) -> None:
    if done["replaced"]:
        say(
            f"replaced, because they held what was forgotten: {len(done['replaced'])} segments",
            WARN,
        )
    for name, why in done.get("unreadable", {}).items():
        say(f"not searched for what was forgotten: {name}: {why}", BAD)
    for name, why in done.get("refused", {}).items():
        say(f"refused, and nothing of it was merged: {name}: {why}", BAD)
    for name in done.get("waiting", ()):
        say(f"judges runs that are not here yet, and is read again by the next merge: {name}", WARN)


def _show_backup(done: Backup) -> None:
    revisions = "1 revision" if done.revisions == 1 else f"{done.revisions} revisions"
    say(f"copied {done.bytes / 1e6:,.1f} MB and {revisions} to {done.path}", GOOD)
    if done.missing:
        say(f"without a folder in the home, so not copied: {', '.join(done.missing)}", WARN)
    if done.damaged:
        cure = "look at them with `agentpref verify`, and restore them from an older backup"
        say(f"copied with files that are not what was published: {', '.join(done.damaged)}", WARN)
        say(cure, WARN)
    if done.keys:
        say(f"user.keys: {done.keys}", WARN)


def _show_merge(done: Sequence[Mapping[str, Any]]) -> None:
    merged = [
        (one["home"] if "://" in one["home"] else Path(one["home"]).name, one) for one in done
    ]
    rows = [{"home": name, "rows": kind, **one[kind]} for name, one in merged for kind in _KINDS]
    table(("home", "rows", *_COUNTS), rows)
    for name, one in merged:
        _show_forgotten(name, one)
        if one["conflicts"]:
            table(("home", "table", "key"), [{"home": name, **row} for row in one["conflicts"]])
            count = sum(one[kind]["conflicts"] for kind in _KINDS)
            say(f"rows in conflict: {count}; the row that was here first stays", BAD)
        _show_segments(one)


def _show_forgotten(name: str, one: Mapping[str, Any]) -> None:
    if one["keys"]:
        cure = "give all hosts the same user.keys, so that one user has one hash"
        say(f"{name} hashes its users under another key; {cure}", WARN)
    if one["forgot"] is not None:
        removed = ", ".join(f"{kind} {one['forgot'][kind]}" for kind in _KINDS)
        say(f"forgotten in {name}, so removed here: {removed}", WARN)
        show_rebuild(one["forgot"])
