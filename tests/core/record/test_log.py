"""The log stores what it is given unchanged, and names what it cannot store."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias
from uuid import UUID

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentpref.errors import (
    ConfigError,
    InvalidFeedback,
    InvalidMessage,
    LogClosed,
    NotAHome,
    RunExists,
    UnknownRun,
)
from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.record import messages
from agentpref.record.database import connect
from agentpref.record.ingest import DETAILS
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback, Run

RunsIn: TypeAlias = "Callable[[Home], list[Run]]"
RunsOf: TypeAlias = "Callable[[Log], list[Run]]"
JudgedIn: TypeAlias = "Callable[[Home], tuple[list[Feedback], list[Comparison]]]"

ASKED = [{"role": "user", "content": "2 + 2?"}]


def pseudonym(log: Log, user_id: str) -> str:
    return Pseudonyms.of(log.home).name(user_id)


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Log]:
    with Log(tmp_path / "strict", strict=True) as log:
        yield log


def test_a_run_is_logged_with_its_feedback_and_comparisons(log: Log, runs_of: RunsOf) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    run_id = log.record(
        ASKED,
        "4",
        model="tiny",
        revision="base",
        thread_id="t",
        trace_id="x",
        user_id="u",
        tools=tools,
        params={"temperature": 0},
        token_ids=[1, 2],
        logprobs=[-0.5, 0],
        tags=["maths"],
        metadata={"n": 1},
    )
    (run,) = runs_of(log)
    assert run.run_id == run_id
    assert run.prompt.messages == tuple(ASKED)
    assert run.prompt.tools == tuple(tools)
    assert run.output == {"role": "assistant", "content": "4"}
    assert (run.model, run.revision, run.user_id) == ("tiny", "base", pseudonym(log, "u"))
    assert (run.thread_id, run.trace_id, run.tag) == ("t", "x", "maths")
    assert (run.token_ids, run.logprobs) == ((1, 2), (-0.5, 0))
    assert (run.params, run.metadata) == ({"temperature": 0}, {"n": 1})


def test_ids_sort_in_the_order_of_recording(log: Log) -> None:
    ids = [log.record(ASKED, str(n)) for n in range(200)]
    assert sorted(ids) == ids
    assert {UUID(each).version for each in ids} == {7}


@pytest.mark.guarantee("logging")
def test_later_changes_by_the_host_are_not_recorded(log: Log, runs_of: RunsOf) -> None:
    asked: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    metadata = {"list": [1]}
    log.record(asked, "hello", metadata=metadata)
    asked[0]["content"][0]["text"] = "changed"
    asked.append({"role": "user", "content": "added"})
    metadata["list"].append(2)
    (run,) = runs_of(log)
    assert run.prompt.messages == ({"role": "user", "content": [{"type": "text", "text": "hi"}]},)
    assert run.metadata == {"list": [1]}


def test_recording_an_id_again_changes_nothing(log: Log, runs_of: RunsOf) -> None:
    assert log.record(ASKED, "4", run_id="mine") == "mine"
    log.record(ASKED, "4", run_id="mine")
    assert [run.output["content"] for run in runs_of(log)] == ["4"]
    assert log.dropped == {}


def test_another_run_under_a_known_id_is_dropped_and_counted(
    log: Log, strict: Log, runs_of: RunsOf
) -> None:
    for each in (log, strict):
        each.record(ASKED, "4", run_id="mine")
    log.record(ASKED, "5", run_id="mine")
    assert [run.output["content"] for run in runs_of(log)] == ["4"]
    assert log.dropped == {"RunExists": 1}
    with pytest.raises(RunExists, match="give each model call an id of its own"):
        strict.record(ASKED, "5", run_id="mine")


@pytest.mark.guarantee("record")
def test_feedback_is_on_disk_when_the_call_returns(log: Log, judged_in: JudgedIn) -> None:
    a, b = log.record(ASKED, "4"), log.record(ASKED, "5")
    log.feedback(a, key="thumbs", score=True, value={"stars": 5}, comment="yes", user_id="u")
    log.correct(b, "four", source="model")
    log.compare(a, b, winner="a", source="code")
    (thumbs, correction), (comparison,) = judged_in(log.home)
    assert (thumbs.run_id, thumbs.key, thumbs.score) == (a, "thumbs", 1.0)
    assert (thumbs.value, thumbs.comment) == ({"stars": 5}, "yes")
    assert thumbs.user_id == pseudonym(log, "u")
    assert (correction.run_id, correction.key, correction.source) == (b, "correction", "model")
    assert correction.correction == {"role": "assistant", "content": "four"}
    assert (comparison.run_a, comparison.run_b, comparison.winner) == (a, b, "a")


def test_thumbs_are_feedback_with_the_score_one_or_zero(log: Log, judged_in: JudgedIn) -> None:
    run_id = log.record(ASKED, "4")
    name = log.thumbs(run_id, up=False, comment="too long", user_id="u")
    log.thumbs(run_id, True, source="model")
    down, up = judged_in(log.home)[0]
    assert (down.feedback_id, down.run_id, down.key) == (name, run_id, "thumbs")
    assert (down.score, down.comment, down.source) == (0.0, "too long", "human")
    assert down.user_id == pseudonym(log, "u")
    assert (up.score, up.comment, up.source) == (1.0, None, "model")
    with pytest.raises(InvalidFeedback, match="up is 1; pass True or False"):
        log.thumbs(run_id, up=1)  # type: ignore[arg-type]


def test_thumbs_takes_a_bool_of_numpy(log: Log, judged_in: JudgedIn) -> None:
    run_id = log.record(ASKED, "4")
    log.thumbs(run_id, up=np.False_)  # type: ignore[arg-type]
    assert judged_in(log.home)[0][0].score == 0.0
    for up in (1, None, "up", np.array([True]), np.int64(1)):
        with pytest.raises(InvalidFeedback, match="up is"):
            log.thumbs(run_id, up=up)  # type: ignore[arg-type]


def test_another_log_can_judge_a_run_that_was_flushed(log: Log, judged_in: JudgedIn) -> None:
    run_id = log.record(ASKED, "4")
    assert log.flush(timeout=30)
    with Log(log.home.path, namespace="elsewhere") as other:
        other.feedback(run_id, key="thumbs", score=0)
    assert judged_in(log.home)[0][0].score == 0.0


@pytest.mark.parametrize(
    "score",
    [
        *(1, 0.5, False, -3, Fraction(1, 4), Decimal("0.25")),
        *(np.True_, np.False_, np.float32(0.5), np.int64(3), np.array(2.0)),
    ],
)
def test_any_finite_real_number_is_a_score(log: Log, score: Any, judged_in: JudgedIn) -> None:
    log.feedback(log.record(ASKED, "4"), key="k", score=score)
    assert judged_in(log.home)[0][0].score == float(score)


@pytest.mark.parametrize(
    "score",
    [
        *("good", "1", math.nan, math.inf, 10**400, 1j, [1]),
        *(b"1", np.str_("1"), np.array([1, 2]), Decimal("NaN"), Decimal("sNaN")),
    ],
)
def test_other_scores_are_refused(log: Log, score: Any, judged_in: JudgedIn) -> None:
    run_id = log.record(ASKED, "4")
    with pytest.raises(InvalidFeedback, match=r"score is .*; pass a"):
        log.feedback(run_id, key="k", score=score)
    assert judged_in(log.home)[0] == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "has no content"),
        ({"score": 1, "key": ""}, "key is ''"),
        ({"score": 1, "source": "oracle"}, "source is a str of 6 characters; use one of"),
        ({"value": object()}, "value is not JSON"),
        ({"score": 1, "comment": "\ud800"}, "comment is not JSON in UTF-8"),
        ({"score": 1, "comment": b"x"}, "comment is a bytes of 1;"),
        ({"comment": b"x"}, "comment is a bytes of 1;"),
        ({"comment": np.array([1, 2])}, "comment is a ndarray"),
        ({"comment": " \n"}, "has no content; pass score=, value= or comment="),
        ({"score": 1, "key": None}, "key is None"),
        ({"value": 1, "key": None}, "key is None"),
    ],
)
def test_invalid_feedback_is_refused_with_the_argument_s_name(
    log: Log, arguments: dict[str, Any], named: str
) -> None:
    run_id = log.record(ASKED, "4")
    with pytest.raises(InvalidFeedback, match=named):
        log.feedback(run_id, **({"key": "k"} | arguments))


def test_words_alone_are_kept_and_are_no_preference(log: Log, judged_in: JudgedIn) -> None:
    run_id = log.record(ASKED, "4")
    log.feedback(run_id, comment="the second line is wrong", user_id="u")
    log.feedback(run_id, key="thumbs", comment="and so is the third")
    first, second = judged_in(log.home)[0]
    assert (first.key, first.score, first.comment) == ("comment", None, "the second line is wrong")
    assert (second.key, second.score, second.comment) == ("thumbs", None, "and so is the third")
    with closing(connect(log.home)) as connection:
        found = read_examples(Store(connection), "default", held_out=0.2)
    assert (found.examples, found.left_out) == ((), {"no_score": 2})
    assert log.verify() == []


SILENT = ["", " \n\t", [], [{"type": "text", "text": " "}], ["", " "], None]
SPEAKING = [
    "4",
    {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function"}]},
    {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}},
    {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
    {"role": "assistant", "content": [{"type": "text", "text": ""}, {"type": "text", "text": "4"}]},
]


@pytest.mark.parametrize("content", SILENT)
def test_a_correction_that_says_nothing_is_refused(
    log: Log, content: Any, judged_in: JudgedIn
) -> None:
    run_id = log.record(ASKED, "5")
    message = {"role": "assistant", "content": content, "tool_calls": [], "reasoning": "hm"}
    outputs: list[Any] = [message, content] if isinstance(content, str) else [message]
    for output in outputs:
        with pytest.raises(InvalidFeedback, match="the correction is empty; pass the answer"):
            log.correct(run_id, output)
    with pytest.raises(InvalidFeedback, match="the correction is empty"):
        log.correct(run_id)
    assert judged_in(log.home)[0] == []


@pytest.mark.parametrize("output", SPEAKING)
def test_a_correction_that_says_something_is_kept(
    log: Log, output: Any, judged_in: JudgedIn
) -> None:
    log.correct(log.record(ASKED, "5"), output)
    assert len(judged_in(log.home)[0]) == 1


@pytest.mark.parametrize("output", [None, 4, {"role": "user", "content": "x"}, "\ud800"])
def test_a_correction_that_is_no_answer_is_refused(log: Log, output: Any) -> None:
    run_id = log.record(ASKED, "4")
    with pytest.raises(InvalidMessage, match="the output"):
        log.correct(run_id, output)


def test_feedback_on_an_unknown_run_is_refused(log: Log, runs_of: RunsOf) -> None:
    run_id = log.record(ASKED, "4")
    for call in (
        lambda: log.feedback("nowhere", key="k", score=1),
        lambda: log.correct("nowhere", "x"),
        lambda: log.compare(run_id, "nowhere", winner="a"),
    ):
        with pytest.raises(UnknownRun, match="'nowhere'"):
            call()
    assert [run.run_id for run in runs_of(log)] == [run_id]


def test_invalid_comparisons_are_refused(log: Log, judged_in: JudgedIn) -> None:
    a, b = log.record(ASKED, "4"), log.record(ASKED, "5")
    other = log.record([{"role": "user", "content": "2 + 3?"}], "5")
    with pytest.raises(
        InvalidFeedback, match=r"winner is a str of 4 characters; use one of 'a', 'b', 'tie'"
    ):
        log.compare(a, b, winner="both")  # type: ignore[arg-type]
    with pytest.raises(InvalidFeedback, match="compared with itself"):
        log.compare(a, a, winner="a")
    with pytest.raises(InvalidFeedback, match="different prompts"):
        log.compare(a, other, winner="a")
    assert judged_in(log.home)[1] == []


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ([], "empty list"),
        ("hi", "messages is a str"),
        ([USER, "hi"], "message 1 is a str"),
        ([USER, {"content": "hi"}], "message 1 has role None"),
        ([{"role": "robot", "content": "hi"}], "message 0 has role a str of 5 characters"),
        ([{"role": ["user"], "content": "hi"}], "message 0 has role"),
        ([{"role": "user", "content": None}], "message 0 has content of type NoneType"),
        ([{"role": "user", "content": b"\xff"}], "message 0 has content of type bytes"),
        ([USER, {"role": "user", "content": "\ud800"}], "message 1 is not JSON in UTF-8"),
        ([USER, {"role": "user", "content": "x", "when": object()}], "message 1 is not JSON"),
    ],
)
def test_invalid_messages_are_refused_by_their_index(
    strict: Log, asked: Any, named: str, runs_of: RunsOf
) -> None:
    strict.record(ASKED, "before")
    with pytest.raises(InvalidMessage, match=named):
        strict.record(asked, "4")
    assert len(runs_of(strict)) == 1
    assert strict.dropped == {}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"output": {"role": "user", "content": "x"}}, "the output has role 'user'"),
        ({"output": 4}, "the output is a int"),
        ({"output": "\udcff"}, "the output is not JSON in UTF-8"),
        ({"tools": "calc"}, "tools is a str"),
        ({"tools": ["calc"]}, "tool 0 is a str"),
        ({"tags": "maths"}, "tags is a str of 5 characters"),
        ({"tags": [1]}, "tags is a list of 1"),
        ({"token_ids": [1.5]}, "token_ids"),
        ({"logprobs": ["x"]}, "logprobs"),
        ({"params": [1]}, "params is a list of 1"),
        ({"metadata": {"x": "\ud800"}}, "metadata are not JSON in UTF-8"),
        ({"run_id": ""}, "run_id is ''"),
        ({"run_id": [7]}, "run_id is a list of 1"),
    ],
)
def test_invalid_arguments_of_record_are_refused_by_name(
    strict: Log, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidMessage, match=named):
        strict.record(ASKED, **({"output": "4"} | arguments))


@pytest.mark.guarantee("logging")
@pytest.mark.parametrize("asked", [[], "hi", [{"role": "robot", "content": "hi"}], [object()]])
def test_a_malformed_run_is_counted_and_logged_and_never_raises(
    log: Log, asked: Any, runs_of: RunsOf, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "agentpref"):
        names = [log.record(asked, "4") for _ in range(12)]
        good = log.record(ASKED, "4")
        assert [run.run_id for run in runs_of(log)] == [good]
    assert len(set(names)) == 12
    assert log.dropped == {"InvalidMessage": 12}
    assert [record.args[0] for record in caplog.records if record.args] == [1, 10]
    with pytest.raises(UnknownRun):
        log.feedback(names[0], key="k", score=1)


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no")


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary()
    | st.builds(Hostile)
    | st.builds(object),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=6,
)


@pytest.mark.guarantee("logging")
@given(
    arguments=st.dictionaries(
        st.sampled_from(["messages", "output", "tools", *DETAILS, "run_id"]), json_like
    )
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_record_raises_nothing_whatever_the_host_passes(
    log: Log, arguments: dict[str, Any]
) -> None:
    log.record(**({"messages": ASKED, "output": "4"} | arguments))
    assert log.flush()
    assert log.verify() == []


def test_a_huge_message_is_refused_and_a_long_conversation_is_kept(
    strict: Log, monkeypatch: pytest.MonkeyPatch, runs_of: RunsOf
) -> None:
    monkeypatch.setattr("agentpref.record.messages.MAX_MESSAGE_BYTES", 100)
    with pytest.raises(InvalidMessage, match=r"message 1 takes \d+ bytes, more than the 100"):
        strict.record([USER, {"role": "user", "content": "x" * 101}], "4")
    strict.record([USER] * 20, "4")
    assert len(runs_of(strict)) == 1
    assert messages.MAX_MESSAGE_BYTES == 100


def test_params_and_metadata_that_json_cannot_hold_are_kept_by_repr(
    log: Log, runs_of: RunsOf
) -> None:
    log.record(
        [MappingProxyType(ASKED[0])],
        MappingProxyType({"role": "assistant", "content": None}),
        thread_id=UUID(int=7),  # type: ignore[arg-type]
        user_id=42,  # type: ignore[arg-type]
        metadata={"model": threading.Lock},
        logprobs=[-math.inf],
    )
    (run,) = runs_of(log)
    assert run.output == {"role": "assistant", "content": None}
    assert (run.thread_id, run.user_id) == (str(UUID(int=7)), pseudonym(log, "42"))
    assert run.metadata == {"model": repr(threading.Lock)}
    assert run.logprobs is not None
    assert math.isnan(run.logprobs[0])


def test_log_verify_checks_a_sample(log: Log) -> None:
    log.record(ASKED, "4")
    assert log.flush()
    with closing(connect(log.home)) as connection:
        connection.execute("UPDATE message SET body = replace(body, '2', '3')")
    assert {problem.table for problem in log.verify(sample=10)} == {"message"}


def test_log_forget_removes_runs_that_are_still_queued(log: Log, runs_of: RunsOf) -> None:
    log.record(ASKED, "4", user_id="ann")
    kept = log.record(ASKED, "5", user_id="ben")
    assert log.forget("ann").runs == 1
    assert [run.run_id for run in runs_of(log)] == [kept]
    log.record(ASKED, "4", user_id="ann")
    assert len(runs_of(log)) == 2
    assert log.verify() == []


async def _log_and_judge(log: Log) -> str:
    run_id = log.record(ASKED, "4")
    return await asyncio.to_thread(log.feedback, run_id, key="k", score=1)


def test_feedback_works_in_a_thread_beside_an_event_loop(log: Log, judged_in: JudgedIn) -> None:
    async def many() -> list[str]:
        return await asyncio.gather(*(_log_and_judge(log) for _ in range(20)))

    ids = asyncio.run(many())
    assert {said.feedback_id for said in judged_in(log.home)[0]} == {*ids}


def test_a_closed_log_drops_runs_and_refuses_feedback(tmp_path: Path, runs_in: RunsIn) -> None:
    with Log(tmp_path / "home") as log:
        run_id = log.record(ASKED, "4")
    log.close()
    log.record(ASKED, "5")
    assert log.dropped == {"LogClosed": 1}
    for call in (
        lambda: log.feedback(run_id, key="k", score=1),
        lambda: log.flush(),
        lambda: log.verify(),
    ):
        with pytest.raises(LogClosed, match=r"open a new one"):
            call()
    assert len(runs_in(log.home)) == 1


def test_a_garbage_collected_log_writes_its_queue(tmp_path: Path, runs_in: RunsIn) -> None:
    log = Log(tmp_path / "home")
    home = log.home
    log.record(ASKED, "4")
    del log
    gc.collect()
    assert len(runs_in(home)) == 1


def test_two_logs_may_open_a_new_home_at_once(tmp_path: Path) -> None:
    logs: list[Log] = []
    starting = [
        threading.Thread(target=lambda: logs.append(Log(tmp_path / "home"))) for _ in range(8)
    ]
    for thread in starting:
        thread.start()
    for thread in starting:
        thread.join()
    assert len(logs) == 8
    for log in logs:
        log.close()


def test_invalid_arguments_of_the_log_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="namespace is ''"):
        Log(tmp_path, namespace="")
    with pytest.raises(ConfigError, match="queue_size is 0"):
        Log(tmp_path, queue_size=0)
    with pytest.raises(ConfigError, match="queue_bytes is 0"):
        Log(tmp_path, queue_bytes=0)
    (tmp_path / "file").touch()
    with pytest.raises(NotAHome, match="file"):
        Log(tmp_path / "file")
