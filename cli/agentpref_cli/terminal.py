"""How commands print.

On a terminal: tables, colours and a progress bar, drawn by rich. Piped: tab-separated lines under
a header. With ``--json``: one object on standard output. Progress goes to standard error whatever
standard output is: long work is never silent, unless ``--quiet`` says so. Rich is imported only to
draw, because its import takes longer than most commands.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeAlias

from agentpref.printable import escaped

if TYPE_CHECKING:
    from rich.text import Text

    from agentpref.types import Progress

LINE_SECONDS = 15.0
"""The least time between two lines of progress in the middle of a stage."""

GOOD, BAD, WARN, DIM, BOLD = "green", "red", "yellow", "dim", "bold"


def print_result(as_json: bool, value: Any, show: Callable[[], None]) -> None:
    """Print ``value`` as one JSON object, or let ``show`` print it for people.

    Whoever reads it from a pipe has it at once, though the command goes on.
    """
    if as_json:
        import orjson

        print(escaped(orjson.dumps(value, default=str).decode()))
    else:
        show()
    sys.stdout.flush()


def say(text: str, style: str = "") -> None:
    """Print one line, coloured on a terminal."""
    _line(sys.stdout, text, style)


def fail(message: str) -> None:
    """Print an error as one line on standard error."""
    _line(sys.stderr, "error: " + one_line(message), BAD)


def warn(message: str) -> None:
    """Print something that a person should know, and that stops nothing, on standard error."""
    _line(sys.stderr, "warning: " + one_line(message), WARN)


class Warnings(logging.Handler):
    """Prints what is logged as :func:`fail` prints an error: one line, which begins "warning: "."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message, with what was raised in words: a traceback is for developers."""
        error = record.exc_info[1] if record.exc_info else None
        text = record.getMessage() + (f": {error}" if error else "")
        try:
            _line(sys.stderr, f"{record.levelname.lower()}: {one_line(text)}", WARN)
        except OSError:  # nobody reads it any more
            self.handleError(record)


def confirm(question: str, yes: bool) -> None:
    """Ask before something is removed for good, unless the person said ``--yes``.

    Raises:
        ConfigError: standard input is no terminal, so nobody is there to answer.
        Exit: the answer is not yes.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        from agentpref.errors import ConfigError

        raise ConfigError(
            "nothing was removed: this removes for good, and without a terminal nobody can be "
            "asked; add --yes"
        )
    print(escaped(question), end=" [y/N] ", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        import typer

        say("nothing was removed")
        raise typer.Exit(1)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]] | Sequence[Mapping[str, object]],
    *,
    styles: Mapping[str, str] | None = None,
) -> None:
    """Print rows under a header; a row that is a mapping has a value for each column.

    ``styles`` maps the text of a cell to its colour. On a terminal no heading and no id is broken:
    where the rows are too wide for that, each value gets a line of its own.
    """
    lines = [[r[name] for name in columns] if isinstance(r, Mapping) else [*r] for r in rows]
    cells = [[*map(cell, line)] for line in lines]
    if not sys.stdout.isatty():
        for texts in (map(cell, columns), *cells):
            print("\t".join(texts))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    styles = styles or {}
    room = Console(file=sys.stdout).width
    layout = _layout(columns, cells, room)
    if layout is None:
        _draw_records(columns, cells, styles, room)
        return
    padding, widths = layout
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=padding)
    for index, name in enumerate(columns):
        numeric = bool(lines) and all(type(line[index]) in (int, float) for line in lines)
        justify: Literal["left", "right"] = "right" if numeric else "left"
        width = widths[index]
        drawn.add_column(_text(name, BOLD), justify=justify, overflow="fold", width=width)
    for texts in cells:
        drawn.add_row(*(_text(text, styles.get(text, "")) for text in texts))
    _draw(sys.stdout, drawn)


_Padding: TypeAlias = "tuple[int, int, int, int]"
_GAPS: Mapping[int, _Padding] = {3: (0, 1, 0, 1), 2: (0, 1, 0, 0), 1: (0, 0, 0, 0)}
"""The blanks between two columns, and the padding that makes them."""
_LONGEST_ID = 40
"""Longer words, which are paths, may be broken."""


def _layout(
    columns: Sequence[str], cells: Sequence[Sequence[str]], room: int
) -> tuple[_Padding, list[int]] | None:
    """The padding and the width of each column of a table; ``None`` if there is no room for one."""
    from rich.cells import cell_len

    whole, least = [], []
    for index, name in enumerate(columns):
        texts = [row[index] for row in cells]
        words = [word for text in texts for word in text.split()]
        whole.append(max(map(cell_len, (name, *texts))))
        longest = max(map(cell_len, words), default=0)
        least.append(max(cell_len(name), min(longest, _LONGEST_ID)))
    widths = [max(pair) for pair in zip(whole, least, strict=True)]

    def free(wanted: Sequence[int], gap: int) -> int:
        return room - 2 - sum(wanted) - gap * (len(columns) - 1)  # a blank at either side

    gaps = (gap for wanted in (widths, least) for gap in _GAPS if free(wanted, gap) >= 0)
    gap = next(gaps, None)
    if gap is None:
        return None
    while free(widths, gap) < 0:  # take from the widest of those that have something to give
        spare = [index for index in range(len(columns)) if widths[index] > least[index]]
        widths[max(spare, key=widths.__getitem__)] -= 1
    return _GAPS[gap], widths


def _draw_records(
    columns: Sequence[str], cells: Sequence[Sequence[str]], styles: Mapping[str, str], room: int
) -> None:
    """Print each row as lines of a name and a value, and break values between words."""
    from textwrap import wrap

    width = max(map(len, columns)) + 2
    for number, texts in enumerate(cells):
        if number:
            print()
        for name, text in zip(columns, texts, strict=True):
            line = _text("", "").append(name.ljust(width), BOLD)
            lines = wrap(text, max(1, room - width), break_long_words=False, break_on_hyphens=False)
            shown = f"\n{' ' * width}".join(lines)
            _draw(sys.stdout, line.append(shown, styles.get(text, "")), soft_wrap=True)


def show_checks(checks: Sequence[Mapping[str, Any]]) -> None:
    """Print the checks of a report: the name of each, whether it passed, and its message."""
    rows = [(check["name"], check["passed"], check["message"]) for check in checks]
    table(("check", "passed", "message"), rows, styles={"yes": GOOD, "no": BAD})


def facts(values: Mapping[str, object]) -> None:
    """Print names and their values, one per line."""
    width = max(map(len, values), default=0) + 2
    for name, value in values.items():
        say((name.ljust(width) if sys.stdout.isatty() else name + "\t") + cell(value))


@contextmanager
def progress(quiet: bool) -> Iterator[Progress | None]:
    """Yield a callback that shows progress on standard error; ``None`` with ``--quiet``.

    A bar on a terminal. Elsewhere plain lines: one as a stage begins, one every 15 seconds while it
    goes on, and one as it ends.
    """
    if quiet or not sys.stderr.isatty():
        yield None if quiet else _stage_lines()
        return
    from rich import progress as rich
    from rich.console import Console

    tasks: dict[str, rich.TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    with rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        console=Console(file=sys.stderr, highlight=False),
    ) as bars:
        yield report


def _stage_lines(clock: Callable[[], float] = time.monotonic) -> Progress:
    said: dict[str, float] = {}

    def say_line(stage: str, line: str) -> None:
        said[stage] = clock()
        print(line, file=sys.stderr, flush=True)

    def report(stage: str, done: int, total: int) -> None:
        if stage not in said:
            say_line(stage, stage)
        if total > 1 and (done == total or clock() - said[stage] >= LINE_SECONDS):
            say_line(stage, f"{stage}: {done}/{total}")

    return report


def cell(value: object) -> str:
    """Write one value for a table: short, on one line, without control characters."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else one_line(str(value))


def one_line(text: str, limit: int | None = None) -> str:
    """Fold white space, drop control characters (a logged text may hold escapes), and cut."""
    clean = "".join(c for c in " ".join(text.split()) if c.isprintable())
    return clean if limit is None or len(clean) <= limit else clean[: limit - 1] + "…"


def moment(timestamp: float | None) -> str:
    """Write a POSIX time as local date and time, to the second."""
    if timestamp is None:
        return "-"
    from datetime import datetime

    try:
        return datetime.fromtimestamp(timestamp).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (OSError, OverflowError, ValueError):  # a damaged home may have any number
        return f"{timestamp:g} s"


def _line(stream: TextIO, text: str, style: str) -> None:
    text = escaped(text, keep="\n\t")
    if stream.isatty():
        _draw(stream, _text(text, style), soft_wrap=True)
    else:
        print(text, file=stream)


def _draw(stream: TextIO, drawn: Any, *, soft_wrap: bool = False) -> None:
    from rich.console import Console

    Console(file=stream, highlight=False).print(drawn, soft_wrap=soft_wrap)


def _text(text: str, style: str) -> Text:
    """Text that rich prints as it is, whatever looks like mark-up in it."""
    from rich.text import Text

    return Text(text, style=style)
