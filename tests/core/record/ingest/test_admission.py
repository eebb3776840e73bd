"""A row from elsewhere is let in if a log could have written it, and else refused in words."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.record.ingest import admission
from agentpref.record.ingest.admission import comparison_fault, feedback_fault, role_of, run_fault
from agentpref.record.messages import node_id, prompt_of
from agentpref.record.rows import RUN_COLUMNS, run_row
from agentpref.types import Run

ASK = {"role": "user", "content": "Is it raining?"}
RUN = run_row(Run("r", "n", 1.0, prompt_of([ASK]), {"role": "assistant", "content": "Yes."}))
ROWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "run": (run_fault, dict(zip(RUN_COLUMNS, RUN, strict=False))),
    "feedback": (
        feedback_fault,
        {
            "feedback_id": "f", "run_id": "r", "created_at": 1.0, "key": "k", "score": 1.0,
            "value": '{"x":1}', "comment": None, "source": "human", "user_id": None,
            "correction": None,
        },
    ),
    "comparison": (
        comparison_fault,
        {
            "comparison_id": "c", "created_at": 1.0, "run_a": "a", "run_b": "b", "winner": "tie",
            "source": "code", "user_id": "u", "comment": "why",
        },
    ),
}  # fmt: skip
NULLABLE = {
    "model", "revision", "thread_id", "trace_id", "user_id", "token_ids", "logprobs", "score",
    "value", "comment", "correction",
}  # fmt: skip


def written(body: Any, parent: str | None = None) -> tuple[str, str | None, bytes]:
    return node_id(parent, body), parent, orjson.dumps(body)


@pytest.mark.parametrize("table", ROWS)
def test_what_a_log_writes_has_no_fault(table: str) -> None:
    fault, row = ROWS[table]
    assert fault(row) is None


@pytest.mark.parametrize(
    ("table", "name"), [(table, name) for table, (_, row) in ROWS.items() for name in row]
)
@given(value=st.none() | st.binary() | st.just(float("nan")))
def test_no_column_may_hold_anything(table: str, name: str, value: Any) -> None:
    fault, row = ROWS[table]
    said = fault({**row, name: value})
    if value is None and name in NULLABLE:
        assert said is None
    else:
        assert said.startswith(f"its {name} is {value!r}"[:40])


def test_a_long_value_is_not_repeated_in_full() -> None:
    fault, row = ROWS["run"]
    assert len(fault({**row, "params": "x" * 10_000})) < 150


def test_a_message_is_known_by_its_role() -> None:
    assert role_of(*written(ASK)) == "user"
    assert role_of(*written({"tools": [{"type": "function"}]})) == "tools"


def test_a_message_that_is_too_large_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "MAX_MESSAGE_BYTES", 20)
    with pytest.raises(ValueError, match="more than the 20 bytes"):
        role_of(*written(ASK))
