"""What each product's export becomes: runs with their threads and tools, and who said what."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentpref.home import Home
from agentpref.prefer.exchange import Imported, import_file
from agentpref.prefer.rowreader import RowReader
from agentpref.record.database import connect
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback, Run

EXPORTS = Path(__file__).parents[1] / "exports"
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object"}},
}


class Taken:
    """A home with some files imported."""

    def __init__(self, folder: Path, *names: str) -> None:
        home = Home.create(folder / "home")
        self.done: list[Imported] = [import_file(home, EXPORTS / name) for name in names]
        with closing(connect(home)) as connection:
            store = Store(connection)
            self.runs: list[Run] = [*store.runs("default")]
            self.feedback: list[Feedback] = [*store.feedback("default")]
            self.comparisons: list[Comparison] = [*store.comparisons("default")]

    def run(self, answer: str) -> Run:
        (found,) = (run for run in self.runs if run.output["content"] == answer)
        return found

    def said(self, key: str) -> Feedback:
        (found,) = (row for row in self.feedback if row.key == key)
        return found


def test_langfuse_blob_storage_gives_runs_with_thread_tools_and_params(
    tmp_path: Path,
) -> None:
    taken = Taken(tmp_path, "langfuse_observations.jsonl")
    run = taken.run("At nine.")
    assert [m["role"] for m in run.prompt.messages] == ["system", "user"]
    assert (run.model, run.thread_id, run.trace_id) == ("gpt-4o-mini", "chat-9", "trace-1")
    assert (run.tags, run.params) == (("opening hours",), {"temperature": 0.2, "max_tokens": 200})
    assert run.metadata["usage"] == {
        "prompt_tokens": 21, "completion_tokens": 7, "total_tokens": 28
    }  # fmt: skip
    assert run.created_at == 1793520000.25, "times without a zone are UTC"
    [asked] = [run for run in taken.runs if run.output.get("tool_calls")]
    assert asked.prompt.tools[0]["function"]["description"] == "The weather now."


def test_langfuse_scores_keep_names_scales_and_who_judged(tmp_path: Path) -> None:
    taken = Taken(tmp_path, "langfuse_observations.jsonl", "langfuse_scores.jsonl")
    thumbs = [row for row in taken.feedback if row.key == "thumbs"]
    assert [(row.score, row.scale, row.source) for row in thumbs] == [
        (1.0, (0.0, 1.0), "human"), (0.0, (0.0, 1.0), "human")
    ]  # fmt: skip
    assert (taken.said("helpfulness").source, taken.said("helpfulness").scale) == ("model", None)
    tone, fixed = taken.said("tone"), taken.said("correction")
    assert (tone.score, tone.value, tone.source) == (None, "friendly", "human")
    assert fixed.correction == {"role": "assistant", "content": "From nine to five."}
    assert tone.user_id == fixed.user_id is not None
    assert taken.done[1].left_out == {"langfuse: score of a session": 1}


@pytest.mark.parametrize("name", ["langfuse_trace.json", "langfuse_page.json"])
def test_langfuse_traces_and_pages_of_the_api_are_the_same_run(tmp_path: Path, name: str) -> None:
    [run] = Taken(tmp_path, name).runs
    assert (run.thread_id, run.tags, run.model) == ("s-1", ("shipping",), "gpt-4o")
    assert run.prompt.tools[0]["function"]["name"] == "ship"
    assert run.metadata["route"] == "/ship"


def test_langfuse_csv_is_read_as_its_json_is(tmp_path: Path) -> None:
    taken = Taken(tmp_path, "langfuse_observations.jsonl", "langfuse_scores.csv")
    [thumb] = taken.feedback
    assert (thumb.key, thumb.score, thumb.comment) == ("thumbs", 1.0, "exact, polite")


@pytest.mark.parametrize(
    ("kind", "value", "score", "said"),
    [("BOOLEAN", True, 1.0, None), ("NUMERIC", 0.5, 0.5, None), ("TEXT", "fine", None, "fine")],
)
def test_langfuse_scores_of_its_third_api_name_their_subject(
    tmp_path: Path, kind: str, value: Any, score: float | None, said: str | None
) -> None:
    row = {"id": "s", "name": "quality", "source": "EVAL", "dataType": kind, "value": value,
           "subject": {"kind": "observation", "id": "o-1", "traceId": "t-1"},
           "timestamp": "2026-11-02T10:05:00Z"}  # fmt: skip
    [(_, (_, [found]))] = RowReader().records(row)
    assert (found.run_id, found.score, found.value, found.source) == ("o-1", score, said, "model")
    [(_, (_, [session]))] = RowReader().records({**row, "subject": {"kind": "session", "id": "s"}})
    assert session.reason == "score of a session"


def test_langsmith_runs_are_those_of_models_with_the_thread_of_their_metadata(
    tmp_path: Path,
) -> None:
    taken = Taken(tmp_path, "langsmith_runs.jsonl")
    [run] = taken.runs
    assert [m["content"] for m in run.prompt.messages] == ["Be exact.", "Who wrote Emma?"]
    assert (run.model, run.thread_id, run.tags) == ("gpt-4o", "th-5", ("books",))
    assert (run.params, run.prompt.tools[0]["function"]["name"]) == ({"temperature": 0.1}, "search")
    assert run.metadata["finish_reason"] == "stop"
    assert taken.done[0].left_out == {"langsmith: run of type chain": 1}


def test_langsmith_feedback_on_the_root_judges_the_last_answer_of_the_trace(tmp_path: Path) -> None:
    taken = Taken(tmp_path, "langsmith_runs.jsonl", "langsmith_feedback.jsonl")
    assert {row.run_id for row in taken.feedback} == {taken.runs[0].run_id}
    thumb, judged = taken.said("thumbs"), taken.said("correctness")
    assert (thumb.score, thumb.scale, thumb.source) == (1.0, (0.0, 1.0), "human")
    assert (judged.score, judged.scale, judged.source) == (0.9, (0.0, 1.0), "model")
    assert taken.said("correction").correction == {
        "role": "assistant", "content": "Jane Austen, in 1815."
    }  # fmt: skip


def test_langsmith_rows_as_its_own_client_dumps_them_are_read(tmp_path: Path) -> None:
    schemas = pytest.importorskip("langsmith.schemas")
    names = ("langsmith_runs.jsonl", "langsmith_feedback.jsonl")
    for name, kind in zip(names, (schemas.Run, schemas.Feedback), strict=True):
        rows = [json.loads(line) for line in (EXPORTS / name).read_text().splitlines()]
        dumped = [kind(**row).model_dump_json() for row in rows]
        (tmp_path / name).write_text("\n".join(dumped))
    taken = Taken(tmp_path, *(str(tmp_path / name) for name in names))
    assert [done.added for done in taken.done] == [1, 3]
    assert taken.run("Jane Austen.").thread_id == "th-5"
    assert taken.said("thumbs").score == 1


def test_otlp_spans_of_every_age_of_the_conventions_are_read(tmp_path: Path) -> None:
    taken = Taken(tmp_path, "otlp_spans.json")
    today = taken.run("Rainy and cool.")
    assert [m["role"] for m in today.prompt.messages] == ["system", "user", "assistant", "tool"]
    assert today.prompt.tools == (WEATHER,)
    assert today.output["reasoning_content"] == "57F is cool."
    assert (today.model, today.thread_id) == ("gpt-4-0613", "conv-3")
    assert today.params == {"temperature": 0.5, "max_tokens": 200}
    assert taken.run("Hi!").prompt.messages[0]["content"] == "Be kind."
    assert taken.run("Four.").metadata["finish_reason"] == "stop"
    said = taken.said("relevance")
    assert (said.run_id, said.score, said.value) == (today.run_id, 0.8, "relevant")
    assert taken.done[0].left_out == {"otlp: model call without its messages": 1, "otlp: span": 1}
    assert taken.done[0].ignored == {"attributes.app.route": 1}


def test_otlp_log_records_hold_messages_and_evaluations(tmp_path: Path) -> None:
    taken = Taken(tmp_path, "otlp_spans.json", "otlp_logs.jsonl")
    assert taken.run("Sleep well.").prompt.messages == ({"role": "user", "content": "Good night?"},)
    assert taken.said("kindness").run_id == taken.run("Hi!").run_id


def test_open_webui_ratings_are_thumbs_and_win_against_the_siblings(tmp_path: Path) -> None:
    taken = Taken(tmp_path, "open_webui.json")
    won, lost = taken.run("At nine."), taken.run("Dunno.")
    assert (won.model, lost.model, won.thread_id) == ("llama3", "phi4", "c-1")
    assert won.prompt.messages[0] == {"role": "system", "content": "Answer briefly."}
    thumb = taken.said("thumbs")
    assert (thumb.score, thumb.scale, thumb.comment) == (1.0, (0.0, 1.0), "short")
    assert thumb.value["open_webui"]["reason"] == "accurate_information"
    assert thumb.value["open_webui"]["details"] == {"rating": 9}
    assert taken.said("open_webui").comment == "short"  # words without a thumb
    [compared] = taken.comparisons
    assert (compared.run_a, compared.run_b, compared.winner) == (won.run_id, lost.run_id, "a")
    assert len({compared.user_id, thumb.user_id, won.user_id}) == 3


def test_an_open_webui_answer_that_was_disliked_loses_and_one_that_broke_off_is_incomplete(
    tmp_path: Path,
) -> None:
    row = json.loads((EXPORTS / "open_webui.json").read_text())[0]
    row["data"]["rating"] = -1
    messages = row["snapshot"]["chat"]["chat"]["history"]["messages"]
    messages["m3"]["done"] = False
    [(_, (_, found))] = RowReader().records(row)
    first, _, second, compared = found
    assert (compared.better, compared.worse) == (second.id, first.id)
    assert second.metadata["finish_reason"] == "incomplete"


def test_an_open_webui_answer_that_the_snapshot_does_not_show_is_left_out(tmp_path: Path) -> None:
    row = json.loads((EXPORTS / "open_webui.json").read_text())[0]
    messages = row["snapshot"]["chat"]["chat"]["history"]["messages"]
    messages["m3"]["files"] = [{"type": "file", "id": "x"}]
    [(_, (_, [first, thumb, compared]))] = RowReader().records(row)
    assert (thumb.run_id, compared.reason) == (first.id, "comparison with an answer: it had files")
    messages["m2"]["originalContent"] = "At eight."
    [(_, (_, [rating]))] = RowReader().records(row)
    assert rating.reason.startswith("rating of an answer: it was changed")


def test_mlflow_traces_give_their_chat_models_and_their_assessments(tmp_path: Path) -> None:
    taken = Taken(tmp_path, "mlflow_trace.json")
    [run] = taken.runs
    assert (run.output["content"], run.model) == ("Yes, free of charge.", "gpt-4o-mini")
    assert (run.thread_id, run.metadata["tags"]) == ("sess-2", {"team": "shop"})
    liked, safe = taken.said("user_satisfaction"), taken.said("safety")
    assert (liked.score, liked.scale, liked.source) == (1.0, (0.0, 1.0), "human")
    assert (safe.value, safe.source, safe.run_id) == ("yes", "model", run.run_id)
    assert taken.done[0].left_out == {"mlflow: expectation": 1, "mlflow: span of kind CHAIN": 1}


def test_phoenix_spans_are_read_from_its_api_and_from_its_data_frame(tmp_path: Path) -> None:
    taken = Taken(tmp_path, "phoenix_spans.jsonl", "phoenix_annotations.jsonl")
    run = taken.run("Yes.")
    assert (run.model, run.thread_id, run.params) == ("gpt-4o", "ph-1", {"temperature": 0.2})
    assert run.prompt.tools[0]["function"]["name"] == "hours"
    [called] = [run for run in taken.runs if run.output.get("tool_calls")]
    assert called.output["tool_calls"][0]["function"] == {"name": "hours", "arguments": "{}"}
    thumb, judged = taken.said("thumbs"), taken.said("hallucination")
    assert (thumb.score, thumb.scale, thumb.run_id) == (1.0, (0.0, 1.0), run.run_id)
    assert (judged.score, judged.value, judged.source) == (0.0, "factual", "model")


ANTHROPIC: list[dict[str, Any]] = [
    {"role": "user", "content": "Cold in Oslo?"},
    {"role": "assistant", "content": [
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Oslo"}}]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "c1", "content": "-4"},
        {"type": "text", "text": "Well?"}]},
]  # fmt: skip
RESPONSES: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "input_text", "text": "Cold in Oslo?"}]},
    {"type": "message", "role": "assistant",
     "content": [{"type": "output_text", "text": "Let me look."}]},
    {"type": "function_call", "call_id": "c1", "name": "get_weather",
     "arguments": '{"city":"Oslo"}'},
    {"type": "function_call_output", "call_id": "c1", "output": "-4"},
    {"role": "user", "content": "Well?"},
]  # fmt: skip
OPENAI = [
    {"role": "user", "content": "Cold in Oslo?"},
    {"role": "assistant", "content": "Let me look.", "tool_calls": [
        {"type": "function", "id": "c1",
         "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'}}]},
    {"role": "tool", "tool_call_id": "c1", "content": "-4"},
    {"role": "user", "content": "Well?"},
]  # fmt: skip
LANGCHAIN = [
    {"type": "human", "data": {"content": "Cold in Oslo?"}},
    {"type": "ai", "content": "Let me look.",
     "tool_calls": [{"name": "get_weather", "args": {"city": "Oslo"}, "id": "c1"}]},
    {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", "ToolMessage"],
     "kwargs": {"content": "-4", "tool_call_id": "c1"}},
    {"role": "human", "content": "Well?"},
]  # fmt: skip


@pytest.mark.parametrize("asked", [ANTHROPIC, RESPONSES, OPENAI, LANGCHAIN])
def test_one_conversation_is_one_prompt_in_whatever_words_it_was_logged(asked: Any) -> None:
    row = {"id": "r", "run_type": "llm", "start_time": "2026-11-01T00:00:00Z",
           "inputs": {"messages": asked}, "outputs": {"content": "Yes."}}  # fmt: skip
    [(_, (_, [run]))] = RowReader().records(row)
    assert [*run.messages] == OPENAI


@pytest.mark.parametrize(
    ("answer", "text", "reason"),
    [
        ({"choices": [{"message": {"role": "assistant", "content": "Yes."},
                       "finish_reason": "length"}]}, "Yes.", "length"),
        ({"role": "assistant", "content": [{"type": "text", "text": "Yes."}],
          "stop_reason": "end_turn"}, "Yes.", "stop"),
        ({"output": [{"type": "message", "role": "assistant",
                      "content": [{"type": "output_text", "text": "Yes."}]}]}, "Yes.", None),
        ("Yes.", "Yes.", None),
        ('{"count": 1}', '{"count": 1}', None),
        ("[1, 2]", "[1, 2]", None),
        ('{"role": "user", "content": "x"}', '{"role": "user", "content": "x"}', None),
    ],
)  # fmt: skip
def test_an_answer_is_read_from_every_client_and_stays_text_if_it_only_is_json(
    answer: Any, text: str, reason: str | None
) -> None:
    row = {"id": "o", "traceId": "t", "type": "GENERATION", "startTime": "2026-11-01T00:00:00Z",
           "input": "Well?", "output": answer}  # fmt: skip
    [(_, (_, [run]))] = RowReader().records(row)
    assert run.output["content"] == text
    assert run.metadata.get("finish_reason") == reason


def test_every_answer_to_one_call_is_a_run(tmp_path: Path) -> None:
    choices = [{"message": {"role": "assistant", "content": text}} for text in ("Yes.", "No.")]
    row = {"id": "o", "traceId": "t", "type": "GENERATION", "startTime": "2026-11-01T00:00:00Z",
           "input": "Well?", "output": {"choices": choices}}  # fmt: skip
    [(_, (_, found))] = RowReader().records(row)
    assert [(run.id, run.output["content"]) for run in found] == [("o", "Yes."), ("o:1", "No.")]


def test_a_named_format_of_logs_refuses_other_rows() -> None:
    [(place, error)] = RowReader("otlp").records({"prompt": "x"})
    assert "lacks 'resourceSpans'" in str(error)
    assert place == ""
