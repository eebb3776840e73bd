"""What the commands say, and how it looks.

On a terminal: tables, colours and a progress bar, drawn by rich. Piped: tab-separated lines under
a header, and one line of progress a stage. With ``--json``: one object on standard output and
nothing else there. Rich is imported only when something is drawn, since it costs more than most
commands. Knows nothing of homes, runs or adapters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from agentpref.types import Progress

GOOD, BAD, WARN, DIM, BOLD = "green", "red", "yellow", "dim", "bold"


def print_result(as_json: bool, value: Any, show: Callable[[], None]) -> None:
    """Print ``value`` as one JSON object, or let ``show`` print it for people."""
    if not as_json:
        return show()
    import orjson

    return print(orjson.dumps(value, default=str).decode())


def say(text: str, style: str = "") -> None:
    """Print one line, coloured where standard output is a terminal."""
    if sys.stdout.isatty():
        _console(sys.stdout).print(_text(text, style))
    else:
        print(text)


def fail(message: str) -> None:
    """Print what went wrong as one line on standard error."""
    line = "error: " + one_line(message)
    if sys.stderr.isatty():
        _console(sys.stderr).print(_text(line, BAD), soft_wrap=True)
    else:
        print(line, file=sys.stderr)


def confirm(question: str, yes: bool) -> None:
    """Ask where somebody sits before it; what runs by itself has been thought about before.

    Raises:
        Exit: the answer is not yes.
    """
    if yes or not sys.stdin.isatty():
        return
    print(question, end=" [y/N] ", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        import typer

        say("nothing was removed")
        raise typer.Exit(1)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    styles: Mapping[str, str] | None = None,
) -> None:
    """Print rows under a header. ``styles`` colours the cells that read as one of its keys."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            print("\t".join(map(cell, row)))
        return
    _console(sys.stdout).print(_drawn(columns, rows, styles or {}))


def show_checks(checks: Sequence[Mapping[str, Any]]) -> None:
    """Print checks, each with its ``name``, whether it ``holds``, and ``words`` for it."""
    rows = [(check["name"], check["holds"], check["words"]) for check in checks]
    table(("check", "holds", "words"), rows, styles={"yes": GOOD, "no": BAD})


def facts(values: Mapping[str, object]) -> None:
    """Print names and their values, one a line."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        if sys.stdout.isatty():
            label = _text(name.ljust(width + 2), DIM)
            _console(sys.stdout).print(label.append(cell(value), style="default"), soft_wrap=True)
        else:
            print(f"{name}\t{cell(value)}")


@contextmanager
def progress(as_json: bool) -> Iterator[Progress | None]:
    """Yield a function to be told of progress, which is shown on standard error.

    A bar on a terminal; one line a stage elsewhere; nothing beside ``--json`` where it is piped.
    """
    if sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield None if as_json else _stage_lines(sys.stderr)


def cell(value: object) -> str:
    """Write one value for a table: short, on one line, with nothing a terminal would obey."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return one_line(str(value))


def one_line(text: str, limit: int | None = None) -> str:
    """Fold white space, drop control characters (a logged text may hold escapes), and cut."""
    folded = " ".join(text.split())
    clean = "".join(c for c in folded if c.isprintable())
    return clean if limit is None or len(clean) <= limit else clean[: limit - 1] + "…"


def moment(timestamp: float | None) -> str:
    """Write a POSIX time as local date and time, to the second."""
    if timestamp is None:
        return "-"
    from datetime import datetime

    return datetime.fromtimestamp(timestamp).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False)


def _text(text: str, style: str) -> Text:
    from rich.text import Text

    return Text(text, style=style)


def _drawn(
    columns: Sequence[str], rows: Sequence[Sequence[object]], styles: Mapping[str, str]
) -> Any:
    from rich import box
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        numeric = all(_is_number(row[index]) for row in rows)
        side: Literal["left", "right"] = "right" if numeric and rows else "left"
        drawn.add_column(_text(name, BOLD), justify=side, overflow="fold")
    for row in rows:
        drawn.add_row(*(_text(text, styles.get(text, "")) for text in map(cell, row)))
    return drawn


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
    )
    tasks: dict[str, rich.TaskID] = {}
    with rich.Progress(*columns, console=_console(sys.stderr)) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _stage_lines(stream: TextIO) -> Progress:
    seen: set[str] = set()

    def report(stage: str, done: int, total: int) -> None:
        if stage not in seen:
            seen.add(stage)
            print(stage, file=stream, flush=True)
        if done == total and total > 1:
            print(f"{stage}: {done}/{total}", file=stream, flush=True)

    return report
