"""A score is read on the scale of its source, which is fixed when it is first seen."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.errors import InvalidFeedback
from agentpref.home import Home
from agentpref.prefer.examples import ExampleSet, read_examples
from agentpref.prefer.exchange import import_file
from agentpref.record import database
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.log import Log
from agentpref.record.messages import new_id, prompt_of, run_row
from agentpref.record.migrations import STEPS
from agentpref.record.scales import SIGNED, UNIT, UNKNOWN, shown_by
from agentpref.record.spill import Spill, drain
from agentpref.record.store import Store
from agentpref.record.transfer.merge import merge
from agentpref.types import Comparison, Feedback, Run

ASKED = [{"role": "user", "content": "2 + 2?"}]
Judged = Callable[[Home], tuple[list[Feedback], list[Comparison]]]


@pytest.mark.parametrize(
    ("scores", "scale"),
    [
        ([1], None),
        ([], None),
        ([0], UNIT),
        ([1, 0.5], UNIT),
        ([1, -1], SIGNED),
        ([0, -1], SIGNED),
        ([0, 0, 1, -1], UNIT),
        ([0.2, 0.7, -0.3], SIGNED),
        ([1, 5], UNKNOWN),
        ([0, -1, 1, 3], UNKNOWN),
    ],
)
def test_scores_show_their_scale(scores: list[float], scale: Any) -> None:
    assert shown_by(scores) == scale


def scores(log: Log, *given: float, **fields: Any) -> None:
    for score in given:
        log.feedback(log.record(ASKED, "4"), score=score, **{"key": "thumbs", **fields})


@pytest.fixture(scope="module")
def shared_log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    with Log(tmp_path_factory.mktemp("shared") / "home") as log:
        yield log


def examples(log: Log) -> ExampleSet:
    log.flush()
    with closing(connect(log.home)) as connection:
        return read_examples(Store(connection), log.namespace, held_out=0)


def scales_of(log: Log, judged_in: Judged) -> list[tuple[float | None, Any]]:
    return [(row.score, row.scale) for row in judged_in(log.home)[0]]


def test_a_stray_minus_1_is_refused_with_the_scale_and_the_cure(
    log: Log, judged_in: Judged
) -> None:
    scores(log, 1, 0)
    with pytest.raises(InvalidFeedback) as refused:
        scores(log, -1)
    said = str(refused.value)
    assert "score -1 does not fit the key 'thumbs': since 20" in said
    assert "source 'human' in namespace 'default' are from 0 to 1; pass a score from 0 to 1" in said
    assert "say so once: log.declare('thumbs', low=-1, high=1, replace=True)" in said
    assert scales_of(log, judged_in) == [(1, UNIT), (0, UNIT)]
    log.declare("thumbs", low=-1, high=1, replace=True)
    scores(log, -1, 0)
    assert scales_of(log, judged_in)[1:] == [(0, UNIT), (-1, SIGNED), (0, SIGNED)]


@pytest.mark.parametrize("score", [99, 0.5, -2, 1.01, np.int64(5), Decimal("0.2")])
def test_a_score_that_is_no_thumb_is_refused_and_switches_nothing_off(
    log: Log, judged_in: Judged, score: Any
) -> None:
    scores(log, 1)
    with pytest.raises(InvalidFeedback, match=f"score is {float(score):g}, but a thumb is 0 or 1"):
        scores(log, score)
    scores(log, 1, 0)
    assert scales_of(log, judged_in) == [(1, UNIT), (1, UNIT), (0, UNIT)]
    assert "unknown_scale" not in examples(log).left_out


@pytest.mark.parametrize(
    ("given", "liked"),
    [
        ((1, 0, True, False), [True, False, True, False]),
        ((1.0, -1, 0), [True, False, None]),
        ((-1, 0, False, 1), [False, None, False, True]),
        ((np.True_, np.False_, np.float32(1), -0.0), [True, False, True, False]),
        ((np.False_, 0), [False, False]),
    ],
)
def test_thumbs_are_read_as_their_source_means_them(
    log: Log, given: tuple[Any, ...], liked: list[bool | None]
) -> None:
    for number, score in enumerate(given):
        asked = [{"role": "user", "content": f"{number}?"}]
        log.feedback(log.record(asked, "4"), key="thumbs", score=score)
    found = examples(log)
    assert [one.completions[0].label for one in found.thumbs] == [
        float(up) for up in liked if up is not None
    ]
    neutral = liked.count(None)
    assert found.left_out == ({"neutral_score": neutral} if neutral else {})


@given(st.lists(st.sampled_from([-1, 0, 1, True, False]), max_size=8))
@settings(deadline=None, max_examples=60)
def test_no_thumb_is_ever_read_as_its_opposite(shared_log: Log, given: list[Any]) -> None:
    """A 1 is never a dislike, a -1 never a like; what does not fit is refused, not guessed."""
    with Log(shared_log.home.path, namespace=new_id()) as log:
        kept: list[Any] = []
        fixes: list[Any] = []  # what tells the scale: any but a plain 1
        for score in given:
            run, is_unit = log.record(ASKED, f"{len(kept)}"), bool(fixes) and fixes[0] != -1
            if score == -1 and is_unit:
                with pytest.raises(InvalidFeedback, match="are from 0 to 1"):
                    log.feedback(run, key="thumbs", score=score)
                continue
            log.feedback(run, key="thumbs", score=score)
            kept.append(score)
            fixes += [score] if score != 1 or score is True else []
        with closing(connect(log.home)) as connection:
            store = Store(connection)
            rows = [*store.feedback(log.namespace)]
            known = store.standards(log.namespace).scales
        assert [row.score for row in rows] == [float(score) for score in kept]
        for row, score in zip(rows, kept, strict=True):
            low, high = row.scale or UNKNOWN
            assert (row.score > (low + high) / 2) == (score == 1)
        assert len(known) <= 1


def test_a_1_says_nothing_of_its_scale(log: Log, judged_in: Judged) -> None:
    scores(log, 1, -1, 0)
    assert scales_of(log, judged_in) == [(1, UNIT), (-1, SIGNED), (0, SIGNED)]


@pytest.mark.parametrize("other", [{"key": "smile"}, {"source": "model"}, {"source": "code"}])
def test_each_key_and_source_has_a_scale_of_its_own(log: Log, other: dict[str, Any]) -> None:
    scores(log, 0)
    scores(log, -1, **other)


def test_each_namespace_has_a_scale_of_its_own(log: Log) -> None:
    scores(log, 0)
    with Log(log.home.path, namespace="other") as other:
        scores(other, -1)


def test_a_thumb_and_a_bool_fix_the_scale_from_0_to_1(log: Log) -> None:
    log.thumbs(log.record(ASKED, "4"), up=True)
    with pytest.raises(InvalidFeedback, match="are from 0 to 1"):
        scores(log, -1)


def test_a_thumb_is_taken_also_where_scores_go_from_minus_1_to_1(
    log: Log, judged_in: Judged
) -> None:
    scores(log, -1)
    log.thumbs(log.record(ASKED, "4"), up=False)
    assert scales_of(log, judged_in) == [(-1, SIGNED), (0, UNIT)]


def test_thumbs_after_a_stray_one_of_an_older_version_count(log: Log, judged_in: Judged) -> None:
    """Older versions took a 99, and no thumb of the namespace counted from then on."""
    scores(log, 1)
    log.flush()
    with closing(connect(log.home)) as connection:
        row = ("default", "thumbs", "human", -float("inf"), float("inf"), 1.0)
        connection.execute("INSERT INTO feedback_scale VALUES (?, ?, ?, ?, ?, ?)", row)
    scores(log, 0, -1, 1)
    assert scales_of(log, judged_in) == [(1, UNIT), (0, UNIT), (-1, SIGNED), (1, UNIT)]
    with pytest.raises(InvalidFeedback, match="a thumb is 0 or 1"):
        scores(log, 99)


def test_measurements_of_programs_have_no_scale(log: Log, judged_in: Judged) -> None:
    scores(log, 0.5, 90, -3, key="latency", source="code")
    scores(log, 0.5, 90, -3, key="seconds")
    assert {scale for _, scale in scales_of(log, judged_in)} == {None}
    assert examples(log).left_out == {"undeclared_key": 6}
    assert log.verify() == []


def test_imported_and_live_scores_do_not_share_a_scale(
    log: Log, judged_in: Judged, tmp_path: Path
) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text('{"prompt": "2 + 2?", "completion": "5", "label": false}\n')
    import_file(log.home, file)
    scores(log, -1)
    assert scales_of(log, judged_in) == [(0, UNIT), (-1, SIGNED)]


def test_merged_scores_keep_their_scale(tmp_path: Path, judged_in: Judged) -> None:
    """Zeros of the other home stay dislikes; new scores are on the scale of this one."""
    with Log(tmp_path / "here") as here, Log(tmp_path / "there") as there:
        there.declare("smile")
        scores(here, -1)
        scores(there, 0)
        scores(there, 0, key="smile")
        there.flush()
        (merged,) = merge(here.home, [there.home])
        assert merged.feedback.added == 2
        assert sorted(scales_of(here, judged_in)) == [(-1, SIGNED), (0, UNIT), (0, UNIT)]
        scores(here, 0)
        assert (0, SIGNED) in scales_of(here, judged_in)
        with pytest.raises(InvalidFeedback, match="'smile'"):
            scores(here, -1, key="smile")
        assert "undeclared_key" not in examples(here).left_out


def test_a_score_that_waited_in_the_spill_is_refused_there(log: Log, judged_in: Judged) -> None:
    scores(log, 0)
    run = log.record(ASKED, "4")
    log.flush()
    late = [Feedback("late", run, 1.0, "thumbs", -1.0), Feedback("odd", run, 1.0, "thumbs", 99.0)]
    Spill(log.home).append(late)
    assert drain(log.home).refused == 2
    assert b"late" in log.home.refused.read_bytes()
    assert b"odd" in log.home.refused.read_bytes()
    assert len(judged_in(log.home)[0]) == 1


def _add_run(old: sqlite3.Connection) -> None:
    """Write a run as a home had it before rows were sealed."""
    answer = {"role": "assistant", "content": "4"}
    row = run_row(Run("r", "default", 0.5, prompt_of(ASKED), answer))
    for node in row.nodes:
        old.execute("INSERT INTO message VALUES (?, ?, ?)", (*node[:2], node[2].decode()))
    old.execute(f"INSERT INTO run VALUES ({', '.join('?' * len(row[:-1]))})", row[:-1])


def test_scores_of_a_home_from_before_get_the_scale_that_they_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judged_in: Judged
) -> None:
    home = Home.create(tmp_path / "home")
    before = next(step.version for step in STEPS if step.name == "scales_and_retractions") - 1
    rows = [
        ("import-1", "thumbs", 0), ("import-2", "thumbs", 1), ("a", "thumbs", -1),
        ("b", "thumbs", 0), ("c", "smile", 0), ("d", "smile", 0), ("e", "smile", -1),
        ("f", "stars", 1), ("g", "stars", 5),
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(database, "STEPS", STEPS[:before])
        with closing(connect(home)) as old:
            _add_run(old)
            for name, key, score in rows:
                query = (
                    "INSERT INTO feedback VALUES (?, 'r', 1, ?, ?, NULL, NULL, 'human', NULL, NULL)"
                )
                old.execute(query, (name, key, score))
    found = {row.feedback_id: row.scale for row in judged_in(home)[0]}
    assert found == {
        "import-1": UNIT, "import-2": UNIT, "a": SIGNED, "b": SIGNED, "c": UNIT, "d": UNIT,
        "e": None, "f": UNKNOWN, "g": UNKNOWN,
    }  # fmt: skip
    with closing(connect(home)) as new:
        built = read_examples(Store(new), "default", held_out=0)
        assert built.left_out["undeclared_key"] == 2, "the stars"
        assert {(s.key, s[2:]) for s in Store(new).standards("default").scales} == {
            ("thumbs", SIGNED), ("smile", UNIT), ("stars", UNKNOWN),
        }  # fmt: skip
        assert examine(new).problems == []


def test_a_home_of_0_1_0_gets_scales_and_can_be_merged(log: Log, tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parents[2] / "data" / "home-0.1.0", tmp_path / "old")
    (merged,) = merge(log.home, [tmp_path / "old"])
    assert merged.feedback.added > 0
    assert log.verify() == []
