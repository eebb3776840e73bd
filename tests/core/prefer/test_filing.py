"""What a row adds to the record, and under which ids."""

from __future__ import annotations

from dataclasses import replace

from orjson import loads

from agentpref.prefer.filing import Filing, entry_of
from agentpref.prefer.rows import PreferenceRow, UnpairedRow
from agentpref.record.messages import prompt_of
from agentpref.types import Comparison, Feedback

PROMPT = prompt_of([{"role": "user", "content": "The sky?"}], [{"name": "look_up"}])
BLUE, RED = ({"role": "assistant", "content": text} for text in ("Blue.", "Red."))
PREFERRED = PreferenceRow(PROMPT, BLUE, RED, tag="sky")
LIKED = UnpairedRow(PROMPT, BLUE, desirable=True)
FILING = Filing("default", None, "human", None, 100.0, "rows.jsonl")


def test_a_preference_is_two_runs_and_a_comparison() -> None:
    entry = entry_of(PREFERRED, FILING, 7)
    chosen, rejected = entry.runs
    assert isinstance(entry.verdict, Comparison)
    assert (entry.verdict.run_a, entry.verdict.run_b) == (chosen.run_id, rejected.run_id)
    assert entry.verdict.winner == "a"
    assert chosen.prompt == rejected.prompt == PROMPT.id
    assert [loads(run.nodes[-1].body) for run in entry.runs] == [BLUE, RED]
    assert loads(chosen.tags) == loads(rejected.tags) == ["sky"]
    assert loads(chosen.metadata) == {"imported_from": "rows.jsonl"}
    assert chosen.created_at == entry.verdict.created_at == 100.000007
    nodes = [node for run in entry.runs for node in run.nodes]
    assert len({node.id for node in nodes}) == len(nodes) == 4
    assert entry.size == sum(len(node.body) for node in nodes)


def test_a_label_is_a_run_and_a_thumb() -> None:
    for desirable, score in ((True, 1.0), (False, 0.0)):
        entry = entry_of(replace(LIKED, desirable=desirable), FILING, 1)
        [run] = entry.runs
        assert isinstance(entry.verdict, Feedback)
        assert entry.verdict.run_id == run.run_id
        assert (entry.verdict.key, entry.verdict.score) == ("thumbs", score)


def test_ids_come_from_what_is_said_and_by_whom() -> None:
    def ids(filing: Filing, row: PreferenceRow = PREFERRED) -> tuple[str, str]:
        entry = entry_of(row, filing, 1)
        assert isinstance(entry.verdict, Comparison)
        return entry.runs[0].run_id, entry.verdict.comparison_id

    run, verdict = ids(FILING)
    later = replace(FILING, tag="sea", started_at=999.0, file_name="other.jsonl")
    assert ids(later) == (run, verdict)
    assert ids(replace(FILING, source="model"))[0] == run
    assert ids(replace(FILING, source="model"))[1] != verdict
    assert ids(replace(FILING, user="0f"))[1] != verdict
    assert ids(replace(FILING, namespace="other"))[0] != run
    swapped = ids(FILING, replace(PREFERRED, chosen=RED, rejected=BLUE))
    assert swapped[0] != run
    assert swapped[1] != verdict


def test_the_tag_of_the_import_goes_before_the_rows_own() -> None:
    tagged = entry_of(PREFERRED, replace(FILING, tag="sea"), 1)
    assert loads(tagged.runs[0].tags) == ["sea"]
    assert loads(entry_of(LIKED, FILING, 1).runs[0].tags) == []
