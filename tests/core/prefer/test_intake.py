"""Runs and scores of other products: what becomes of each row, whatever comes how often."""

from __future__ import annotations

import io
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.errors import ConfigError, ExchangeError
from agentpref.home import Home
from agentpref.prefer.examples import ExampleSet, read_examples
from agentpref.prefer.exchange import Imported, export_file, file_examples, import_file
from agentpref.record.database import connect
from agentpref.record.integrity import examine
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.types import Feedback, Run

EXPORTS = Path(__file__).parent / "exports"
RUNS = ("langfuse_observations.jsonl", "langsmith_runs.jsonl", "otlp_spans.json",
        "mlflow_trace.json", "phoenix_spans.jsonl", "open_webui.json")  # fmt: skip
SCORES = ("langfuse_scores.jsonl", "langfuse_scores.csv", "langsmith_feedback.jsonl",
          "otlp_logs.jsonl", "phoenix_annotations.jsonl")  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home")


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def counts(done: Imported) -> tuple[int, int, int]:
    return done.added, done.known, done.bad


def runs(home: Home, namespace: str = "default") -> list[Run]:
    with closing(connect(home)) as connection:
        return [*Store(connection).runs(namespace)]


def feedback(home: Home, namespace: str = "default") -> list[Feedback]:
    with closing(connect(home)) as connection:
        return [*Store(connection).feedback(namespace)]


def examples(home: Home) -> ExampleSet:
    with closing(connect(home)) as connection:
        return read_examples(Store(connection), "default", held_out=0.2)


def held(home: Home) -> tuple[Any, ...]:
    """Everything that an import adds, in an order of its own; not the names of the files."""
    with closing(connect(home)) as connection:
        assert examine(connection).problems == []
        store = Store(connection)
        found = [{**run.metadata, "imported_from": None} for run in store.runs("default")]
        ids = [run.run_id for run in store.runs("default")]
        said = sorted(row.feedback_id for row in store.feedback("default"))
        compared = sorted(row.comparison_id for row in store.comparisons("default"))
    return sorted(zip(ids, map(repr, found), strict=True)), said, compared


def observation(number: int, answer: str = "At nine.", **more: Any) -> dict[str, Any]:
    asked = [{"role": "user", "content": "When do you open?"}]
    return {
        "id": f"o{number}", "traceId": f"t{number}", "type": "GENERATION", "input": asked,
        "startTime": f"2026-11-01T08:00:{number:02d}Z", "output": answer, **more,
    }  # fmt: skip


def score(number: int, value: float, at: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "id": f"s{number}", "name": "user-feedback", "source": "API", "dataType": "BOOLEAN",
        "value": value, "traceId": f"t{number}", "updatedAt": f"2026-11-02T08:{at:02d}:00Z", **more,
    }  # fmt: skip


@pytest.mark.parametrize("name", [*RUNS, *SCORES])
def test_a_file_that_is_imported_again_adds_nothing(home: Home, name: str) -> None:
    for file in RUNS:
        import_file(home, EXPORTS / file)
    import_file(home, EXPORTS / name)
    before = held(home)
    again = import_file(home, EXPORTS / name)
    assert (again.added, again.bad) == (0, 0)
    assert again.known > 0
    assert held(home) == before


ROWS = [observation(1), observation(2, "Whenever."), score(1, 1), score(2, 0, at=1),
        score(1, 0, at=2), {**observation(3), "type": "SPAN"},
        score(1, 1, at=3, traceId="t9")]  # fmt: skip


@settings(max_examples=10)
@given(st.lists(st.lists(st.sampled_from(range(len(ROWS))), min_size=1, max_size=6), max_size=4))
def test_whatever_was_imported_before_the_end_is_as_if_all_came_at_once(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("homes")
    once, often = Home.create(folder / "once"), Home.create(folder / "often")
    import_file(once, write(folder / "rows.jsonl", *ROWS), skip_bad=True)
    for part in parts:
        import_file(often, write(folder / "part.jsonl", *(ROWS[i] for i in part)), skip_bad=True)
    import_file(often, folder / "rows.jsonl", skip_bad=True)
    assert held(often) == held(once)


def test_a_score_finds_its_run_in_another_file_and_makes_a_pair(home: Home, tmp_path: Path) -> None:
    asked = write(tmp_path / "runs.jsonl", observation(1), observation(2, "Whenever."))
    import_file(home, asked)
    done = import_file(home, write(tmp_path / "scores.jsonl", score(1, 1), score(2, 0)))
    assert counts(done) == (2, 0, 0)
    [pair] = examples(home).pairs
    assert [c.message["content"] for c in pair.completions] == ["At nine.", "Whenever."]
    assert pair.origin == "thumbs"


def test_a_score_that_was_changed_there_supersedes_the_old_one_in_any_order(
    home: Home, tmp_path: Path
) -> None:
    newest, old = score(1, 0, at=30), score(1, 1)
    import_file(home, write(tmp_path / "a.jsonl", observation(1), newest))
    assert counts(import_file(home, write(tmp_path / "b.jsonl", old))) == (1, 0, 0)
    [thumb] = examples(home).thumbs
    assert thumb.completions[0].label == 0
    assert examples(home).left_out == {"superseded": 1}


def test_a_score_without_its_run_is_named_with_its_place_or_counted(
    home: Home, tmp_path: Path
) -> None:
    file = write(tmp_path / "scores.jsonl", observation(1), score(1, 1), score(2, 1))
    with pytest.raises(ExchangeError, match=r"scores.jsonl, line 3: .* import the file with the"):
        import_file(home, file)
    assert runs(home) == [], "a bad row undoes its batch"
    assert counts(import_file(home, file, skip_bad=True)) == (2, 0, 1)


def test_a_run_that_was_changed_there_is_refused_and_stays_as_it_was(
    home: Home, tmp_path: Path
) -> None:
    import_file(home, write(tmp_path / "a.jsonl", observation(1)))
    changed = write(tmp_path / "b.jsonl", observation(1, "At ten."), observation(2))
    with pytest.raises(ExchangeError, match=r"b.jsonl, line 1: .* changed there since"):
        import_file(home, changed)
    assert counts(import_file(home, changed, skip_bad=True)) == (1, 0, 1)
    assert {run.output["content"] for run in runs(home)} == {"At nine."}


def test_two_rows_that_give_one_id_to_two_answers_are_one_run_and_one_bad_row(
    home: Home, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.jsonl", observation(1), observation(1, "At ten."))
    assert counts(import_file(home, file, skip_bad=True)) == (1, 0, 1)


def test_each_namespace_has_runs_and_scores_of_its_own(home: Home, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", observation(1), score(1, 1))
    for namespace in ("a", "b"):
        assert counts(import_file(home, file, namespace=namespace)) == (2, 0, 0)
        assert (len(runs(home, namespace)), len(feedback(home, namespace))) == (1, 1)


def test_tag_source_and_user_of_the_import_stand_above_those_of_the_rows(
    home: Home, tmp_path: Path
) -> None:
    said = score(1, 1, authorUserId="ana")
    file = write(tmp_path / "a.jsonl", observation(1, tags=["theirs"], userId="bob"), said)
    import_file(home, file, tag="ours", source="model", user_id="judge-1")
    import_file(home, file, namespace="as it says")
    [run], [thumb] = runs(home), feedback(home)
    [as_said], [by] = runs(home, "as it says"), feedback(home, "as it says")
    assert (run.tag, thumb.source) == ("ours", "model")
    assert (as_said.tag, by.source) == ("theirs", "human")
    assert len({run.user_id, thumb.user_id, by.user_id}) == 3
    assert run.user_id == as_said.user_id
    assert "bob" not in str(run.user_id)


def test_texts_metadata_and_comments_are_redacted(home: Home, tmp_path: Path) -> None:
    run = observation(1, "Write to ana@example.org.", metadata={"from": "ana@example.org"})
    file = write(tmp_path / "a.jsonl", run, score(1, 1, comment="ask ana@example.org"))
    import_file(home, file, redact=lambda text: text.replace("ana@example.org", "[email]"))
    assert "ana@" not in repr((runs(home), feedback(home)))
    assert runs(home)[0].metadata["from"] == "[email]"


def test_a_score_finds_a_run_that_the_app_logged_here_under_the_same_id(
    home: Home, tmp_path: Path
) -> None:
    run_id = "0198c2a4-0000-7000-8000-00000000000b"
    with Log(home.path, strict=True) as log:
        log.record([{"role": "user", "content": "Who wrote Emma?"}], "Jane Austen.", run_id=run_id)
    done = import_file(home, EXPORTS / "langsmith_runs.jsonl")
    assert counts(done) == (0, 1, 0), "and its run is not added a second time"
    said = {"id": "f1", "run_id": run_id, "key": "user_score", "score": 1,
            "modified_at": "2026-11-04T08:00:00Z"}  # fmt: skip
    import_file(home, write(tmp_path / "f.jsonl", said))
    assert [row.run_id for row in feedback(home)] == [run_id]


def test_a_score_never_reaches_a_run_of_another_namespace(home: Home, tmp_path: Path) -> None:
    with Log(home.path, namespace="theirs", strict=True) as log:
        log.record([{"role": "user", "content": "x"}], "y", run_id="r1", trace_id="r1")
    said = {"id": "f1", "run_id": "r1", "key": "user_score", "score": 1,
            "modified_at": "2026-11-04T08:00:00Z"}  # fmt: skip
    done = import_file(home, write(tmp_path / "f.jsonl", said), skip_bad=True, namespace="ours")
    assert counts(done) == (0, 0, 1)
    assert feedback(home, "theirs") == []


def test_what_a_forgotten_user_said_is_left_out(home: Home, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", observation(1, userId="bob"), observation(2), score(1, 1))
    import_file(home, file)
    with Log(home.path) as log:
        log.forget(user_id="bob")
    again = import_file(home, file)
    assert again.left_out == {"of a user who was forgotten": 2}
    assert counts(again) == (0, 1, 0)


def test_other_rows_are_counted_by_what_they_are_and_unread_columns_named(
    home: Home, tmp_path: Path
) -> None:
    odd = {**observation(2), "type": "SPAN"}
    file = write(tmp_path / "a.jsonl", observation(1, colour="red"), odd, observation(3, ""))
    done = import_file(home, file)
    assert done.ignored == {"colour": 1}
    assert done.left_out == {
        "langfuse: generation without input or output": 1, "langfuse: observation of type SPAN": 1,
    }  # fmt: skip


def test_a_file_may_mix_preferences_and_logs(home: Home, tmp_path: Path) -> None:
    pair = {"prompt": "Who are you?", "chosen": "A librarian.", "rejected": "A robot."}
    file = write(tmp_path / "a.jsonl", observation(1), pair, score(1, 1))
    assert counts(import_file(home, file)) == (3, 0, 0)


def test_a_log_is_no_file_of_examples_and_no_export_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match=r"line 1: .* import the file into a home with"):
        file_examples(write(tmp_path / "a.jsonl", observation(1)))
    with pytest.raises(ConfigError, match="'langfuse', which is only read; export as 'preference'"):
        export_file([], tmp_path / "out.jsonl", format="langfuse")


def test_pages_and_objects_over_several_lines_are_read_row_by_row(
    home: Home, tmp_path: Path
) -> None:
    page = {"data": [observation(1), {"id": "x"}, "text"], "meta": {"cursor": None}}
    file = tmp_path / "page.json"
    file.write_text(json.dumps(page, indent=2) + json.dumps({"data": [score(1, 1)]}, indent=2))
    with pytest.raises(ExchangeError, match=r"page.json, row 1, data 2: .* lacks"):
        import_file(home, file)
    assert counts(import_file(home, file, skip_bad=True)) == (2, 0, 2)


def test_an_empty_page_is_a_row_that_is_left_out_alone_and_among_others(
    home: Home, tmp_path: Path
) -> None:
    empty = {"page: a row that holds nothing": 1}
    for rows in ([{"data": []}], [observation(1), {"scores": []}]):
        file = tmp_path / f"{len(rows)}.json"
        file.write_text(json.dumps(rows))
        done = import_file(home, file)
        assert (done.added, done.left_out) == (len(rows) - 1, empty)


BAD: dict[str, Any] = {
    "time": observation(1, startTime="yesterday"),
    "no time": {**score(1, 1), "updatedAt": None},
    "id": {**observation(1), "id": "a\nb"},
    "messages": observation(1, input=[{"role": "user"}, 7]),
    "role": observation(1, input=[{"role": "wizard", "content": "x"}]),
    "content": observation(1, input=[{"role": "user", "content": {"a": 1}}]),
    "answer of a user": observation(1, output={"role": "user", "content": "x"}),
    "tools": observation(1, input={"messages": [{"role": "user", "content": "x"}], "tools": "all"}),
    "two prompts": observation(1, input=[[{"role": "user", "content": "x"}], []]),
    "score": {**score(1, 1), "value": "five"},
    "scale": {"id": "f", "key": "q", "run_id": "o1", "score": 7, "created_at": "2026-11-01",
              "feedback_config": {"type": "continuous", "min": 0, "max": 1}},
    "spans": {"resourceSpans": {"scopeSpans": []}},
    "span id": {"resourceSpans": [{"scopeSpans": [{"spans": [{"name": "x"}]}]}]},
    "circle": {"id": "f", "type": "rating", "created_at": 1, "data": {"rating": 1},
               "meta": {"message_id": "m"}, "snapshot": {"chat": {"history": {"messages": {
                   "m": {"role": "assistant", "content": "x", "parentId": "n"},
                   "n": {"role": "user", "content": "y", "parentId": "m"}}}}}},
    "no snapshot": {"id": "f", "type": "rating", "created_at": 1, "data": {"rating": 1},
                    "meta": {"message_id": "m"}},
    "assessments": {"info": {"trace_id": "t", "assessments": 3}, "data": {"spans": []}},
    "annotation": {"span_id": "x", "name": "n", "annotator_kind": "HUMAN",
                   "result": {"score": "high"}, "created_at": "2026-11-01T00:00:00Z"},
    "deep": observation(1, input=json.loads('{"input":' * 800 + '"x"' + "}" * 800)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_is_not_as_its_product_writes_it_is_bad_and_harms_no_other(
    home: Home, tmp_path: Path, name: str
) -> None:
    file = write(tmp_path / "a.jsonl", observation(5), BAD[name], score(5, 1))
    with pytest.raises(ExchangeError, match=r"a.jsonl, line 2") as raised:
        import_file(home, file)
    assert ";" in str(raised.value), "it names a cure"
    assert counts(import_file(home, file, skip_bad=True)) == (2, 0, 1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home.create(tmp_path_factory.mktemp("shared") / "home")


def exported() -> list[Any]:
    """Every row of the exports."""
    found: list[Any] = []
    for file in sorted(EXPORTS.glob("*.json*")):
        text = file.read_text(encoding="utf-8")
        rows = text.splitlines() if file.suffix == ".jsonl" else [text]
        for row in map(json.loads, rows):
            found += row if isinstance(row, list) else [row]
    return found


JUNK = (
    None, True, -1, 1e300, 10**30, "", "x", "[1]", "{}", [], {}, [None], [[]], [{}], {"0": {}},
    "a\0b", "\ud800", float("nan"), {"role": 7}, {"type": [1], "role": "assistant"},
)  # fmt: skip


@settings(max_examples=40)
@given(st.data())
def test_no_value_in_any_place_of_an_export_is_more_than_a_bad_row(
    shared: Home, data: st.DataObject
) -> None:
    row = data.draw(st.sampled_from(exported()))
    place: Any = row
    while isinstance(place, dict | list) and place:
        key = data.draw(st.sampled_from([*place] if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(st.sampled_from(JUNK))
            break
        place = place[key]
    import_file(shared, io.BytesIO(json.dumps(row).encode()), skip_bad=True)
