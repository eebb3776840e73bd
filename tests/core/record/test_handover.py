"""An exception at each bytecode in turn, as of a signal handler: nothing is locked or lost."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

from agentpref.home import Home
from agentpref.record import handover
from agentpref.record.handover import Signal, Tally
from agentpref.record.log import Log
from agentpref.types import Comparison, Feedback

JudgedIn: TypeAlias = "Callable[[Home], tuple[list[Feedback], list[Comparison]]]"

RECORD = str(Path(handover.__file__).parent)
ASKED = [{"role": "user", "content": "2 + 2?"}]


class Stroke(BaseException):
    """What a handler raises: no Exception, like KeyboardInterrupt."""


def is_struck(step: int, call: Callable[[], object]) -> bool:
    """Call, and raise before the bytecode ``step`` of agentpref's own; whether it got that far."""
    left = step

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(RECORD):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                raise Stroke
        return trace

    sys.settrace(trace)
    try:
        call()
    except Stroke:
        return True
    finally:
        sys.settrace(None)
    return False


def strokes(call: Callable[[], object]) -> Iterator[int]:
    """Interrupt a call at each of its bytecodes in turn, until it comes to its end."""
    for step in count(1):
        if not is_struck(step, call):
            return
        yield step


def test_counting_that_is_interrupted_anywhere_locks_nobody_out() -> None:
    tally = Tally("%d of %s: %s")
    for step in strokes(lambda: tally.add("full", 2, "why")):
        before = tally.counts().get("full", 0)
        other = threading.Thread(target=tally.add, args=("full", 1, "why"), daemon=True)
        other.start()
        other.join(10)
        assert not other.is_alive(), f"interrupted at bytecode {step}"
        assert tally.counts()["full"] == before + 1


def test_a_signal_that_was_interrupted_anywhere_can_be_given_again() -> None:
    signal = Signal()
    for step in strokes(signal.set):
        threading.Thread(target=signal.set, daemon=True).start()
        assert signal.wait(10), f"interrupted at bytecode {step}"
        assert not signal.wait(0)


def test_calls_that_are_interrupted_anywhere_lose_nothing_that_was_acknowledged(
    log: Log, judged_in: JudgedIn
) -> None:
    first = log.record(ASKED, "4")
    said = [log.thumbs(first, up=True)]
    tried = 0
    for call in (
        lambda: log.record(ASKED, "5"),
        lambda: said.append(log.feedback(first, key="k", score=1)),
        lambda: log.flush(10),
        lambda: log.dropped,
    ):
        for step in strokes(call):
            tried += step > 0
            if step % 20 == 0:
                other = threading.Thread(target=log.record, args=(ASKED, "6"), daemon=True)
                other.start()
                other.join(10)
                assert not other.is_alive(), f"interrupted at bytecode {step}"
                said.append(log.thumbs(first, up=False))
    assert log.flush(10)
    assert tried > 300
    assert log.dropped == {}
    assert log.verify() == []
    assert len(said) > 15
    assert {each.feedback_id for each in judged_in(log.home)[0]} >= {*said}
