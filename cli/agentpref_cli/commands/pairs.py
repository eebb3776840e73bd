"""`pairs`: what there is to learn from, counted by stratum, and why the rest is left out."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.options import reading
from agentpref_cli.terminal import one_line, print_result, say, table

if TYPE_CHECKING:
    from agentpref.prefer.pairs import PairSet
    from agentpref.types import Message, Pair

_SHOWN = 60


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
            help="Only of prompts judged since then: 1d (s m h d w), or a date [default: all].",
            show_default=False,
        ),
    ] = None,
    held_out: options.HeldOut = 0.2,
    as_json: options.AsJson = False,
) -> None:
    """Count the pairs, and show the newest."""
    from agentpref.prefer.pairs import read_pairs
    from agentpref.record.reader import Reader

    start = None if since is None else _moment(since)
    with reading(home) as connection:
        found = read_pairs(Reader(connection), namespace, held_out=held_out, since=start)
    newest = found.pairs[::-1][:limit]
    value = {
        "strata": _strata(found),
        "thumbs": len(found.thumbs),
        "left_out": dict(found.left_out),
        "newest": [_pair(pair) for pair in newest],
    }
    print_result(as_json, value, lambda: _show(value, since))


def _moment(text: str) -> float:
    from agentpref_cli.options import parse_since

    try:
        return parse_since(text, time.time())
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is no time; give an age such as 1d or 12h, or a date such as 2026-11-19",
            param_hint="--since",
        ) from error


def _strata(found: PairSet) -> list[dict[str, Any]]:
    counts = Counter((pair.tag, pair.origin, pair.held_out) for pair in found.pairs)
    return [
        {
            "tag": tag,
            "origin": origin,
            "train": counts[tag, origin, False],
            "held_out": counts[tag, origin, True],
        }
        for tag, origin in sorted({(tag, origin) for tag, origin, _ in counts})
    ]


def _pair(pair: Pair) -> dict[str, Any]:
    return {
        "pair": pair.pair_id,
        "tag": pair.tag,
        "origin": pair.origin,
        "held_out": pair.held_out,
        "prompt": _text(pair.prompt.messages[-1]),
        "chosen": _text(pair.chosen),
        "rejected": _text(pair.rejected),
    }


def _text(message: Message) -> str:
    """The words of a message; of one that only calls tools, the calls."""
    return str(message.get("content") or message.get("tool_calls") or "")


def _show(value: dict[str, Any], since: str | None) -> None:
    if not value["strata"]:
        when = "yet" if since is None else f"since {since}"
        say(f"no pairs {when}: compare two answers to a prompt, correct one, or import a file")
    else:
        columns = ("tag", "origin", "train", "held_out")
        table(columns, [tuple(row.values()) for row in value["strata"]])
    if value["newest"]:
        columns = ("pair", "prompt", "chosen", "rejected")
        rows = [
            (row["pair"][:8], *(one_line(row[name], _SHOWN) for name in columns[1:]))
            for row in value["newest"]
        ]
        table(columns, rows)
    if value["thumbs"]:
        say(f"lone thumbs, trained beside the pairs: {value['thumbs']}")
    for reason, count in value["left_out"].items():
        say(f"left out, {reason.replace('_', ' ')}: {count}")
