"""`import` and `export`: preference data in TRL's JSONL formats, in and out."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agentpref_cli import options
from agentpref_cli.opening import reading
from agentpref_cli.terminal import GOOD, WARN, Report, answer, progress, say

if TYPE_CHECKING:
    from agentpref.prefer.exchange import Imported
    from agentpref.prefer.pairs import PairSet

_KILOBYTE = 1000


def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL, in TRL's preference or unpaired format.")
    ],
    home: options.Home = None,
    namespace: options.Namespace = "default",
    format: Annotated[
        Literal["preference", "unpaired"] | None,
        typer.Option(help="What the rows are [default: their keys tell].", show_default=False),
    ] = None,
    tag: Annotated[
        str | None,
        typer.Option(metavar="TAG", help="Tag of every row [default: its column `tag`]."),
    ] = None,
    source: Annotated[Literal["human", "model", "code"], typer.Option(help="Who judged.")] = (
        "human"
    ),
    user: Annotated[
        str | None, typer.Option(metavar="ID", help="Which person or judge it was.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Count bad lines; do not stop at the first.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Read preferences from a JSONL file.

    A file that is read twice adds nothing the second time.
    """
    from agentpref.prefer.exchange import import_file
    from agentpref.record.home import Home

    with progress(as_json) as report:
        done = import_file(
            Home.open(home),
            file,
            namespace=namespace,
            format=format,
            tag=tag,
            source=source,
            user_id=user,
            skip_bad=skip_bad,
            on_progress=lambda so_far: _tell(report, so_far),
        )
    answer(as_json, asdict(done), lambda: _show_import(done))


def export(
    home: options.Home = None,
    namespace: options.Namespace = "default",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to [default: standard output]."),
    ] = None,
    format: Annotated[
        Literal["preference", "unpaired"],
        typer.Option(help="Pairs, or lone thumbs."),
    ] = "preference",
    split: Annotated[
        Literal["all", "train", "held-out"], typer.Option(help="Which side of the split.")
    ] = "all",
    held_out: options.HeldOut = 0.2,
    as_json: options.AsJson = False,
) -> None:
    """Write pairs or lone thumbs as JSONL that TRL reads."""
    from agentpref.prefer.pairs import read_pairs
    from agentpref.record.store import Store

    if as_json and output is None:
        raise typer.BadParameter("--json needs --output: the rows go to standard output")
    with reading(home) as connection:
        found = read_pairs(Store(connection), namespace, held_out=held_out)
    target = sys.stdout.buffer if output is None else output
    count = _write(found, format, split, target)
    if output is not None:
        rows = f"{count} row" if count == 1 else f"{count} rows"
        answer(
            as_json,
            {"file": str(output), "rows": count},
            lambda: say(f"wrote {rows} to {output}", GOOD),
        )


def _write(found: PairSet, format: str, split: str, target: Any) -> int:
    from agentpref.prefer.exchange import export_pairs, export_thumbs

    if format == "preference":
        return export_pairs((pair for pair in found.pairs if _is_on(split, pair.held_out)), target)
    return export_thumbs((one for one in found.thumbs if _is_on(split, one.held_out)), target)


def _is_on(split: str, held_out: bool) -> bool:
    return split == "all" or held_out == (split == "held-out")


def _tell(report: Report | None, so_far: Imported) -> None:
    if report is not None:
        read, total = so_far.bytes_read // _KILOBYTE, so_far.bytes_total // _KILOBYTE
        report("reading (kB)", read, total)


def _show_import(done: Imported) -> None:
    say(f"added {done.added}, known already {done.known}", GOOD)
    if done.bad:
        say(f"skipped {done.bad} bad lines; without --skip-bad the first one is explained", WARN)
