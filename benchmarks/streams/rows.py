"""The rows of all nights, one JSON object a line: appended when a night ends, and never changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows:
    """A file of rows, and those that it had when it was opened or got since."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._rows: list[Row] = []
        if file.exists():
            whole = file.read_bytes()
            lines = whole.splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):  # a process was killed while it wrote
                os.truncate(file, len(whole) - len(lines.pop()))
            self._rows = [json.loads(line) for line in lines]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def find(self, key: Mapping[str, Any]) -> list[Row]:
        """The rows that have all these values, in order."""
        return [row for row in self._rows if key.items() <= row.items()]

    def append(self, row: Row) -> None:
        """Add a row; it is on disk when this returns."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._rows.append(row)


@cache
def commit() -> str:
    """The commit that this process measures, or an empty text outside of a repository."""
    place = Path(__file__).parents[2]
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=place, capture_output=True, text=True
    )
    return found.stdout.strip() if found.returncode == 0 else ""


def say(text: str) -> None:
    """A line of progress, on stderr: the report alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)
