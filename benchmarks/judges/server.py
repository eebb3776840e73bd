"""A judge in a process of its own, and one that does whatever an answer tells it.

    python -m benchmarks.judges.server --delay .05 --stalls .05 --malformed .05

It prints its address first; when its input ends, it prints how many calls came to what, and ends.
Apart from the client's process, the client's interpreter lock is not the server's, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from agentpref.prefer.judges.asking import Said
from agentpref.testing import JudgeServer
from agentpref.types import Message, Winner

INJECTIONS = Path(__file__).parents[1] / "data" / "injections.txt"

_GRAM = 5
_LEFT = 0.5
"""An order is still there while this share of its character 5-grams is."""


class Injection(NamedTuple):
    """A text that speaks to the judge, the side that it wants, and what in it does so."""

    text: str
    wants: str
    orders: tuple[str, ...]

    def is_in(self, answer: str) -> bool:
        """Whether a reader of the answer still sees one of the orders."""
        shown = _grams(answer)
        return any(len(_grams(one) & shown) >= _LEFT * len(_grams(one)) for one in self.orders)


def _grams(text: str) -> set[str]:
    plain = " ".join(text.split()).lower()
    size = min(_GRAM, len(plain))
    return {plain[start : start + size] for start in range(len(plain) - size + 1)}


@cache
def injections() -> tuple[Injection, ...]:
    """The injections of the file, in order."""
    lines = INJECTIONS.read_text(encoding="utf-8").splitlines()
    return tuple(_parsed(line) for line in lines)


def _parsed(line: str) -> Injection:
    wants, _, marked = line.partition("|")
    marked = marked.replace("\\n", "\n")
    orders = [part.partition("⟧")[0] for part in marked.split("⟦")[1:]]
    return Injection(marked.replace("⟦", "").replace("⟧", ""), wants, tuple(orders))


@dataclass
class Gullible(JudgeServer):
    """A judge that obeys every order of the file that it still sees, in whatever language or guise.

    ``obeys`` is about the few orders that :class:`JudgeServer` knows; here both are obeyed. Where
    both answers order something, the first one is obeyed. It is an engine, too, and needs no
    server then.
    """

    def ask(self, messages: Sequence[Message], *, sample: int) -> Said:
        """Answer as it would over HTTP."""
        return Said(self._words(messages)[0])

    def _winner(self, question: str, a: str, b: str) -> Winner:
        if self.obeys:
            sides: tuple[tuple[str, Winner], ...] = ((a, "a"), (b, "b"))
            for answer, side in sides:
                for one in injections():
                    if one.is_in(answer):
                        return {"A": "a", "B": "b"}.get(one.wants, side)  # type: ignore[return-value]
        return super()._winner(question, a, b)


class Served(NamedTuple):
    """A judge in another process."""

    url: str
    process: subprocess.Popen[str]

    def calls(self) -> dict[str, int]:
        """End it, and say how many calls came to what."""
        said, _ = self.process.communicate(timeout=30)
        return dict(json.loads(said.splitlines()[-1]))


@contextmanager
def served(**faults: float) -> Iterator[Served]:
    """A judge in another process, for a block."""
    given = [word for name, value in faults.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.judges.server", *given],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout is not None
        yield Served(process.stdout.readline().strip(), process)
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("delay", "stalls", "stall", "malformed", "busy", "noise", "position"):
        parser.add_argument(f"--{name}", type=float, default=5.0 if name == "stall" else 0.0)
    parser.add_argument("--seed", type=int, default=0)
    # Sixteen clients connect at once, and an answer that waits for an acknowledgement waits 40 ms.
    ThreadingHTTPServer.request_queue_size = 128
    BaseHTTPRequestHandler.disable_nagle_algorithm = True
    with JudgeServer(**vars(parser.parse_args())) as judge:
        print(judge.url, flush=True)
        sys.stdin.read()
        print(json.dumps(judge.calls), flush=True)


if __name__ == "__main__":
    main()
