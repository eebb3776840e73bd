"""Runs a guide as its reader does: from top to bottom, in one folder, and keeps the output.

A ``python`` fence runs in one program with those above it; a ``text`` fence right after it is what
it printed. A ``console`` fence is a terminal session: each line that begins with ``$ `` is run by
a real shell on a pseudo-terminal of 100 columns, and the lines below it are its standard output
(progress goes to standard error and is not shown). Other fences are not run.

``python docs/sessions.py FILE…`` records the outputs again; the tests compare them. The command
``agentpref`` must be installed beside this interpreter.
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
READER = "/home/you/app"
"""The folder that a guide shows in place of the one it ran in."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Fence(NamedTuple):
    """A fenced block: its language, its text, and where in the document the text stands."""

    language: str
    text: str
    start: int
    end: int


class Played(NamedTuple):
    """A fence that shows output, and the real output."""

    fence: Fence
    written: str


def fences(document: str) -> list[Fence]:
    """All fenced blocks, in order."""
    return [Fence(m[1], m[2], *m.span(2)) for m in _FENCE.finditer(document)]


def play(document: str, folder: Path, names: dict[str, Any] | None = None) -> Iterator[Played]:
    """Run the fences of a document in ``folder`` and yield those that show output.

    ``names`` is the namespace of the Python fences; callers may read it afterwards.
    """
    names = {"__name__": "guide"} if names is None else names
    (folder / "examples").symlink_to(ROOT / "examples")
    printed, end = "", 0
    for fence in fences(document):
        if fence.language == "python":
            printed, end = _printed(fence.text, folder, names), fence.end
        elif fence.language == "text" and not document[end : fence.start].strip("`\n tex"):
            yield Played(fence, printed.replace(str(folder), READER))
        elif fence.language == "console":
            yield Played(fence, _session(fence.text, folder))


def normal(text: str) -> str:
    """Replace what differs between runs and machines: ids, times, figures, and line breaks."""
    for pattern, name in (
        (r"\brev-(\d{6})-[0-9a-f]{12}", r"rev-\1-SHA"),
        (r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "ID"),
        (r"\b[0-9a-f]{8}-[0-9a-f]{4}\b", "ID"),
        (r"\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?", "TIME"),
        (r"(?m)^rounding in nats a token: .*\n", ""),  # not in float32
        (r"(?m)^other work had the cores: .*\n", ""),  # on a busy machine
        (r"\b\d+ (of \d+\s+prompts better|better|worse)", "SIGNS"),  # by how they are rounded
        (r"\b1 in ([\d.,]+|over a million) by chance", "ODDS by chance"),
        (r"\babout [\d,]+ more comparisons", "about SO MANY more comparisons"),
        (r"[+-]?\d*\.\d+(e-?\d+)?", "FIGURE"),
        (r"\b\d+ s\b", "SECONDS"),
        (r"\b(float32|bfloat16|4bit)\b", "PRECISION"),
        (r"\b\d+ tokens a pass", "TOKENS a pass"),
        (r"[─━]+", "─"),
        (r"(?m)^(before|after )  (Yes|No)$", r"\1 ANSWER"),  # where both are about as likely
    ):
        text = re.sub(pattern, name, text)
    return " ".join(text.split())


def _printed(program: str, folder: Path, names: dict[str, Any]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output, _inside(folder):
        exec(compile(program, "<guide>", "exec"), names)
    return output.getvalue()


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _session(text: str, folder: Path) -> str:
    """Run the session: each command, and below it its output."""
    commands = [line for line in text.splitlines() if line.startswith("$ ")]
    parts = [f"{command}\n{_shell(command[2:], folder)}" for command in commands]
    return "".join(parts).replace(str(folder), READER)


def _shell(command: str, folder: Path) -> str:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["sh", "-c", command],
        cwd=folder,
        env=_environment(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    ):
        os.close(theirs)
        written = b"".join(_chunks(ours))
    os.close(ours)
    lines = _ESCAPE.sub("", written.decode()).splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _environment(outer: Mapping[str, str]) -> dict[str, str]:
    """The environment of the reader's terminal, without the home of the person who runs this."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{outer.get('PATH', '')}"
    kept = {name: value for name, value in outer.items() if name != "AGENTPREF_HOME"}
    return {**kept, "PATH": path, "COLUMNS": "100", "TERM": "xterm", "HF_HUB_OFFLINE": "1"}


def _chunks(terminal: int) -> Iterator[bytes]:
    """Read until the other side of a pseudo-terminal closes, which is an error on Linux."""
    with contextlib.suppress(OSError):
        while chunk := os.read(terminal, 1 << 16):
            yield chunk


def record(guide: Path) -> None:
    """Run a guide, and write its outputs into it."""
    document = guide.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        played = list(play(document, Path(folder).resolve()))
    for fence, written in reversed(played):
        document = document[: fence.start] + written + document[fence.end :]
    guide.write_text(document, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        record(Path(name))
