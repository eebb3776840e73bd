"""`import` and `export`: preference data in files, in and out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from agentpref_cli import options
from agentpref_cli.options import reading
from agentpref_cli.terminal import GOOD, WARN, print_result, progress, say

if TYPE_CHECKING:
    from agentpref.prefer.exchange import Exported, Imported
    from agentpref.prefer.pairs import PairSet
    from agentpref.types import Progress

Format = Literal["preference", "unpaired", "openai", "llamafactory"]

_KILOBYTE = 1000
_ROWS_TOLD = 1000

T = TypeVar("T")


def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON lines, one JSON list, or Parquet.")
    ],
    home: options.Home = None,
    namespace: options.Namespace = "default",
    format: Annotated[
        Format | None,
        typer.Option(help="What the rows are [default: their keys tell].", show_default=False),
    ] = None,
    tag: Annotated[
        str | None,
        typer.Option(metavar="TAG", help="Tag of every row [default: its column `tag`]."),
    ] = None,
    source: Annotated[Literal["human", "model", "code"], typer.Option(help="Who judged.")] = (
        "human"
    ),
    user_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Which person or judge it was.")
    ] = None,
    redact: Annotated[
        bool,
        typer.Option("--redact", help="Take addresses, numbers and keys out of all texts."),
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Count bad lines; do not stop at the first.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Read preferences from a file, in TRL's, OpenAI's or LLaMA-Factory's format.

    A file that is read twice adds nothing the second time.
    """
    from agentpref.home import Home
    from agentpref.prefer.exchange import import_file
    from agentpref.record.ingest import redaction

    with progress(as_json) as report:
        done = import_file(
            Home.open(home),
            file,
            namespace=namespace,
            format=format,
            tag=tag,
            source=source,
            user_id=user_id,
            redact=redaction.redact if redact else None,
            skip_bad=skip_bad,
            on_progress=lambda so_far: _tell(report, so_far),
        )
    print_result(as_json, asdict(done), lambda: _show_import(done))


def export(
    home: options.Home = None,
    namespace: options.Namespace = "default",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where to; Parquet where it ends in .parquet [default: standard output].",
        ),
    ] = None,
    format: Annotated[
        Format, typer.Option(help="Pairs in one of three formats, or lone thumbs (unpaired).")
    ] = "preference",
    split: Annotated[
        Literal["all", "train", "held-out"], typer.Option(help="Which side of the split.")
    ] = "all",
    held_out: options.HeldOut = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Count the rows that the format cannot hold.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Write pairs or lone thumbs, as JSON lines or as Parquet.

    Importing the file again gives the same pairs.
    """
    from agentpref.prefer.pairs import read_pairs
    from agentpref.record.store import Store

    if as_json and output is None:
        raise typer.BadParameter("--json needs --output: the rows go to standard output")
    with reading(home) as connection:
        share = options.held_out_share(home, connection, namespace, held_out)
        found = read_pairs(Store(connection), namespace, held_out=share)
    target = sys.stdout.buffer if output is None else output
    with progress(as_json) as report:
        done = _write(found, format, split, target, skip_bad, report)
    if output is not None:
        value = {"file": str(output), "held_out": share, **asdict(done)}
        print_result(as_json, value, lambda: _show_export(done, output))


def _write(
    found: PairSet, format: Format, split: str, target: Any, skip_bad: bool, report: Progress | None
) -> Exported:
    from agentpref.prefer.exchange import export_pairs, export_thumbs

    if format == "unpaired":
        thumbs = [thumb for thumb in found.thumbs if _is_on(split, thumb.held_out)]
        return export_thumbs(_told(thumbs, report), target)
    pairs = [pair for pair in found.pairs if _is_on(split, pair.held_out)]
    return export_pairs(_told(pairs, report), target, format=format, skip_bad=skip_bad)


def _told(rows: Sequence[T], report: Progress | None) -> Iterator[T]:
    for number, row in enumerate(rows, start=1):
        yield row
        if report is not None and (number % _ROWS_TOLD == 0 or number == len(rows)):
            report("writing (rows)", number, len(rows))


def _is_on(split: str, held_out: bool) -> bool:
    return split == "all" or held_out == (split == "held-out")


def _tell(report: Progress | None, so_far: Imported) -> None:
    if report is not None:
        read, total = so_far.bytes_read // _KILOBYTE, so_far.bytes_total // _KILOBYTE
        report("reading (kB)", read, total)


def _show_import(done: Imported) -> None:
    say(f"added {done.added}, known already {done.known}", GOOD)
    if done.bad:
        say(f"skipped {done.bad} bad lines; without --skip-bad the first one is explained", WARN)


def _show_export(done: Exported, output: Path) -> None:
    rows = f"{done.rows} row" if done.rows == 1 else f"{done.rows} rows"
    say(f"wrote {rows} to {output}", GOOD)
    if done.bad:
        say(f"skipped {done.bad} rows that the format cannot hold", WARN)
