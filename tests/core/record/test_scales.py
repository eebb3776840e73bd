"""A score is read on the scale of its source, which is fixed when it is first seen."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentpref.errors import InvalidFeedback
from agentpref.home import Home
from agentpref.prefer.exchange import import_file
from agentpref.record import database
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.log import Log
from agentpref.record.messages import prompt_of, run_row
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


def scales_of(log: Log, judged_in: Judged) -> list[tuple[float | None, Any]]:
    return [(row.score, row.scale) for row in judged_in(log.home)[0]]


def test_a_stray_score_is_refused_with_the_scale_and_the_cure(log: Log, judged_in: Judged) -> None:
    scores(log, 1, 0)
    with pytest.raises(InvalidFeedback) as refused:
        scores(log, -1)
    said = str(refused.value)
    assert "score -1 does not fit the key 'thumbs': since 20" in said
    assert "source 'human' in namespace 'default' are from 0 to 1; pass a score from 0 to 1" in said
    assert "or say on which other scale it is, for example scale=(1, 5)" in said
    assert scales_of(log, judged_in) == [(1, None), (0, UNIT)]


def test_a_1_says_nothing_of_its_scale(log: Log, judged_in: Judged) -> None:
    scores(log, 1, -1, 0)
    assert scales_of(log, judged_in) == [(1, None), (-1, SIGNED), (0, SIGNED)]
    with pytest.raises(InvalidFeedback, match="from -1 to 1"):
        scores(log, 5)


@pytest.mark.parametrize(
    "other", [{"key": "smile"}, {"source": "model"}, {"key": "k", "source": "human"}]
)
def test_each_key_and_source_has_a_scale_of_its_own(log: Log, other: dict[str, Any]) -> None:
    scores(log, 0)
    scores(log, -1, **other)


def test_each_namespace_has_a_scale_of_its_own(log: Log) -> None:
    scores(log, 0)
    with Log(log.home.path, namespace="other") as other:
        scores(other, -1)


def test_a_thumb_and_a_bool_fix_the_scale_from_0_to_1(log: Log) -> None:
    log.thumbs(log.record(ASKED, "4"), up=True)
    scores(log, True, key="liked")
    for key in ("thumbs", "liked"):
        with pytest.raises(InvalidFeedback, match="are from 0 to 1"):
            scores(log, -1, key=key)


def test_a_thumb_is_taken_also_where_scores_go_from_minus_1_to_1(
    log: Log, judged_in: Judged
) -> None:
    scores(log, -1)
    log.thumbs(log.record(ASKED, "4"), up=False)
    assert scales_of(log, judged_in) == [(-1, SIGNED), (0, UNIT)]


def test_a_score_that_names_its_scale_is_never_a_stray(log: Log, judged_in: Judged) -> None:
    scores(log, 0)
    scores(log, 2, scale=(1, 5))
    assert scales_of(log, judged_in) == [(0, UNIT), (2, (1, 5))]


def test_the_scale_of_stars_is_named_once(log: Log, judged_in: Judged) -> None:
    scores(log, 2, key="stars", scale=(1, 5))
    scores(log, 4, key="stars")
    assert scales_of(log, judged_in) == [(2, (1, 5)), (4, (1, 5))]
    with pytest.raises(InvalidFeedback, match="from 1 to 5"):
        scores(log, 0, key="stars")


@pytest.mark.parametrize("scale", [(5, 1), (1, 1), (0, float("inf")), "15", (1, 2, 3), (0, "x")])
def test_a_scale_that_is_none_is_refused(log: Log, scale: Any) -> None:
    with pytest.raises(InvalidFeedback):
        scores(log, 1, scale=scale)


def test_a_score_outside_the_scale_that_it_names_is_refused(log: Log) -> None:
    with pytest.raises(InvalidFeedback, match="score is 0, outside the scale from 1 to 5"):
        scores(log, 0, scale=(1, 5))


def test_measurements_of_programs_have_no_scale(log: Log, judged_in: Judged) -> None:
    scores(log, 0.5, 90, -3, key="latency", source="code")
    assert {scale for _, scale in scales_of(log, judged_in)} == {None}
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


def test_a_score_that_waited_in_the_spill_is_refused_there(log: Log, judged_in: Judged) -> None:
    scores(log, 0)
    run = log.record(ASKED, "4")
    log.flush()
    Spill(log.home).append([Feedback("late", run, 1.0, "thumbs", -1.0)])
    assert drain(log.home).refused == 1
    assert b"late" in log.home.refused.read_bytes()
    assert len(judged_in(log.home)[0]) == 1


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
            output = {"role": "assistant", "content": "4"}
            Store(old).add_runs([run_row(Run("r", "default", 1.0, prompt_of(ASKED), output))])
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
        assert {(s.key, s[2:]) for s in Store(new).scales("default")} == {
            ("thumbs", SIGNED), ("smile", UNIT), ("stars", UNKNOWN),
        }  # fmt: skip
        assert examine(new).problems == []


def test_a_home_of_0_1_0_gets_scales_and_can_be_merged(log: Log, tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parents[2] / "data" / "home-0.1.0", tmp_path / "old")
    (merged,) = merge(log.home, [tmp_path / "old"])
    assert merged.feedback.added > 0
    assert log.verify() == []
