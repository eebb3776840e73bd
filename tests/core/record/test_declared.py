"""Only scores under keys that somebody declared are preferences; all others are kept."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.errors import ConfigError, InvalidFeedback, LogClosed
from agentpref.home import Home
from agentpref.prefer.catalog import Catalog
from agentpref.prefer.examples import ExampleSet, read_examples
from agentpref.record import database
from agentpref.record.database import connect
from agentpref.record.declared import declare, undeclare, undeclared, uses
from agentpref.record.integrity import examine
from agentpref.record.log import Log
from agentpref.record.messages import new_id, prompt_of, run_row
from agentpref.record.migrations import STEPS
from agentpref.record.store import Store
from agentpref.types import Feedback, Run

ASKED = [{"role": "user", "content": "2 + 2?"}]
SCALES = {"stars": (1.0, 5.0), "mood": (-1.0, 1.0), "score": (0.0, 1.0)}


def found(home: Home, namespace: str = "default") -> ExampleSet:
    with closing(connect(home)) as connection:
        return read_examples(Store(connection), namespace, held_out=0)


def give(log: Log, key: str, *scores: Any, **fields: Any) -> None:
    for score in scores:
        asked = [{"role": "user", "content": f"{key} {new_id()}?"}]
        log.feedback(log.record(asked, "4"), key=key, score=score, **fields)


def liked(home: Home) -> list[float | None]:
    return [one.completions[0].label for one in found(home).thumbs]


def test_an_undeclared_key_is_kept_and_counted_whatever_its_scores(log: Log) -> None:
    give(log, "latency", 0.3, 99, -4)
    give(log, "helpful", True, 0)
    give(log, "quality", 0.5, source="model")
    assert found(log.home) == ExampleSet((), {"undeclared_key": 6})
    with closing(connect(log.home)) as connection:
        assert undeclared(connection, "default") == {"helpful": 2, "latency": 3, "quality": 1}
        assert undeclared(connection, "elsewhere") == {}
    assert log.verify() == []


def test_scores_count_once_their_key_is_declared_also_those_from_before(log: Log) -> None:
    give(log, "stars", 4, 3, 1)
    log.declare("stars", low=1, high=5)
    give(log, "stars", 5)
    assert liked(log.home) == [1.0, 0.0, 1.0]
    assert found(log.home).left_out == {"neutral_score": 1}
    with pytest.raises(InvalidFeedback, match="score 6 does not fit the key 'stars': since 20"):
        give(log, "stars", 6)


def test_a_declaration_holds_for_all_sources_of_one_namespace(log: Log) -> None:
    log.declare("stars", low=1, high=5)
    give(log, "stars", 4, source="code")
    assert found(log.home).left_out == {}
    with Log(log.home.path, namespace="other") as other:
        give(other, "stars", 99)
    assert found(log.home, "other").left_out == {"undeclared_key": 1}


def test_a_bool_under_a_declared_key_is_yes_or_no_whatever_its_scale(log: Log) -> None:
    log.declare("stars", low=1, high=5)
    give(log, "stars", True, False)
    assert liked(log.home) == [1.0, 0.0]


def test_declaring_a_key_again_changes_nothing_and_another_scale_is_refused(log: Log) -> None:
    log.declare("stars", low=1, high=5)
    give(log, "stars", 3)
    log.declare("stars", low=1.0, high=5.0)
    with pytest.raises(ConfigError, match="are from 1 to 5 already; pass replace=True"):
        log.declare("stars", low=0, high=3)
    log.declare("stars", low=0, high=3, replace=True)
    give(log, "stars", 3)
    assert found(log.home).left_out == {"neutral_score": 1}, "the first keeps its scale"
    assert liked(log.home) == [1.0]


def test_a_declaration_is_taken_back(log: Log) -> None:
    log.declare("stars", low=1, high=5)
    give(log, "stars", 5)
    assert log.undeclare("stars") is True
    assert found(log.home).left_out == {"undeclared_key": 1}
    assert log.undeclare("stars") is False
    with pytest.raises(InvalidFeedback, match="thumbs are always preferences"):
        log.undeclare("thumbs")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"key": ""}, "key is ''"),
        ({"key": 7}, "key is 7"),
        ({"key": "retraction"}, "key is retraction; pass the key of scores"),
        ({"key": "correction"}, "key is correction"),
        ({"low": 5, "high": 1}, "the scale is from 5 to 1"),
        ({"low": 1, "high": 1}, "the scale is from 1 to 1"),
        ({"high": float("inf")}, "the scale is from 0 to inf"),
        ({"high": float("nan")}, "the scale is from 0 to nan"),
        ({"low": "1"}, "low is a str of 1 characters"),
        ({"high": True}, "high True"),
        ({"key": "thumbs", "low": 1, "high": 5}, "thumbs are from 0 to 1 or from -1 to 1"),
    ],
)
def test_what_is_no_key_or_no_scale_is_refused(
    log: Log, arguments: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InvalidFeedback, match=complaint):
        log.declare(**{"key": "stars", **arguments})


def test_a_closed_log_declares_nothing(tmp_path: Path) -> None:
    log = Log(tmp_path / "home")
    log.close()
    with pytest.raises(LogClosed):
        log.declare("stars")
    with pytest.raises(LogClosed):
        log.undeclare("stars")


def test_the_uses_of_keys_are_listed_with_their_scales(log: Log) -> None:
    log.declare("stars", low=1, high=5)
    give(log, "stars", 4, 2)
    give(log, "latency", 9, source="code")
    log.thumbs(log.record(ASKED, "4"), up=True)
    with closing(connect(log.home)) as connection:
        listed = [(*use[:4], use.scores, use.declared) for use in uses(connection, "default")]
    assert listed == [
        ("latency", "code", None, None, 1, False),
        ("stars", "code", 1, 5, 0, True),
        ("stars", "human", 1, 5, 2, True),
        ("stars", "model", 1, 5, 0, True),
        ("thumbs", "human", 0, 1, 1, True),
    ]


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    with closing(connect(Home.create(tmp_path_factory.mktemp("home")))) as connection:
        for number in range(4):
            prompt = prompt_of([{"role": "user", "content": f"question {number}"}])
            answer = {"role": "assistant", "content": "answer"}
            Store(connection).add_run(Run(f"r{number}", "default", 0.0, prompt, answer))
        yield connection


DEEDS = st.lists(
    st.tuples(st.just("declare"), st.sampled_from([*SCALES]), st.none())
    | st.tuples(st.just("undeclare"), st.sampled_from([*SCALES]), st.none())
    | st.tuples(st.just("score"), st.sampled_from([*SCALES]), st.sampled_from([-1, 0, 1, 3, 5])),
    max_size=14,
)


@given(DEEDS)
@settings(deadline=None, max_examples=80)
def test_a_score_counts_if_its_key_is_declared_now_and_it_is_on_its_scale(
    connection: sqlite3.Connection, deeds: list[tuple[str, str, float | None]]
) -> None:
    """Whether before or after the score, in one reading and in the list that the home keeps."""
    connection.execute("BEGIN")
    try:
        declared: set[str] = set()
        given: list[tuple[str, float]] = []
        for number, (deed, key, score) in enumerate(deeds):
            low, high = SCALES[key]
            if deed == "declare":
                declare(connection, "default", key, (low, high))
                declared.add(key)
            elif deed == "undeclare":
                assert undeclare(connection, "default", key) == (key in declared)
                declared.discard(key)
            else:
                assert score is not None
                row = Feedback(
                    f"f{number}", f"r{number % 4}", number, key, score, user_id=f"{number}"
                )
                if key in declared and not low <= score <= high:
                    with pytest.raises(InvalidFeedback):
                        Store(connection).add_feedback(row)
                else:
                    Store(connection).add_feedback(row)
                    given.append((key, score))
            catalog = Catalog(connection, "default", held_out=0)
            catalog.refresh()
            left_out = read_examples(Store(connection), "default", held_out=0).left_out
            assert catalog.left_out() == left_out
        known = [(key, score) for key, score in given if key in declared]
        off = [key for key, score in known if not SCALES[key][0] <= score <= SCALES[key][1]]
        assert left_out_of(connection, "undeclared_key") == len(given) - len(known)
        assert left_out_of(connection, "unknown_scale") == len(off)
    finally:
        connection.execute("ROLLBACK")


def left_out_of(connection: sqlite3.Connection, reason: str) -> int:
    return read_examples(Store(connection), "default", held_out=0).left_out.get(reason, 0)


def test_keys_of_an_older_home_whose_scores_had_a_scale_go_on_to_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that people scored; a program's measurements had none, and a lone 1 shows none."""
    home = Home.create(tmp_path / "home")
    version = next(s.version for s in STEPS if s.name == "declared_keys_and_traces")
    rows = [
        ("a", "smile", "human", -1, "[-1.0,1.0]"), ("b", "helpful", "human", 1, "[0.0,1.0]"),
        ("c", "stars", "human", 5, "[1.0,5.0]"), ("d", "stars", "human", 4, "[null,null]"),
        ("e", "latency", "code", 3, None), ("f", "grade", "human", 9, "[null,null]"),
        ("g", "once", "human", 1, None), ("h", "quality", "model", 0.9, "[0.0,1.0]"),
    ]  # fmt: skip
    scales = [("smile", -1.0, 1.0), ("helpful", 0.0, 1.0)]
    scales += [(key, -float("inf"), float("inf")) for key in ("stars", "grade")]
    with monkeypatch.context() as patch:
        patch.setattr(database, "STEPS", STEPS[: version - 1])
        with closing(connect(home)) as old:
            answer = {"role": "assistant", "content": "4"}
            row = run_row(Run("r", "default", 0.5, prompt_of(ASKED), answer))
            Store(old).add_runs([row])
            for name, key, source, score, scale in rows:
                old.execute(
                    "INSERT INTO feedback (feedback_id, run_id, created_at, key, score, source,"
                    " user_id, scale) VALUES (?, 'r', 1, ?, ?, ?, ?, ?)",
                    (name, key, score, source, name, scale),
                )
            for key, low, high in scales:
                values = ("default", key, "human", low, high, 1.0)
                old.execute("INSERT INTO feedback_scale VALUES (?, ?, ?, ?, ?, ?)", values)
    with closing(connect(home)) as new:
        declared = {use.key: (use.low, use.high) for use in uses(new, "default") if use.declared}
        assert declared == {"smile": (-1, 1), "helpful": (0, 1), "stars": (1, 5)}
        assert undeclared(new, "default") == {"grade": 1, "latency": 1, "once": 1, "quality": 1}
        assert left_out_of(new, "undeclared_key") == 4
        no_seal = "it has no seal: another program wrote or changed it"  # this test did
        assert {problem.what for problem in examine(new).problems} == {no_seal}
