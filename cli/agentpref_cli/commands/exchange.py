"""`import` and `export`: preference data in files, and the logs of other products."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agentpref.types import Source
from agentpref_cli import options
from agentpref_cli.terminal import GOOD, WARN, print_result, progress, say

if TYPE_CHECKING:
    from agentpref.prefer.exchange import Imported
    from agentpref.types import Example, Progress

_STANDARD = Path("-")
_PREFERENCES = "preference, unpaired, openai, llamafactory"
_LOGS = "langfuse, langsmith, otlp, open-webui, mlflow, phoenix"


def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="JSON lines, one JSON list, CSV, either perhaps in gzip, or Parquet; - reads "
            "standard input.",
        ),
    ],
    home: options.Home = None,
    namespace: options.Namespace = "default",
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Format of the rows. Preference data: {_PREFERENCES}. Runs and scores: {_LOGS}. "
            "Or one that a package registers [default: each row's keys tell].",
        ),
    ] = None,
    tag: Annotated[
        str | None,
        typer.Option(metavar="TAG", help="Tag of every row [default: the row's own]."),
    ] = None,
    source: Annotated[
        Source | None, typer.Option(help="Who judged [default: what a row says, else human].")
    ] = None,
    user_id: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Which person or judge it was [default: what a row says]."),
    ] = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Remove addresses, numbers and keys from all texts.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Count bad rows and continue after them.")
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Read preferences, or the runs and scores that another product logged, from a file.

    Preferences are in TRL's, OpenAI's or LLaMA-Factory's format. The first line of CSV names the
    columns. Importing the same file again adds nothing.
    """
    from agentpref.home import Home
    from agentpref.prefer.exchange import import_file
    from agentpref.record.ingest import redaction

    with progress(quiet) as report:

        def show(done: Imported) -> None:
            if report is not None:
                report("reading (kB)", done.bytes_read // 1000, done.bytes_total // 1000)

        done = import_file(
            Home.open(home),
            sys.stdin.buffer if file == _STANDARD else file,
            namespace=namespace,
            format=format,
            tag=tag,
            source=source,
            user_id=user_id,
            redact=redaction.redact if redact else None,
            skip_bad=skip_bad,
            on_progress=show,
        )
    text = f"added {done.added}, known already {done.known}"
    print_result(as_json, asdict(done), lambda: say(text, GOOD))
    if done.left_out and not as_json:
        kinds = ", ".join(f"{kind} ({rows})" for kind, rows in done.left_out.items())
        say(f"left out, as they are no model call and no score of one: {kinds}", WARN)
    if done.ignored and not as_json:
        columns = ", ".join(f"{name} ({rows})" for name, rows in done.ignored.items())
        say(f"columns that were not read, and in how many rows: {columns}", WARN)
    if done.bad and not as_json:
        say(f"skipped bad rows: {done.bad}", WARN)
        for why in done.why_bad:
            say(f"  {why}", WARN)
        if done.bad > len(done.why_bad):
            say(f"  and {done.bad - len(done.why_bad)} more", WARN)


def export(
    home: options.Home = None,
    namespace: options.Namespace = "default",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write here; Parquet if it ends in .parquet, packed if it ends in .gz "
            "[default: standard output, also named -].",
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"Format of the rows: {_PREFERENCES}, or one that a package registers.",
        ),
    ] = "preference",
    split: Annotated[
        Literal["all", "train", "held-out"], typer.Option(help="Which side of the split.")
    ] = "all",
    held_out: options.HeldOut = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Count examples that the format cannot hold.")
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Write pairs or single thumbs (unpaired), as JSON lines or as Parquet.

    Importing the file gives the same examples again.
    """
    from agentpref.prefer.examples import read_examples
    from agentpref.prefer.exchange import export_file, writable
    from agentpref.record.store import Store

    output = None if output == _STANDARD else output
    if as_json and output is None:
        raise typer.BadParameter("--json needs --output: the rows go to standard output")
    completions = writable(format).completions
    with options.reading(home, namespace) as connection:
        share = options.held_out_share(connection, namespace, held_out)
        found = read_examples(Store(connection), namespace, held_out=share)
    examples = found.thumbs if completions == 1 else found.pairs
    if split != "all":
        examples = tuple(one for one in examples if one.held_out == (split == "held-out"))
    target = sys.stdout.buffer if output is None else output
    with progress(quiet) as report:
        done = export_file(_reported(examples, report), target, format=format, skip_bad=skip_bad)
    if output is not None:
        value = {"file": str(output), "held_out": share, **asdict(done)}
        rows = f"{done.rows} row" if done.rows == 1 else f"{done.rows} rows"
        print_result(as_json, value, lambda: say(f"wrote {rows} to {output}", GOOD))
        if done.bad and not as_json:
            say(f"skipped rows that the format cannot hold: {done.bad}", WARN)


def _reported(rows: Sequence[Example], report: Progress | None) -> Iterator[Example]:
    for number, row in enumerate(rows, start=1):
        yield row
        if report is not None and (number % 1000 == 0 or number == len(rows)):
            report("writing (rows)", number, len(rows))
