"""Streams of OpenAI's wrapped client: whole, broken, left early, dropped and cancelled."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, AsyncStream, OpenAI, Stream
from openai_stand_in import Answering, OpenAIServer, chunk, chunks
from pydantic import BaseModel

from agentpref.record.log import Log
from agentpref.types import Run
from agentpref_adapters.openai import OpenAICounts, counts, run_id, wrap

Runs = Callable[[], list[Run]]
ASKED: list[Any] = [{"role": "user", "content": "Is the shop open on Sundays?"}]
WHOLE = OpenAICounts(logged=1)
BROKEN = OpenAICounts(logged=1, incomplete=1)


class Opening(BaseModel):
    day: str


def start(client: OpenAI, **how: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "gpt-test", "messages": ASKED, "stream": True, **how}
    )


def tool_chunks() -> list[dict[str, Any]]:
    """Two calls at once, in pieces, as OpenAI's servers send them."""

    def piece(index: int, **more: Any) -> dict[str, Any]:
        return chunk({"tool_calls": [{"index": index, **more}]})

    def function(index: int, name: str) -> dict[str, Any]:
        about = {"name": name, "arguments": ""}
        return piece(index, id=f"call_{index}", type="function", function=about)

    return [
        chunk({"role": "assistant", "content": None}),
        function(0, "hours"),
        piece(0, function={"arguments": '{"day": '}),
        piece(0, function={"arguments": '"Sunday"}'}),
        function(1, "holidays"),
        piece(1, function={"arguments": "{}"}),
        chunk(reason="tool_calls"),
        {**chunk(), "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1,
                                             "total_tokens": 2}},
    ]  # fmt: skip


def test_a_stream_names_its_run_from_the_start_and_is_logged_at_its_end(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    openai_server.answer(chunks("No, ", "it is closed."))
    stream = start(openai_client)
    assert isinstance(stream, Stream)
    assert counts(openai_client) == OpenAICounts(open=1)
    seen = list(stream)

    (run,) = runs()
    assert {run.run_id} == {run_id(stream), *map(run_id, seen)}
    assert run_id(seen[1].choices[0]) == run.run_id
    assert run.output == {"role": "assistant", "content": "No, it is closed."}
    assert run.metadata["finish_reason"] == "stop"
    assert run.model == "gpt-test-1"
    assert counts(openai_client) == WHOLE


def test_a_streamed_answer_is_the_same_as_a_whole_one(
    openai_client: OpenAI, runs: Runs, log: Log
) -> None:
    list(start(openai_client))
    openai_client.chat.completions.create(model="gpt-test", messages=ASKED)
    streamed, whole = runs()
    assert (streamed.prompt, streamed.output) == (whole.prompt, whole.output)


def test_streamed_calls_of_tools_are_put_together(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    openai_server.answer(tool_chunks())
    list(start(openai_client, stream_options={"include_usage": True}))
    (run,) = runs()
    calls = [(one["id"], one["type"], one["function"]) for one in run.output["tool_calls"]]
    assert calls == [
        ("call_0", "function", {"name": "hours", "arguments": '{"day": "Sunday"}'}),
        ("call_1", "function", {"name": "holidays", "arguments": "{}"}),
    ]
    assert run.output["content"] is None
    assert run.metadata["finish_reason"] == "tool_calls"


def test_reasoning_tokens_and_several_answers_are_put_together(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    def token(text: str, value: float, number: int, index: int) -> dict[str, Any]:
        about = {"token": text, "logprob": value, "bytes": None, "top_logprobs": []}
        found = chunk({"content": text}, index=index, logprobs={"content": [about]})
        found["choices"][0]["token_ids"] = [number]
        return found

    openai_server.answer(
        [
            chunk({"role": "assistant", "reasoning_content": "Sun"}),
            chunk({"reasoning_content": "day."}),
            token("N", -0.5, 4, 0),
            token("Yes", -1.5, 9, 1),
            token("o", -0.25, 5, 0),
            chunk(reason="stop", index=1),
            chunk(reason="length"),
        ]
    )
    seen = list(start(openai_client, n=2, logprobs=True))
    first, second = sorted(runs(), key=lambda run: run.run_id)
    assert run_id(seen[3].choices[0]) == second.run_id == f"{first.run_id}:1"
    assert first.output == {
        "role": "assistant",
        "content": "No",
        "reasoning_content": "Sunday.",
    }
    assert (first.token_ids, first.logprobs) == ((4, 5), (-0.5, -0.25))
    assert first.metadata["finish_reason"] == "length"
    assert (second.output["content"], second.logprobs) == ("Yes", (-1.5,))
    assert counts(openai_client) == OpenAICounts(logged=2)


def test_the_helpers_stream_and_its_final_object_name_the_run(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    openai_server.answer(chunks('{"day": ', '"Sunday"}'))
    complete = openai_client.chat.completions
    with complete.stream(model="m", messages=ASKED, response_format=Opening) as stream:
        named = run_id(stream)
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.parsed == Opening(day="Sunday")
    (run,) = runs()
    assert run.run_id == named == run_id(final) == run_id(final.choices[0])
    assert run.output["content"] == '{"day": "Sunday"}'


def test_a_stream_that_breaks_is_logged_as_incomplete(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    openai_server.answer(chunks("No, it", reason=None), breaks=True)
    with pytest.raises(Exception, match=r"peer closed|Connection error"):
        list(start(openai_client))
    (run,) = runs()
    assert run.output["content"] == "No, it"
    assert run.metadata["finish_reason"] == "incomplete"
    assert counts(openai_client) == BROKEN


def test_an_error_in_a_stream_makes_what_came_incomplete(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    openai_server.answer([*chunks("No", reason=None), {"error": {"message": "overloaded"}}])
    with pytest.raises(openai.APIError, match="overloaded"):
        list(start(openai_client))
    assert [run.metadata["finish_reason"] for run in runs()] == ["incomplete"]
    openai_server.answer([{"error": {"message": "overloaded"}}])
    with pytest.raises(openai.APIError, match="overloaded"):
        list(start(openai_client))
    assert len(runs()) == 1
    assert counts(openai_client) == OpenAICounts(logged=1, incomplete=1, failed=1)


@pytest.mark.parametrize("how", ["close", "context", "helper", "dropped"])
def test_a_stream_that_is_left_early_is_logged_as_incomplete(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs, how: str
) -> None:
    held = threading.Event()
    openai_server.answer([chunk({"content": "No, "}), *chunks("it is")], held=held)
    complete = openai_client.chat.completions
    if how == "helper":
        with complete.stream(model="m", messages=ASKED) as events:
            next(events)
    elif how == "context":
        with start(openai_client) as stream:
            next(stream)
    else:
        stream = start(openai_client)
        next(iter(stream))
        if how == "close":
            stream.close()
        del stream
        gc.collect()
    held.set()
    (run,) = runs()
    assert run.output["content"] == "No, "
    assert run.metadata["finish_reason"] == "incomplete"
    assert counts(openai_client) == BROKEN


def test_a_stream_goes_on_after_a_loop_that_was_left(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    openai_server.answer(chunks("a", "b", "c"))
    stream = start(openai_client)
    for piece in stream:
        if piece.choices[0].delta.content == "a":
            break
    rest = [piece.choices[0].delta.content for piece in stream]
    assert rest == ["b", "c", None]
    (run,) = runs()
    assert (run.output["content"], run.metadata["finish_reason"]) == ("abc", "stop")


def test_who_leaves_a_loop_at_the_last_chunk_has_a_whole_answer(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    openai_server.answer(chunks("yes"))
    stream = start(openai_client)
    while next(stream).choices[0].finish_reason is None:
        pass
    assert [run.metadata["finish_reason"] for run in runs()] == ["stop"]
    stream.close()
    assert len(runs()) == 1


def test_a_stream_that_nobody_reads_logs_nothing(openai_client: OpenAI, runs: Runs) -> None:
    start(openai_client).close()
    assert runs() == []
    assert counts(openai_client) == OpenAICounts(failed=1)


def test_messages_that_change_while_they_are_answered_are_logged_as_they_were(
    openai_client: OpenAI, runs: Runs
) -> None:
    messages = [dict(ASKED[0])]
    stream = start(openai_client, messages=messages)
    next(stream)
    messages[0]["content"] = "changed"
    messages.append({"role": "assistant", "content": "y"})
    list(stream)
    (run,) = runs()
    assert list(run.prompt.messages) == ASKED


def test_raw_streams_are_logged_once_they_are_parsed(openai_client: OpenAI, runs: Runs) -> None:
    complete = openai_client.chat.completions
    raw = complete.with_raw_response.create(model="m", messages=ASKED, stream=True)
    list(raw.parse())
    create = complete.with_streaming_response.create
    with create(model="m", messages=ASKED, stream=True) as response:
        named = run_id(response)
        list(response.parse())
    with create(model="m", messages=ASKED, stream=True) as response:
        lines = list(response.iter_lines())
    assert [run.run_id for run in runs()] == [run_id(raw), named]
    assert any("yes" in line for line in lines)
    assert counts(openai_client) == OpenAICounts(logged=2, open=1)  # read as bytes


@pytest.mark.parametrize("header", ["x-agentpref-run-id", "x-agentpref-revision"])
def test_a_stream_of_a_gateway_has_the_id_of_the_run_there_and_is_not_logged(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs, header: str
) -> None:
    at_once = "run-1" if header == "x-agentpref-run-id" else None
    pieces = [{**piece, "id": "run-1"} for piece in chunks("yes")]
    openai_server.answer(pieces, headers={header: at_once or "base"})
    stream = start(openai_client)
    assert run_id(stream) == at_once
    assert {run_id(piece) for piece in stream} == {"run-1"}
    assert run_id(stream) == "run-1"
    assert runs() == []
    assert counts(openai_client) == OpenAICounts(elsewhere=1)


def test_a_stream_of_a_gateway_that_is_left_early_is_left_to_it(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    openai_server.answer(chunks("yes"), headers={"x-agentpref-run-id": "run-1"})
    start(openai_client).close()
    assert runs() == []
    assert counts(openai_client) == OpenAICounts(elsewhere=1)


# asyncio


@asynccontextmanager
async def async_client(server: OpenAIServer, log: Log) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key="none", base_url=server.url, max_retries=0) as client:
        yield wrap(client, log)


async def astart(client: AsyncOpenAI) -> Any:
    return await client.chat.completions.create(model="m", messages=ASKED, stream=True)


def test_async_streams_and_helpers_are_logged(
    openai_server: OpenAIServer, log: Log, runs: Runs
) -> None:
    async def main() -> list[str | None]:
        async with async_client(openai_server, log) as client:
            stream = await astart(client)
            assert isinstance(stream, AsyncStream)
            seen = [run_id(piece) async for piece in stream]
            complete = client.chat.completions
            async with complete.stream(model="m", messages=ASKED) as events:
                named = run_id(events)
                final = await events.get_final_completion()
            assert named == run_id(final)
            return [*dict.fromkeys(seen), named]

    found = asyncio.run(main())
    assert [run.run_id for run in runs()] == found
    assert {run.metadata["finish_reason"] for run in runs()} == {"stop"}


def test_a_cancelled_task_leaves_an_incomplete_run(
    openai_server: OpenAIServer, log: Log, runs: Runs
) -> None:
    held = threading.Event()
    openai_server.answer([chunk({"content": "No, "}), *chunks("it is")], held=held)

    async def main() -> OpenAICounts:
        async with async_client(openai_server, log) as client:
            begun = asyncio.Event()

            async def read() -> None:
                async for _ in await astart(client):
                    begun.set()

            task = asyncio.create_task(read())
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return counts(client)

    assert asyncio.run(main()) == BROKEN
    held.set()
    (run,) = runs()
    assert run.output["content"] == "No, "


def test_a_call_that_is_cancelled_before_its_answer_logs_nothing(
    openai_server: OpenAIServer, log: Log, runs: Runs
) -> None:
    held = threading.Event()
    openai_server.script.append(Answering(events=chunks("late"), held=held))

    async def main() -> None:
        async with async_client(openai_server, log) as client:
            create = client.chat.completions.create(model="m", messages=ASKED)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(create, 0.05)

    asyncio.run(main())
    held.set()
    assert runs() == []
