"""Runs that other libraries hand over are kept, in the form that templates read."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

import pytest

from agentpref.errors import InvalidMessage
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.types import Run

RunsOf: TypeAlias = "Callable[[Log], list[Run]]"

ASKED = [{"role": "user", "content": "2 + 2?"}]


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Log]:
    with Log(tmp_path / "strict", strict=True) as log:
        yield log


@pytest.mark.guarantee("logging")
def test_a_run_with_values_that_json_cannot_hold_is_kept_and_counted(
    log: Log, runs_of: RunsOf, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [{"role": "user", "content": "half \ud83d", "sent": {1: b"ab"}}]
    with caplog.at_level(logging.WARNING, "agentpref"):
        for _ in range(2):
            log.record(asked, "whole \ud83d\ude00", metadata={"n": 2**70}, tags=("a",))
        log.record(ASKED, "whole \ud83d\ude00")
    first, _, third = runs_of(log)
    assert first.prompt.messages == (
        {"role": "user", "content": "half \ufffd", "sent": {"1": "YWI="}},
    )
    assert first.output["content"] == third.output["content"] == "whole 😀"
    assert (first.metadata, first.tags) == ({"n": str(2**70)}, ("a",))
    assert log.altered == dict.fromkeys(("surrogate", "key", "object", "integer"), 2)
    assert log.dropped == {}
    assert len(caplog.records) == 4, "one warning for the first run of each kind"


def test_objects_and_numbers_that_json_cannot_hold_are_counted_where_nothing_else_is_wrong(
    log: Log, runs_of: RunsOf
) -> None:
    log.record(ASKED, "4", params={"t": math.nan}, metadata={"s": {1}, "deep": [[math.inf]]})
    log.record(ASKED, "4", metadata={"s": {1}})
    log.record(ASKED, "4", metadata={"n": 1.5}, logprobs=[-math.inf])
    first, second, _ = runs_of(log)
    assert (first.params, first.metadata) == ({"t": None}, {"s": "{1}", "deep": [[None]]})
    assert second.metadata == {"s": "{1}"}
    assert log.altered == {"number": 1, "object": 2}


class Hostile:
    """Its ``repr`` raises what no ``except Exception`` catches, as an extension in Rust may."""

    def __init__(self, raised: type[BaseException]) -> None:
        self.raised = raised

    def __repr__(self) -> str:
        raise self.raised


class Panic(BaseException):
    pass


@pytest.mark.guarantee("logging", "CancelledError, SystemExit, GeneratorExit, a panic in Rust")
@pytest.mark.parametrize(
    "raised", [asyncio.CancelledError, SystemExit, GeneratorExit, Panic, RecursionError]
)
def test_whatever_the_methods_of_a_value_raise_the_run_is_kept(
    log: Log, runs_of: RunsOf, raised: type[BaseException]
) -> None:
    log.record(ASKED, "4", params={"x": Hostile(raised)}, metadata={"y": [Hostile(raised)]})
    assert "Hostile" in runs_of(log)[0].params["x"]
    assert log.altered == {"object": 1}


def test_ctrl_c_while_a_value_is_looked_at_passes(log: Log) -> None:
    with pytest.raises(KeyboardInterrupt):
        log.record(ASKED, "4", params={"x": Hostile(KeyboardInterrupt)})


def test_a_strict_log_takes_a_split_character_and_no_other_change(
    strict: Log, runs_of: RunsOf
) -> None:
    strict.record(ASKED, "whole \ud83d\ude00")
    with pytest.raises(InvalidMessage, match="Dict key must be str"):
        strict.record(ASKED, "4", metadata={1: 2})  # type: ignore[dict-item]
    assert [run.output["content"] for run in runs_of(strict)] == ["whole 😀"]
    assert strict.altered == {}


class Own(str):
    """A string of an app's own class, which says of itself what it likes."""

    __slots__ = ()

    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __len__ = __bool__ = isprintable = __str__  # type: ignore[assignment]


def test_an_id_of_an_apps_own_class_is_the_text_that_it_extends(log: Log, runs_of: RunsOf) -> None:
    name = log.record(ASKED, "4", run_id=Own("mine"))
    assert type(name) is str
    assert [run.run_id for run in runs_of(log)] == [name] == ["mine"]


def test_a_message_of_vllm_or_openai_is_stored_as_templates_read_it(
    log: Log, runs_of: RunsOf
) -> None:
    sent = {"role": "assistant", "content": "4", "refusal": None, "tool_calls": []}
    sent |= {"function_call": None, "reasoning": "2 and 2"}
    kept = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    run_id = log.record([*ASKED, sent, *ASKED], sent)
    log.correct(run_id, sent)
    (run,) = runs_of(log)
    assert run.output == run.prompt.messages[1] == kept
    with closing(connect(log.home, readonly=True)) as connection:
        (corrected,) = Store(connection).feedback("default")
    assert corrected.correction == kept
