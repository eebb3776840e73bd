"""OpenAI's own client, wrapped, over real HTTP: whole replies, and who is said to have asked."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, AzureOpenAI, OpenAI
from openai_stand_in import OpenAIServer, call, completion, message
from pydantic import BaseModel

from agentpref.errors import ConfigError
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.types import Run
from agentpref_adapters.openai import OpenAICounts, counts, run_id, wrap

Runs = Callable[[], list[Run]]
ASKED: list[Any] = [{"role": "user", "content": "Is the shop open on Sundays?"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "opening_hours",
        "description": "When the shop is open.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"day": {"type": "string"}},
            "required": ["day"],
            "additionalProperties": False,
        },
    },
}


class Opening(BaseModel):
    day: str
    is_open: bool


def ask(client: OpenAI, **how: Any) -> Any:
    return client.chat.completions.create(**{"model": "gpt-test", "messages": ASKED, **how})


def test_an_answer_is_logged_and_carries_the_id_of_its_run(
    openai_client: OpenAI, openai_server: OpenAIServer, log: Log, runs: Runs
) -> None:
    openai_server.answer(completion("No, it is closed."))
    reply = ask(openai_client, temperature=0.5, seed=7, extra_body={"top_k": 3})

    (run,) = runs()
    assert reply.agentpref_run_id == run.run_id == reply.choices[0].agentpref_run_id
    assert run_id(reply) == run.run_id
    assert list(run.prompt.messages) == ASKED
    assert run.output == {"role": "assistant", "content": "No, it is closed."}
    assert run.model == "gpt-test-1"
    assert run.params == {"temperature": 0.5, "seed": 7, "top_k": 3}
    assert run.metadata == {"finish_reason": "stop", "response_id": "chatcmpl-1"}
    log.thumbs(reply.agentpref_run_id, up=False)
    assert counts(openai_client) == OpenAICounts(logged=1)


def test_the_client_and_its_replies_keep_their_types_and_say_the_same(
    openai_server: OpenAIServer, log: Log
) -> None:
    bare = OpenAI(api_key="none", base_url=openai_server.url)
    client = OpenAI(api_key="none", base_url=openai_server.url)
    assert wrap(client, log) is client
    assert type(client) is OpenAI
    one, other = ask(bare), ask(client)
    assert type(one) is type(other)
    marked = other.to_dict()
    assert marked.pop("agentpref_run_id") == marked["choices"][0].pop("agentpref_run_id")
    assert marked == one.to_dict()
    (_, asked_bare, _), (_, asked, _) = openai_server.asked
    assert asked == asked_bare
    bare.close()
    client.close()


def test_each_of_several_answers_is_a_run_of_its_own(
    openai_client: OpenAI, openai_server: OpenAIServer, log: Log, runs: Runs
) -> None:
    openai_server.answer(completion("Yes.", "No."))
    reply = ask(openai_client, n=2)

    first, second = runs()
    assert [choice.agentpref_run_id for choice in reply.choices] == [first.run_id, second.run_id]
    assert second.run_id == f"{reply.agentpref_run_id}:1"
    assert [first.output["content"], second.output["content"]] == ["Yes.", "No."]
    log.compare(first.run_id, second.run_id, winner="b")


def test_tools_and_calls_are_logged_as_they_were_sent(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    called = message(tool_calls=[call("opening_hours", '{"day": "Sunday"}')])
    openai_server.answer(completion(called), completion("It is closed."))
    first = ask(openai_client, tools=[TOOL], tool_choice="auto")
    history = [
        *ASKED,
        first.choices[0].message,  # the object, as OpenAI's guide appends it
        {"role": "tool", "tool_call_id": "call_1", "content": "closed"},
    ]
    ask(openai_client, messages=history, tools=[TOOL])

    one, two = runs()
    assert list(one.prompt.tools) == [TOOL]
    assert one.params == {"tool_choice": "auto"}
    assert one.metadata["finish_reason"] == "tool_calls"
    assert one.output["tool_calls"] == called["tool_calls"]
    assert one.output["content"] is None
    assert two.prompt.messages[1] == one.output  # the same chain of messages


def test_parsed_answers_are_logged_as_they_were_written(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    written = '{"day": "Sunday", "is_open": false}'
    openai_server.answer(completion(written))
    reply = openai_client.chat.completions.parse(
        model="gpt-test", messages=ASKED, response_format=Opening
    )
    assert reply.choices[0].message.parsed == Opening(day="Sunday", is_open=False)
    (run,) = runs()
    assert run.run_id == run_id(reply)
    assert run.output == {"role": "assistant", "content": written}
    assert run.params["response_format"]["type"] == "json_schema"


def test_what_a_reasoning_server_adds_is_kept_and_its_tokens_are_logged(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    tokens = [{"token": "No", "logprob": -0.25, "bytes": None, "top_logprobs": []}]
    answer = message("No", reasoning_content="It is Sunday.")
    choice = {"message": answer, "logprobs": {"content": tokens}, "token_ids": [7]}
    openai_server.answer(completion(choice))
    ask(openai_client, logprobs=True)
    (run,) = runs()
    assert run.output["reasoning_content"] == "It is Sunday."
    assert (run.token_ids, run.logprobs) == ((7,), (-0.25,))


def test_keys_headers_and_addresses_are_not_logged(
    openai_server: OpenAIServer, log: Log, home: Path
) -> None:
    client = wrap(OpenAI(api_key="sk-very-secret", base_url=openai_server.url), log)
    ask(
        client,
        extra_headers={"X-Internal": "also-secret"},
        extra_query={"code": "query-secret"},
        extra_body={"api_key": "body-secret"},
    )
    log.close()
    stored = b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())
    for secret in (b"sk-very-secret", b"also-secret", b"query-secret", b"body-secret"):
        assert secret not in stored
    assert b"127.0.0.1" not in stored
    client.close()


def test_a_call_says_whose_it_is_in_its_metadata(
    openai_client: OpenAI, runs: Runs, name: Callable[[str], str]
) -> None:
    given = {"thread_id": "t1", "user_id": "ana", "trace_id": "trace", "tags": "shop, hours"}
    ask(openai_client, user="other", metadata={**given, "page": "help"})
    (run,) = runs()
    assert (run.thread_id, run.user_id, run.trace_id) == ("t1", name("ana"), "trace")
    assert run.tags == ("shop", "hours")
    assert run.metadata["page"] == "help"
    assert not run.metadata.keys() & given.keys()


def test_a_call_says_whose_it_is_in_headers_and_as_user(
    openai_client: OpenAI, runs: Runs, name: Callable[[str], str]
) -> None:
    ask(openai_client, user="ana", extra_headers={"X-Thread-Id": "t1", "X-Trace-Id": "trace"})
    (run,) = runs()
    assert (run.thread_id, run.user_id, run.trace_id) == ("t1", name("ana"), "trace")


def test_the_wrapper_says_what_a_call_does_not(
    openai_server: OpenAIServer, log: Log, runs: Runs, name: Callable[[str], str]
) -> None:
    client = OpenAI(api_key="none", base_url=openai_server.url)
    wrap(client, log, tags=["support"], thread_id="t1", user_id="ana")
    ask(client)
    ask(client, user="ben", metadata={"thread_id": "t2", "tags": "hours"})
    one, two = runs()
    assert (one.thread_id, one.user_id, one.tags) == ("t1", name("ana"), ("support",))
    assert (two.thread_id, two.user_id, two.tags) == ("t2", name("ben"), ("support", "hours"))
    client.close()


def test_copies_are_logged_and_may_have_a_conversation_of_their_own(
    openai_client: OpenAI, log: Log, runs: Runs
) -> None:
    ask(openai_client.with_options(timeout=5))
    ask(openai_client.copy().with_options(max_retries=1))
    ask(wrap(openai_client.copy(), log, thread_id="t7"))
    ask(openai_client)
    assert [run.thread_id for run in runs()] == [None, None, "t7", None]
    assert counts(openai_client).logged == 4


def test_wrapping_again_logs_nothing_twice(openai_client: OpenAI, log: Log, runs: Runs) -> None:
    again = wrap(wrap(openai_client, log), log, tags=["support"])
    ask(again)
    (run,) = runs()
    assert run.tags == ("support",)


def test_a_clients_own_retries_make_no_second_run(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    refusal = {"error": {"message": "busy"}}
    openai_server.answer(refusal, status=500, headers={"retry-after-ms": "1"})
    openai_server.answer(completion("yes"))
    ask(openai_client.with_options(max_retries=1))
    assert len(openai_server.asked) == 2
    assert len(runs()) == 1


def test_an_error_logs_nothing(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    openai_server.answer({"error": {"message": "no such model"}}, status=404)
    with pytest.raises(openai.NotFoundError):
        ask(openai_client)
    openai_server.answer(completion({"message": message("{"), "finish_reason": "length"}))
    with pytest.raises(openai.LengthFinishReasonError):
        openai_client.chat.completions.parse(
            model="gpt-test", messages=ASKED, response_format=Opening
        )
    assert runs() == []
    assert counts(openai_client) == OpenAICounts(failed=1)


def test_raw_responses_are_logged_and_named_also_if_nobody_parses_them(
    openai_client: OpenAI, runs: Runs
) -> None:
    raw = openai_client.chat.completions.with_raw_response.create(model="m", messages=ASKED)
    (run,) = runs()
    assert raw.agentpref_run_id == run.run_id
    assert run_id(raw.parse()) == run.run_id
    assert json.loads(raw.text)["id"] == "chatcmpl-1"
    assert len(runs()) == 1


def test_a_streaming_response_is_logged_once_it_is_parsed(
    openai_client: OpenAI, runs: Runs
) -> None:
    create = openai_client.chat.completions.with_streaming_response.create
    with create(model="m", messages=ASKED) as response:
        assert runs() == []
        assert counts(openai_client).open == 1
        reply = response.parse()
        assert run_id(reply) == run_id(response)
    (run,) = runs()
    assert run.run_id == run_id(reply)
    assert counts(openai_client) == OpenAICounts(logged=1)


def test_calls_by_path_are_logged_and_other_endpoints_are_left_alone(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    body = {"model": "gpt-test", "messages": ASKED}
    answered = openai_client.post("/chat/completions", cast_to=object, body=body)
    assert answered["id"] == "chatcmpl-1"  # a dict has no place for the run's id
    openai_server.answer({"object": "list", "data": [], "model": "e"})
    openai_client.embeddings.create(model="e", input="words", encoding_format="float")
    (run,) = runs()
    assert list(run.prompt.messages) == ASKED
    assert counts(openai_client) == OpenAICounts(logged=1)


def test_tools_of_the_old_form_are_tools(openai_client: OpenAI, runs: Runs) -> None:
    ask(openai_client, functions=[TOOL["function"]])
    (run,) = runs()
    assert list(run.prompt.tools) == [TOOL]


def test_an_azure_client_is_logged(openai_server: OpenAIServer, log: Log, runs: Runs) -> None:
    endpoint = openai_server.url.removesuffix("/v1")
    client = AzureOpenAI(api_key="none", api_version="2026-01-01", azure_endpoint=endpoint)
    reply = ask(wrap(client, log), model="deployed")
    (path, _, _) = openai_server.asked[0]
    assert path.startswith("/openai/deployments/deployed/chat/completions")
    assert [run.run_id for run in runs()] == [run_id(reply)]
    client.close()


def test_an_async_client_is_logged_with_many_calls_at_once(
    openai_server: OpenAIServer, log: Log, runs: Runs
) -> None:
    async def main() -> list[str | None]:
        async with wrap(AsyncOpenAI(api_key="none", base_url=openai_server.url), log) as client:
            replies = await asyncio.gather(
                *(client.chat.completions.create(model="m", messages=ASKED) for _ in range(8)),
                client.with_options(timeout=5).chat.completions.create(model="m", messages=ASKED),
            )
            raw = await client.chat.completions.with_raw_response.create(model="m", messages=ASKED)
            openai_server.answer(completion('{"day": "Sunday", "is_open": false}'))
            parsed = await client.chat.completions.parse(
                model="m", messages=ASKED, response_format=Opening
            )
            assert counts(client) == OpenAICounts(logged=11)
            return [run_id(reply) for reply in (*replies, raw.parse(), parsed)]

    found = asyncio.run(main())
    assert len(set(found)) == 11
    assert {run.run_id for run in runs()} == set(found)


def test_a_run_that_a_gateway_has_logged_is_named_and_not_logged_again(
    openai_client: OpenAI, openai_server: OpenAIServer, runs: Runs
) -> None:
    answered = completion("yes", "no", id="run-of-the-gateway")
    openai_server.answer(answered, headers={"x-agentpref-revision": "base"})
    reply = ask(openai_client, n=2)
    assert run_id(reply) == "run-of-the-gateway"
    assert run_id(reply.choices[1]) == "run-of-the-gateway:1"
    openai_server.answer(completion("yes", id="r3"), headers={"x-agentpref-run-id": "r3"})
    assert run_id(ask(openai_client)) == "r3"
    # A proxy in between has dropped the headers.
    openai_server.answer(completion("yes", id="r2", system_fingerprint="rev-000042-0123456789ab"))
    assert run_id(ask(openai_client)) == "r2"
    assert runs() == []
    assert counts(openai_client) == OpenAICounts(elsewhere=3)


@pytest.mark.parametrize(
    "body",
    ["<html>busy</html>", {"error": {"message": "no"}}, {"choices": None}, [], 7, None],
    ids=str,
)
def test_a_reply_that_is_none_reaches_the_app_as_before_and_is_counted(
    openai_server: OpenAIServer, log: Log, runs: Runs, body: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bare = OpenAI(api_key="none", base_url=openai_server.url)
    client = wrap(bare.copy(), log)
    openai_server.answer(body, body)
    assert _outcome(client) == _outcome(bare)
    assert runs() == []
    assert counts(client) == OpenAICounts(lost=1)
    assert "cannot be logged" in caplog.text
    bare.close()
    client.close()


def _outcome(client: OpenAI) -> str:
    try:
        return repr(ask(client))
    except Exception as error:
        return repr(error)


def test_a_log_that_raises_does_not_break_a_call(
    openai_server: OpenAIServer, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Log(home, strict=True) as log:
        client = wrap(OpenAI(api_key="none", base_url=openai_server.url), log)
    with caplog.at_level(logging.WARNING, "agentpref"):
        reply = ask(client)
    assert reply.choices[0].message.content == "yes"
    assert counts(client) == OpenAICounts(lost=1)
    assert "LogClosed" in caplog.text
    client.close()


def test_what_cannot_be_wrapped_is_refused_with_the_cure(openai_client: OpenAI, log: Log) -> None:
    with pytest.raises(ConfigError, match=r"client is .*; pass an OpenAI\(\)"):
        wrap(openai, log)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match=r"log is .*; pass agentpref\.Log"):
        wrap(openai_client, "./.agentpref")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"tags is .*\['support'\]"):
        wrap(openai_client, log, tags="support")
    bare = OpenAI(api_key="none")
    with pytest.raises(ConfigError, match="not wrapped"):
        counts(bare)
    assert run_id(object()) is None
    bare.close()


def test_a_process_may_fork_while_another_thread_makes_a_call(
    openai_server: OpenAIServer, tmp_path: Path
) -> None:
    program = f"""
import os, threading
from openai import OpenAI
from agentpref import Log
from agentpref_adapters.openai import counts, wrap

log = Log({str(tmp_path / "forked")!r})
client = wrap(OpenAI(api_key="none", base_url={openai_server.url!r}), log)

def ask():
    client.chat.completions.create(model="m", messages=[{{"role": "user", "content": "?"}}])

ask()
seen, held, go = client._agentpref.seen, threading.Event(), threading.Event()

def hold():
    with seen.lock:
        held.set()
        go.wait(0.2)

threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    assert counts(client).logged == 0
    ask()
    assert counts(client).logged == 1
    log.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
ask()
print(counts(client).logged)
log.close()
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("2\n", "")
    with closing(connect(Home.open(tmp_path / "forked"), readonly=True)) as connection:
        assert len(list(Store(connection).runs("default"))) == 3


def test_without_openai_the_import_says_what_to_install() -> None:
    program = "import sys; sys.modules['openai'] = None; import agentpref_adapters.openai"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "MissingDependency" in done.stderr
    assert "pip install 'agentpref[openai]'" in done.stderr


def test_a_version_of_openai_that_works_otherwise_is_refused(
    openai_server: OpenAIServer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OpenAI(api_key="none", base_url=openai_server.url) as client:
        monkeypatch.delattr("openai._base_client.SyncAPIClient._process_response")
        with pytest.raises(ConfigError, match=r"openai [\d.]+ takes in its replies otherwise"):
            wrap(client, log)
