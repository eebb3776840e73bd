"""A row of another home is accepted if a log could have written it; else the fault is named."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.record.ingest import checks
from agentpref.record.ingest.checks import message_fault, row_fault, tidy
from agentpref.record.messages import RUN_COLUMNS, node_id, prompt_of, run_row
from agentpref.types import Run

ASK = {"role": "user", "content": "Is it raining?"}
RUN = run_row(Run("r", "n", 1.0, prompt_of([ASK]), {"role": "assistant", "content": "Yes."}))
ROWS: dict[str, dict[str, Any]] = {
    "run": dict(zip(RUN_COLUMNS, RUN, strict=False)),
    "feedback": {
        "feedback_id": "f", "run_id": "r", "created_at": 1.0, "key": "k", "score": 1.0,
        "value": '{"x":1}', "comment": None, "source": "human", "user_id": None,
        "correction": None,
    },
    "comparison": {
        "comparison_id": "c", "created_at": 1.0, "run_a": "a", "run_b": "b", "winner": "tie",
        "source": "code", "user_id": "u", "comment": "why",
    },
}  # fmt: skip
NULLABLE = {
    "model", "revision", "thread_id", "trace_id", "user_id", "token_ids", "logprobs", "score",
    "value", "comment", "correction",
}  # fmt: skip


def written(body: Any, parent: str | None = None) -> tuple[str, str | None, bytes]:
    return node_id(parent, body), parent, orjson.dumps(body)


@pytest.mark.parametrize("table", ROWS)
def test_a_row_that_a_log_writes_has_no_fault(table: str) -> None:
    assert row_fault(ROWS[table]) is None


@pytest.mark.parametrize(
    ("table", "name"), [(table, name) for table, row in ROWS.items() for name in row]
)
@given(value=st.none() | st.binary() | st.sampled_from([b"0", b"{}", b"[]", float("nan")]))
def test_bytes_nan_and_null_are_refused_in_a_column_that_cannot_hold_them(
    table: str, name: str, value: Any
) -> None:
    said = row_fault({**ROWS[table], name: value})
    if value is None and name in NULLABLE:
        assert said is None
    else:
        assert said.startswith(f"its {name} is {value!r}"[:40])


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(row_fault({**ROWS["run"], "params": "x" * 10_000})) < 150


@pytest.mark.parametrize("body", [ASK, {"tools": [{"type": "function"}]}])
def test_a_message_or_a_list_of_tools_that_a_log_writes_has_no_fault(body: Any) -> None:
    assert message_fault(*written(body)) is None


def test_a_message_that_is_too_large_is_refused_before_it_is_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "MAX_MESSAGE_BYTES", 20)
    assert "more than the 20 bytes" in str(message_fault(*written(ASK)))


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ({"role": "assistant", "content": "4", "tool_calls": []}, {"content": "4"}),
        ({"role": "assistant", "content": "4", "tool_calls": None}, {"content": "4"}),
        ({"role": "assistant", "content": None, "refusal": None}, {"content": None}),
        (
            {"role": "assistant", "content": "4", "reasoning": "sum", "reasoning_content": None},
            {"content": "4", "reasoning_content": "sum"},
        ),
        (
            {"role": "assistant", "content": "4", "reasoning": "a", "reasoning_content": "b"},
            {"content": "4", "reasoning": "a", "reasoning_content": "b"},
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "c"}]},
            {"tool_calls": [{"id": "c"}]},
        ),
    ],
)
def test_a_message_is_stored_without_what_says_nothing(
    sent: dict[str, Any], kept: dict[str, Any]
) -> None:
    assert tidy(sent) == {"role": "assistant", **kept}


def test_only_an_assistant_reasons() -> None:
    message = {"role": "user", "content": "?", "reasoning": "kept"}
    assert tidy(message) is message
    assert tidy("no message") == "no message"
