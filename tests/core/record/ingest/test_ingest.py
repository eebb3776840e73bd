"""Every record on disk is checked and redacted, and has a pseudonym instead of a user's id."""

from __future__ import annotations

from enum import Enum
from typing import Any
from uuid import UUID

import numpy as np
import orjson
import pytest

from agentpref.errors import InvalidFeedback, InvalidMessage, RedactionFailed
from agentpref.record.ingest import (
    DETAILS,
    IDS,
    Ingest,
    RawRun,
    freeze,
    freeze_what_can_be_kept,
)
from agentpref.record.ingest.checks import checked
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.messages import RunRow, prompt_of, run_row
from agentpref.types import Comparison, Feedback, Prompt, Run

PARTS = ("messages", "output", "tools", *DETAILS)
PSEUDONYMS = Pseudonyms([b"k" * 32])
ASKED = [{"role": "user", "content": "I am Ann"}]
ANSWER = {"role": "assistant", "content": "Hello Ann"}


class Hostile(float):
    """A number whose methods raise."""

    def __float__(self) -> float:
        raise RuntimeError("never a number")


def hide(text: str) -> str:
    return text.replace("Ann", "[name]")


def admitted(ingest: Ingest | None = None, **parts: Any) -> RunRow:
    given = {"messages": ASKED, "output": "Hello Ann", "tools": (), "tags": ()} | parts
    body, _ = freeze(*(given.get(name) for name in PARTS))
    entry = (ingest or Ingest("n", PSEUDONYMS)).prepare(RawRun("r", 1.0, body))
    assert isinstance(entry, RunRow)
    return entry


def test_a_raw_run_becomes_the_row_that_the_store_would_make() -> None:
    body, _ = freeze(ASKED, "Hello Ann", *(None for _ in PARTS[2:]))
    entry = Ingest("n", PSEUDONYMS).prepare(RawRun("r", 1.0, body))
    assert entry == run_row(Run("r", "n", 1.0, prompt_of(ASKED), ANSWER))


def test_a_prompt_s_id_is_computed() -> None:
    forged = Run("r", "n", 1.0, Prompt("0" * 32, tuple(ASKED)), ANSWER)
    assert run_row(forged).prompt == prompt_of(ASKED).id


@pytest.mark.guarantee("privacy")
def test_user_ids_become_pseudonyms() -> None:
    assert admitted(user_id="ann").user_id == PSEUDONYMS.name("ann")
    assert admitted(user_id=7).user_id == PSEUDONYMS.name("7")
    assert admitted().user_id is None
    feedback = Ingest("n", PSEUDONYMS).prepare(Feedback("f", "r", 1.0, "k", 1.0, user_id="ann"))
    comparison = Ingest("n", PSEUDONYMS).prepare(Comparison("c", 1.0, "a", "b", "a", user_id="ann"))
    assert feedback.user_id == comparison.user_id == PSEUDONYMS.name("ann")  # type: ignore[union-attr]


@pytest.mark.guarantee("privacy")
def test_every_text_is_redacted() -> None:
    ingest = Ingest("n", PSEUDONYMS, hide)
    row = admitted(
        ingest,
        messages=[{"role": "user", "content": [{"type": "text", "text": "I am Ann"}]}],
        metadata={"signed": "Ann"},
        params={"stop": ["Ann"]},
    )
    assert "Ann" not in repr(row)
    assert row.prompt == prompt_of([orjson.loads(node.body) for node in row.nodes[:-1]]).id
    said = Feedback("f", "r", 1.0, "k", value=["Ann"], comment="Ann", correction=ANSWER)
    assert b"Ann" not in orjson.dumps(ingest.prepare(said))
    judged = Comparison("c", 1.0, "a", "b", "a", comment="Ann")
    assert b"Ann" not in orjson.dumps(ingest.prepare(judged))


def test_token_ids_of_a_redacted_answer_are_dropped() -> None:
    ingest = Ingest("n", PSEUDONYMS, hide)
    changed = admitted(ingest, token_ids=[1, 2], logprobs=[-1.0, -2.0])
    assert (changed.token_ids, changed.logprobs) == (None, None)
    same = admitted(ingest, output="Hello", token_ids=[1, 2], logprobs=[-1.0, -2.0])
    assert (same.token_ids, same.logprobs) == ("[1,2]", "[-1.0,-2.0]")


@pytest.mark.guarantee("privacy")
def test_a_run_is_refused_when_the_redactor_fails() -> None:
    def fail(text: str) -> str:
        raise ZeroDivisionError

    with pytest.raises(RedactionFailed, match="ZeroDivisionError"):
        admitted(Ingest("n", PSEUDONYMS, fail))


@pytest.mark.parametrize("name", ["tools", "tags", "params", "metadata", "token_ids", "logprobs"])
def test_a_detail_that_is_none_is_stored_as_empty(name: str) -> None:
    empty = {"params": "{}", "metadata": "{}", "tags": "[]"}
    assert getattr(admitted(**{name: None}), name, None) == empty.get(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tags", "maths"), ("tags", [1]), ("token_ids", [1.5]), ("logprobs", ["x"]), ("params", [1])],
)
def test_a_wrong_detail_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidMessage, match=f"{name} is "):
        admitted(**{name: value})


class Colour(str, Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("ann", "ann"), (7, "7"), (7.5, "7.5"), (np.int64(7), "7"), (np.str_("ann"), "ann"),
        (UUID(int=7), str(UUID(int=7))), (Colour.RED, "red"), (True, "True"),
    ],
)  # fmt: skip
def test_an_id_is_written_alike_in_runs_and_judgements(given: Any, text: str) -> None:
    judged = checked(Feedback("f", "r", 1.0, "k", 1.0, user_id=given))
    assert judged.user_id == text
    assert admitted(user_id=given).user_id == PSEUDONYMS.name(text)
    assert admitted(thread_id=given).thread_id == text


@pytest.mark.parametrize("given", [object(), {"id": 7}, ["ann"], b"ann", float("nan"), Hostile()])
def test_an_object_is_no_id(given: Any) -> None:
    with pytest.raises(InvalidFeedback, match=r"user_id is .*; pass a string, a number"):
        checked(Feedback("f", "r", 1.0, "k", 1.0, user_id=given))
    for name in IDS:
        with pytest.raises(InvalidMessage, match=rf"{name} is .*; pass a string"):
            admitted(**{name: given})
        parts = {"messages": ASKED, "output": "Hello", "tools": (), "tags": (), name: given}
        body, changes = freeze_what_can_be_kept(*(parts.get(part) for part in PARTS))
        assert changes == {"object": 1}
        row = Ingest("n", PSEUDONYMS).prepare(RawRun("r", 1.0, body))
        assert isinstance(row, RunRow)
        assert getattr(row, name) is None
