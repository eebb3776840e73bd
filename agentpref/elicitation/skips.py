"""What people do not want to be asked: a file of lines beside the database, the newest last."""

from __future__ import annotations

import os
from typing import NamedTuple

import orjson

from agentpref.home import Home, open_private, reading, writing


class Skips(NamedTuple):
    """The questions that a voter skipped in a namespace; ``voter`` is empty for nobody named."""

    home: Home
    namespace: str
    voter: str

    def note(self, question: str, *, skipped: bool) -> None:
        """Write down that a question is not to be asked, or is again; it is whole or not there."""
        line = {"namespace": self.namespace, "person": self.voter, "question": question}
        path = self.home.skipped
        with writing(path), open(path, "ab+", opener=open_private) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            cut_off = size > 0 and file.read(1) != b"\n"  # by a crash
            file.write(b"\n" * cut_off + orjson.dumps(line | {"skipped": skipped}) + b"\n")

    def questions(self) -> set[str]:
        """The questions that are not to be asked."""
        if not self.home.skipped.exists():
            return set()
        found: dict[str, bool] = {}
        with reading(self.home.skipped) as file:
            for line in file.read().splitlines():
                try:
                    said = orjson.loads(line)
                except ValueError:  # a line that was cut off by a crash
                    continue
                about = {"namespace": self.namespace, "person": self.voter}
                is_whole = isinstance(said, dict) and said.keys() >= {"question", "skipped"}
                if is_whole and about.items() <= said.items():
                    found[said["question"]] = said["skipped"]
        return {name for name, skipped in found.items() if skipped}
