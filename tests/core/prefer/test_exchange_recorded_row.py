"""What a record adds to the home, and under which ids."""

from __future__ import annotations

from dataclasses import replace

from orjson import loads

from agentpref.prefer.exchange import ImportContext, recorded_row
from agentpref.prefer.formats import PreferenceRecord
from agentpref.record.messages import prompt_of

PROMPT = prompt_of([{"role": "user", "content": "The sky?"}], [{"name": "look_up"}])
BLUE, RED, GREY = ({"role": "assistant", "content": text} for text in ("Blue.", "Red.", "Grey."))
PAIR = PreferenceRecord(PROMPT, (BLUE, RED), (1, 0), tag="sky")
THUMB = PreferenceRecord(PROMPT, (BLUE,), (1,))
RUN_IDS = ["import-807302cab4ef18d544c8fd3c7b86a5de", "import-b9ca275e99bf192934f2bdd5698bd22c"]
COMPARISON_IDS = ["import-5090105f5309ee5eb6d5a464a90629f3"]
THUMB_IDS = ["import-a18d0b5ad18ce02776db0a0a6e4bd585"]
CONTEXT = ImportContext("default", None, "human", None, 100.0, "rows.jsonl")


def test_a_pair_adds_two_runs_and_a_comparison() -> None:
    row = recorded_row(PAIR, CONTEXT, 7)
    chosen, rejected = row.runs
    [comparison] = row.judgements
    assert (comparison.run_a, comparison.run_b) == (chosen.run_id, rejected.run_id)
    assert comparison.winner == "a"
    assert chosen.prompt == rejected.prompt == PROMPT.id
    assert [loads(run.nodes[-1].body) for run in row.runs] == [BLUE, RED]
    assert loads(chosen.tags) == loads(rejected.tags) == ["sky"]
    assert loads(chosen.metadata) == {"imported_from": "rows.jsonl"}
    assert chosen.created_at == comparison.created_at == 100.000007
    nodes = [node for run in row.runs for node in run.nodes]
    assert len({node.id for node in nodes}) == len(nodes) == 4


def test_a_single_completion_adds_a_run_and_a_thumb() -> None:
    for label in (1, 0):
        row = recorded_row(replace(THUMB, labels=(label,)), CONTEXT, 1)
        [run], [thumb] = row.runs, row.judgements
        assert thumb.run_id == run.run_id
        assert (thumb.key, thumb.score) == ("thumbs", float(label))


def test_a_group_adds_a_comparison_for_each_two_completions_whose_labels_differ() -> None:
    row = recorded_row(PreferenceRecord(PROMPT, (GREY, BLUE, RED), (0.5, 1, 0.5)), CONTEXT, 1)
    grey, blue, red = (run.run_id for run in row.runs)
    said = [(one.run_a, one.run_b, one.winner) for one in row.judgements]
    assert said == [(blue, grey, "a"), (blue, red, "a")]


def test_ids_are_those_that_older_versions_gave() -> None:
    row = recorded_row(PAIR, CONTEXT, 1)
    assert [run.run_id for run in row.runs] == RUN_IDS
    assert [one.comparison_id for one in row.judgements] == COMPARISON_IDS
    assert [one.feedback_id for one in recorded_row(THUMB, CONTEXT, 1).judgements] == THUMB_IDS


def test_ids_depend_on_what_is_said_and_by_whom_and_on_nothing_else() -> None:
    def ids(context: ImportContext, record: PreferenceRecord = PAIR) -> tuple[str, str]:
        row = recorded_row(record, context, 1)
        return row.runs[0].run_id, row.judgements[0].comparison_id

    run, comparison = ids(CONTEXT)
    later = replace(CONTEXT, tag="sea", started_at=999.0, file_name="other.jsonl")
    assert ids(later) == (run, comparison)
    assert ids(replace(CONTEXT, source="model"))[0] == run
    assert ids(replace(CONTEXT, source="model"))[1] != comparison
    assert ids(replace(CONTEXT, user_id="0f"))[1] != comparison
    assert ids(replace(CONTEXT, namespace="other"))[0] != run
    swapped = ids(CONTEXT, replace(PAIR, completions=(RED, BLUE)))
    assert swapped[0] != run
    assert swapped[1] != comparison


def test_the_tag_of_the_import_replaces_the_rows_own() -> None:
    tagged = recorded_row(PAIR, replace(CONTEXT, tag="sea"), 1)
    assert loads(tagged.runs[0].tags) == ["sea"]
    assert loads(recorded_row(THUMB, CONTEXT, 1).runs[0].tags) == []
