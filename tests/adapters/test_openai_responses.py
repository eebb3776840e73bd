"""The Responses API of OpenAI's wrapped client: its items, and conversations that continue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI, OpenAI
from openai_stand_in import OpenAIServer, call_item, events, response, text_item
from pydantic import BaseModel

from agentpref.record.log import Log
from agentpref.types import Run
from agentpref_adapters._openai_responses import Memory, messages_of
from agentpref_adapters.openai import OpenAICounts, counts, run_id, wrap

Runs = Callable[[], list[Run]]
USER = {"role": "user", "content": "Is the shop open?"}
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "opening_hours",
    "strict": True,
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
}


class Opening(BaseModel):
    day: str


def create(client: OpenAI, said: Any = "Is the shop open?", **how: Any) -> Any:
    return client.responses.create(model="gpt-test", input=said, **how)


def test_a_response_is_logged_as_a_chat(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    reply = create(openai_client, instructions="Be brief.", temperature=0.5, max_output_tokens=9)
    (run,) = runs()
    assert run.run_id == run_id(reply)
    assert list(run.prompt.messages) == [{"role": "system", "content": "Be brief."}, USER]
    assert run.output == {"role": "assistant", "content": "yes"}
    assert run.params == {"temperature": 0.5, "max_output_tokens": 9}
    assert run.metadata == {"finish_reason": "stop", "response_id": "resp_1"}
    assert run.thread_id == "resp_1"


def test_a_response_is_continued_by_its_id_without_its_instructions(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    for number in range(3):
        openai_server.answer(response(f"answer {number}", name=f"resp_{number}"))
    first = create(openai_client, "one", instructions="Be brief.")
    second = create(openai_client, "two", previous_response_id=first.id)
    create(openai_client, "three", previous_response_id=second.id, instructions="Be kind.")

    *_, last = runs()
    assert [(m["role"], m["content"]) for m in last.prompt.messages] == [
        ("system", "Be kind."),
        ("user", "one"),
        ("assistant", "answer 0"),
        ("user", "two"),
        ("assistant", "answer 1"),
        ("user", "three"),
    ]
    assert {run.thread_id for run in runs()} == {"resp_0"}
    assert counts(openai_client) == OpenAICounts(logged=3)


def test_what_came_before_and_was_not_seen_is_named(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    openai_server.answer(response("yes", name="resp_8"))
    create(openai_client, previous_response_id="resp_7")
    create(openai_client, prompt={"id": "pmpt_1", "variables": {"shop": "ours"}})
    unseen, stored = runs()
    assert list(unseen.prompt.messages) == [USER]
    assert unseen.metadata["unknown_before"] == unseen.thread_id == "resp_7"
    assert stored.metadata["unknown_before"] == "pmpt_1"
    assert counts(openai_client) == OpenAICounts(logged=2, partial=2)


def test_a_conversation_goes_on_from_what_was_seen_of_it(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    own = {"conversation": {"id": "conv_1"}}
    openai_server.answer(response("a", name="resp_1", **own), response("b", name="resp_2", **own))
    create(openai_client, "one", conversation="conv_1")
    create(openai_client, "two", conversation={"id": "conv_1"})
    first, second = runs()
    assert {run.metadata["unknown_before"] for run in (first, second)} == {"conv_1"}
    assert [message["content"] for message in second.prompt.messages] == ["one", "a", "two"]
    assert {first.thread_id, second.thread_id} == {"conv_1"}


def test_calls_and_their_results_are_those_of_a_chat(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    thought = {"id": "rs_1", "type": "reasoning",
               "summary": [{"type": "summary_text", "text": "Look it up."}]}  # fmt: skip
    openai_server.answer(response(thought, call_item("opening_hours", "{}")))
    first = create(openai_client, tools=[TOOL], tool_choice="required")
    result = {"type": "function_call_output", "call_id": "call_1", "output": "9 to 17"}
    create(openai_client, [USER, *first.output, result], tools=[TOOL])

    one, two = runs()
    function = {key: value for key, value in TOOL.items() if key != "type"}
    assert list(one.prompt.tools) == [{"type": "function", "function": function}]
    assert one.output == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Look it up.",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "opening_hours", "arguments": "{}"},
            }
        ],
    }
    assert one.metadata["finish_reason"] == "tool_calls"
    assert two.prompt.messages[1] == one.output
    assert two.prompt.messages[2] == {
        "role": "tool",
        "tool_call_id": "call_1",
        "content": "9 to 17",
    }


def test_parsed_responses_are_logged_as_they_were_written(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    openai_server.answer(response('{"day": "Sunday"}'))
    reply = openai_client.responses.parse(model="m", input="When?", text_format=Opening)
    assert reply.output_parsed == Opening(day="Sunday")
    (run,) = runs()
    assert run.run_id == run_id(reply)
    assert run.output["content"] == '{"day": "Sunday"}'
    assert run.params["text"]["format"]["type"] == "json_schema"


@pytest.mark.parametrize(
    ("status", "details", "reason"),
    [
        ("incomplete", {"reason": "max_output_tokens"}, "length"),
        ("incomplete", {"reason": "content_filter"}, "content_filter"),
        ("failed", None, "incomplete"),
        ("cancelled", None, "incomplete"),
    ],
)
def test_how_a_response_ended_is_said_in_the_words_of_chat_completions(
    openai_client: OpenAI,
    openai_server: OpenAIServer,
    runs: Runs,
    status: str,
    details: Any,
    reason: str,
) -> None:
    openai_server.answer(response("ye", status=status, incomplete_details=details))
    create(openai_client)
    assert [run.metadata["finish_reason"] for run in runs()] == [reason]


def test_log_probabilities_of_a_response_are_logged(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    item = text_item("yes")
    item["content"][0]["logprobs"] = [{"token": "yes", "logprob": -0.5, "bytes": []}]
    openai_server.answer(response(item))
    create(openai_client, include=["message.output_text.logprobs"])
    assert [run.logprobs for run in runs()] == [(-0.5,)]


def test_a_streamed_response_is_logged_and_can_be_continued(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    openai_server.answer(events("No, ", "it is closed.", name="resp_1"))
    stream = create(openai_client, stream=True)
    seen = list(stream)
    openai_server.answer(events("yes", name="resp_2"))
    responses = openai_client.responses
    with responses.stream(model="m", input="really?", previous_response_id="resp_1") as helper:
        named = run_id(helper)
        final = helper.get_final_response()

    first, second = runs()
    assert {first.run_id} == {run_id(stream), *map(run_id, seen)}
    assert run_id(seen[-1].response) == first.run_id
    assert named == run_id(final) == second.run_id
    assert [message["content"] for message in second.prompt.messages] == [
        "Is the shop open?",
        "No, it is closed.",
        "really?",
    ]
    assert counts(openai_client) == OpenAICounts(logged=2)


def test_a_streamed_response_that_breaks_is_logged_as_incomplete(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    called = call_item("opening_hours", "")
    delta = {"type": "response.function_call_arguments.delta", "output_index": 1,
             "item_id": "fc_1", "delta": '{"day', "sequence_number": 9}  # fmt: skip
    added = {"type": "response.output_item.added", "output_index": 1, "item": called}
    openai_server.answer([*events("No, ", "it", ends=False), added, delta], breaks=True)
    with pytest.raises(Exception, match=r"peer closed|Connection error"):
        list(create(openai_client, stream=True))
    (run,) = runs()
    assert run.output["content"] == "No, it"
    assert run.output["tool_calls"][0]["function"]["arguments"] == '{"day'
    assert run.metadata["finish_reason"] == "incomplete"
    assert counts(openai_client) == OpenAICounts(logged=1, incomplete=1)


def test_a_response_in_the_background_is_logged_once_it_is_retrieved(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    waiting = response(status="queued")
    openai_server.answer(waiting, {**waiting, "status": "in_progress"}, response("yes"))
    begun = create(openai_client, background=True)
    assert run_id(openai_client.responses.retrieve(begun.id)) == run_id(begun)
    assert runs() == []
    assert counts(openai_client) == OpenAICounts(open=1)
    ended = openai_client.responses.retrieve(begun.id)
    openai_client.responses.retrieve(begun.id)
    (run,) = runs()
    assert run.run_id == run_id(ended) == run_id(begun)
    assert list(run.prompt.messages) == [USER]
    assert counts(openai_client) == OpenAICounts(logged=1)


def test_of_two_requests_for_an_answer_in_the_background_the_first_to_get_it_logs_it(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    waiting = response(status="queued")
    ended = response("yes")
    openai_server.answer(waiting, {**waiting, "status": "in_progress"}, ended, ended)
    begun = create(openai_client, background=True)
    recorder = vars(openai_client)["_agentpref"]
    early = openai_client.responses.with_raw_response.retrieve(begun.id)
    late = openai_client.responses.with_raw_response.retrieve(begun.id)
    again = openai_client.responses.with_raw_response.retrieve(begun.id)
    assert recorder.seen.running == {}
    assert {run_id(reply) for reply in (early, late)} == {run_id(begun)}
    assert run_id(again) is None
    (run,) = runs()
    assert run.output["content"] == "yes"
    assert counts(openai_client) == OpenAICounts(logged=1)


def test_an_answer_in_the_background_is_logged_though_a_request_for_it_failed(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    openai_server.answer(response(status="queued"), "not JSON", response("yes"))
    begun = create(openai_client, background=True)
    openai_client.responses.retrieve(begun.id)  # the client returns the text
    assert counts(openai_client) == OpenAICounts(open=1)
    openai_client.responses.retrieve(begun.id)
    (run,) = runs()
    assert run.run_id == run_id(begun)
    assert counts(openai_client) == OpenAICounts(logged=1)


def test_an_answer_that_the_server_does_not_store_is_not_remembered(
    openai_client: OpenAI, openai_server: OpenAIServer
) -> None:
    openai_server.answer(response("a"))
    create(openai_client, "one", store=False)
    recorder = vars(openai_client)["_agentpref"]
    assert recorder.seen.memory.before("resp_1") == ([], None, "resp_1")


def test_an_async_client_logs_responses_whole_and_streamed(
    openai_server: OpenAIServer, log: Log, runs: Runs
) -> None:
    async def main() -> list[str | None]:
        async with wrap(AsyncOpenAI(api_key="none", base_url=openai_server.url), log) as client:
            whole = await client.responses.create(model="m", input="one")
            stream = await client.responses.create(model="m", input="two", stream=True)
            events = [event async for event in stream]
            async with client.responses.stream(model="m", input="three") as helper:
                final = await helper.get_final_response()
                assert run_id(helper) == run_id(final)
            return [run_id(whole), run_id(events[-1].response), run_id(final)]

    assert asyncio.run(main()) == [run.run_id for run in runs()]


def test_pictures_files_and_a_servers_own_tools_keep_their_content() -> None:
    search = {"type": "web_search_call", "id": "ws_1", "status": "completed"}
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "low"}
    said = [{"type": "input_text", "text": "what?"}, image]
    assert messages_of([{"role": "user", "content": said}, search, text_item("a cat")]) == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what?"},
                {
                    "type": "image_url",
                    "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"},
                },
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}, search]},
    ]


@given(
    st.lists(
        st.sampled_from(["user", "system", "developer", "assistant", "call", "result"]), max_size=12
    )
)
def test_no_item_is_lost_or_changes_its_place(kinds: list[str]) -> None:
    def item(number: int, kind: str) -> dict[str, Any]:
        if kind == "call":
            return call_item(f"<{number}>", "{}", f"call_{number}")
        if kind == "result":
            return {
                "type": "function_call_output",
                "call_id": f"call_{number}",
                "output": f"<{number}>",
            }
        return {"role": kind, "content": f"<{number}>"}

    found = messages_of([item(number, kind) for number, kind in enumerate(kinds)])
    text = str([{**message, "tool_calls": message.get("tool_calls")} for message in found])
    assert all(text.count(f"<{number}>") == 1 for number in range(len(kinds)))
    spoken = [m["content"] for m in found if m["role"] not in ("assistant",)]
    wanted = [f"<{n}>" for n, kind in enumerate(kinds) if kind not in ("assistant", "call")]
    assert spoken == wanted


def test_the_memory_forgets_the_oldest_conversation_and_says_so() -> None:
    memory = Memory(most=3)
    memory.add("a1", None, "a", [{"role": "user", "content": "a1"}])
    memory.add("b1", None, "b", [{"role": "user", "content": "b1"}])
    memory.add("b2", "b1", "b", [{"role": "user", "content": "b2"}])
    assert memory.before("a1") == ([{"role": "user", "content": "a1"}], "a", None)
    memory.add("a2", "a1", "a", [{"role": "user", "content": "a2"}])
    assert [message["content"] for message in memory.before("a2")[0]] == ["a1", "a2"]
    assert memory.before("b2") == ([{"role": "user", "content": "b2"}], "b", "b1")
    assert memory.before("c") == ([], None, "c")


def test_the_memory_keeps_within_its_bytes() -> None:
    memory = Memory(most_bytes=100)
    for number in range(5):
        memory.add(f"r{number}", None, "t", [{"role": "user", "content": "x"}], 40)
    assert [memory.before(f"r{number}")[2] for number in range(5)] == ["r0", "r1", "r2", None, None]
    memory.add("r4", None, "t", [], 40)  # the same again counts once
    assert memory.before("r3")[2] is None
