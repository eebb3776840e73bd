"""Chat completions through the gateway, by OpenAI's own client and by hand."""

from __future__ import annotations

import time

import httpx
import openai
import pytest

ASK = [{"role": "user", "content": "say this"}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_whole_answer_is_logged_under_its_id_and_keeps_what_the_upstream_added(
    client, runs, upstream
):
    reply = client.chat.completions.create(
        model="big", messages=ASK, temperature=0.3, seed=7, user="ana",
        metadata={"thread_id": "t-1", "tags": "sea, ships", "page": "3"},
    )  # fmt: skip
    assert reply.choices[0].message.content == "say this"
    assert reply.model_extra["extra"] == {"kept": True}
    (run,) = runs()
    assert run.run_id == reply.id
    assert [*run.prompt.messages] == ASK
    assert run.output == {"role": "assistant", "content": "say this"}
    assert (run.model, run.thread_id, run.tags) == ("big-7", "t-1", ("sea", "ships"))
    assert run.params == {"temperature": 0.3, "seed": 7}
    assert run.metadata["finish_reason"] == "stop"
    assert run.metadata["usage"]["completion_tokens"] == 2
    assert run.metadata["page"] == "3"
    assert run.user_id
    (asked,) = upstream.asked
    assert asked["metadata"] == {"page": "3"}, "what is for the gateway goes no further"
    assert upstream.keys == ["Bearer sk-upstream"], "the app's own key goes no further"


def test_a_stream_comes_piece_by_piece_under_one_id_and_is_logged_whole(client, runs, upstream):
    stream = client.chat.completions.create(
        model="big", messages=[{"role": "user", "content": "slow but sure"}], stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    pieces = iter(stream)
    first = [next(pieces), next(pieces)]
    assert first[1].choices[0].delta.content == "slow ", "nothing is held back"
    upstream.go_on.set()
    rest = [*first, *pieces]
    assert {piece.id for piece in rest} == {first[0].id}
    assert "".join(p.choices[0].delta.content or "" for p in rest if p.choices) == "slow but sure "
    assert rest[-1].usage.total_tokens == 5
    (run,) = runs()
    assert (run.run_id, run.output["content"]) == (first[0].id, "slow but sure ")
    assert run.metadata["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_are_passed_on_and_logged_with_the_tools(client, runs, stream):
    reply = client.chat.completions.create(model="big", messages=ASK, tools=[TOOL], stream=stream)
    if stream:
        parts = [p.choices[0].delta.tool_calls for p in reply if p.choices]
        written = "".join(part[0].function.arguments for part in parts if part)
    else:
        written = reply.choices[0].message.tool_calls[0].function.arguments
    assert written == '{"city": "Bern"}'
    (run,) = runs()
    (call,) = run.output["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
    assert call["id"] == "call_1"
    assert [*run.prompt.tools] == [TOOL]
    assert run.metadata["finish_reason"] == "tool_calls"


def test_each_of_several_answers_is_a_run(client, runs):
    reply = client.chat.completions.create(model="big", messages=ASK, n=3)
    assert {run.run_id for run in runs(least=3)} == {reply.id, f"{reply.id}:1", f"{reply.id}:2"}


def test_a_client_that_leaves_ends_the_upstream_and_what_it_saw_is_incomplete(url, runs, upstream):
    body = {"model": "big", "messages": [{"role": "user", "content": "slow and long"}]}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}) as reply:
        lines = reply.iter_lines()
        while "slow" not in next(lines):
            pass
    (run,) = runs()
    assert run.output["content"] == "slow "
    assert run.metadata["finish_reason"] == "incomplete"
    _soon(lambda: upstream.ended == ["left"])
    upstream.ended.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.5)
    _soon(lambda: upstream.ended == ["left"])
    assert len(runs()) == 1, "nothing was delivered of the second"


@pytest.mark.parametrize(("word", "message"), [("break", "broke off"), ("error", "out of memory")])
def test_an_upstream_that_breaks_in_the_middle_gives_an_error_event(client, runs, word, message):
    stream = client.chat.completions.create(
        model="big", messages=[{"role": "user", "content": f"{word} now"}], stream=True
    )
    with pytest.raises(openai.APIError, match=message):
        list(stream)
    (run,) = runs()
    assert run.metadata["finish_reason"] == "incomplete"


@pytest.mark.parametrize(
    ("word", "kind", "message"),
    [
        ("refuse", openai.BadRequestError, "too long for me"),
        ("busy", openai.RateLimitError, "slow down"),
        ("locked", openai.InternalServerError, "refuses the gateway's key"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_upstream_keeps_its_status_and_message(
    client, home, word, kind, message, stream
):
    asked = [{"role": "user", "content": f"{word} me"}]
    with pytest.raises(kind, match=message) as caught:
        client.chat.completions.create(model="big", messages=asked, stream=stream)
    assert "sk-upstream" not in str(caught.value)
    if word == "busy":
        assert caught.value.response.headers["retry-after"] == "7"


def test_an_upstream_that_speaks_html_is_told_whole_and_streamed(client):
    asked = {"model": "big", "messages": [{"role": "user", "content": "html please"}]}
    with pytest.raises(openai.InternalServerError, match="no JSON"):
        client.chat.completions.create(**asked)
    with pytest.raises(openai.InternalServerError, match="no stream; check its address"):
        client.chat.completions.create(**asked, stream=True)


def test_an_upstream_that_is_down_or_slow_is_told_apart(start, upstream_url, home):
    from web import serving

    import agentpref
    from agentpref_adapters.gateway import Access, Gateway, Keys, Proxied, create_app

    def through(proxied):
        gateway = Gateway(
            lambda namespace: agentpref.Log(home.path),
            lambda namespace: proxied,
            Access(Keys(home)),
        )
        with serving(create_app(gateway)) as url:
            body = {"model": "big", "messages": [{"role": "user", "content": "slow"}]}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body)
            return answer.status_code, answer.json()["error"]["code"], httpx.get(f"{url}/health")

    status, code, health = through(Proxied("http://127.0.0.1:9", timeout=1.0))
    assert (status, code) == (502, "upstream_unreachable")
    assert health.status_code == 503
    assert "cannot be reached" in health.json()["problems"]["default"]
    status, code, health = through(Proxied(upstream_url, timeout=0.2))
    assert (status, code) == (504, "upstream_timeout")
    assert health.status_code == 200


def test_a_retry_of_a_client_library_gets_the_same_answer_and_makes_no_second_run(
    url, runs, upstream
):
    body = {"model": "big", "messages": ASK, "user": "ana"}
    first, second, other = (
        httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers).json()
        for headers in (
            {"x-stainless-retry-count": "0"},
            {"x-stainless-retry-count": "1"},
            {"x-stainless-retry-count": "0"},
        )
    )
    assert second == first
    assert other["id"] != first["id"], "asked again on purpose"
    keyed = {"Idempotency-Key": "k-1"}
    once, again = (
        httpx.post(f"{url}/v1/chat/completions", json=body, headers=keyed).json() for _ in range(2)
    )
    assert once == again
    assert len(upstream.asked) == 3
    assert len(runs(least=3)) == 3


def test_of_an_app_that_names_nobody_only_a_key_names_a_call(url):
    """Else one person's retry could get the answer, and the run, of another's same words."""
    body = {"model": "big", "messages": ASK}
    first, second = (
        httpx.post(
            f"{url}/v1/chat/completions", json=body, headers={"x-stainless-retry-count": count}
        ).json()["id"]
        for count in "01"
    )
    assert first != second


def test_the_thread_comes_from_metadata_a_header_the_user_or_the_beginning(url, runs):
    def thread(body=None, headers=None, messages=ASK):
        full = {"model": "big", "messages": messages, **(body or {})}
        answer = httpx.post(f"{url}/v1/chat/completions", json=full, headers=headers)
        return answer.headers["x-thread-id"]

    assert thread({"metadata": {"thread_id": "m"}, "user": "u"}, {"X-Thread-Id": "h"}) == "m"
    assert thread({"user": "u"}, {"X-OpenWebUI-Chat-Id": "chat"}) == "chat"
    assert thread({"user": "u"}) == "u"
    later = [*ASK, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "more"}]
    assert thread() == thread(messages=later) != thread(messages=later[1:])


def test_chat_apps_say_which_message_a_run_is(url, runs):
    headers = {"X-OpenWebUI-Chat-Id": "c1", "X-OpenWebUI-Message-Id": "m1"}
    httpx.post(f"{url}/v1/chat/completions", json={"messages": ASK}, headers=headers)
    (run,) = runs()
    assert run.metadata["open_webui"] == {"chat_id": "c1", "message_id": "m1"}
    assert run.thread_id == "c1"


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 400, "no JSON"),
        (b"[]", 400, "no JSON object"),
        (b"{}", 400, "messages"),
        (b'{"messages": []}', 400, "messages"),
        (b'{"messages": ["hello"]}', 400, "message"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 99}', 400, "n is 99"),
        (b'{"messages": [{"role": "user", "content": "x"}], "metadata": 3}', 400, "metadata"),
        (b'{"messages": [{"role": "user", "content": "x"}], "user": {"a": 1}}', 400, "user"),
        (b"\xff\xfe", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b'{"messages": "' + b"x" * 2_000_000 + b'"}', 413, "more than 1,048,576 bytes"),
    ],
)
def test_a_bad_body_is_refused_by_name(start, content, status, message):
    url = start(max_bytes=1 << 20)
    answer = httpx.post(f"{url}/v1/chat/completions", content=content)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    chunks = (content[i : i + 65536] for i in range(0, len(content), 65536))
    assert httpx.post(f"{url}/v1/chat/completions", content=chunks).status_code == status


def test_nothing_else_of_the_upstream_is_reachable(url):
    for method, path in (
        ("GET", "/v1/secrets"), ("POST", "/v1/embeddings"), ("GET", "/v1/chat/completions"),
        ("GET", "/v1/../v1/secrets"), ("DELETE", "/v1/models"),
    ):  # fmt: skip
        answer = httpx.request(method, f"{url}{path}")
        assert answer.status_code in (404, 405), path
        assert answer.json()["error"]["message"]
    assert httpx.get(f"{url}/v1/models").json()["data"] == [{"id": "big", "object": "model"}]
    assert httpx.get(f"{url}/v1/models/big").json()["id"] == "big"
    assert httpx.get(f"{url}/v1/models/small").status_code == 404


def test_calls_beyond_the_limit_are_told_to_come_back(start, upstream):
    url = start(max_open=1)
    body = {"messages": [{"role": "user", "content": "slow one"}], "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as first:
        lines = first.iter_lines()
        next(lines)
        second = httpx.post(f"{url}/v1/chat/completions", json={"messages": ASK})
        assert (second.status_code, second.headers["retry-after"]) == (503, "1")
        assert "agentpref_open_calls 1.0" in httpx.get(f"{url}/metrics").text
    _soon(lambda: httpx.post(f"{url}/v1/chat/completions", json={"messages": ASK}).is_success)


def test_the_metrics_count_requests_runs_and_judgements_and_hold_no_text(url, runs):
    reply = httpx.post(f"{url}/v1/chat/completions", json={"messages": ASK}).json()
    httpx.post(
        f"{url}/feedback",
        json={"inference_id": reply["id"], "metric_name": "thumbs", "value": True},
    )
    text = httpx.get(f"{url}/metrics").text
    assert 'agentpref_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'agentpref_runs_total{end="whole",namespace="default"} 1.0' in text
    assert 'agentpref_judgements_total{kind="feedback"} 1.0' in text
    assert "say this" not in text
    assert reply["id"] not in text


def _soon(holds, seconds=5.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_log_of_another_machine_brings_its_runs_through_the_gateway(url, runs, tmp_path):
    from agentpref_adapters.remote import RemoteLog

    with RemoteLog(url, "any", outbox=tmp_path / "outbox") as log:
        run = log.record(ASK, "hello")
        log.thumbs(run, up=True)
        assert log.flush(20)
    assert [one.run_id for one in runs()] == [run]


def test_others_who_say_the_same_get_answers_of_their_own(url, runs):
    def ask(user, count):
        headers = {"x-stainless-retry-count": count, "X-OpenWebUI-User-Id": user}
        return httpx.post(f"{url}/v1/chat/completions", json={"messages": ASK}, headers=headers)

    first = ask("ana", "0").json()["id"]
    assert ask("bob", "1").json()["id"] != first
    assert ask("ana", "1").json()["id"] == first


def test_a_stream_that_was_whole_is_not_made_again_under_its_key(url, runs, upstream):
    body = {"messages": ASK, "stream": True}
    texts = [
        httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Idempotency-Key": "k"}).text
        for _ in range(2)
    ]
    assert len(upstream.asked) == 1
    assert all("say" in text and text.endswith("data: [DONE]\n\n") for text in texts)
    assert len(runs()) == 1


def test_a_stream_of_tool_calls_that_is_repeated_reads_as_the_first(url):
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        found = []
        for _ in range(2):
            stream = client.chat.completions.create(
                model="big", messages=ASK, tools=[TOOL], stream=True,
                extra_headers={"Idempotency-Key": "calls"},
            )  # fmt: skip
            calls = [c for p in stream if p.choices for c in p.choices[0].delta.tool_calls or ()]
            arguments = "".join(call.function.arguments for call in calls)
            found.append(({call.index for call in calls}, arguments))
    assert found[0] == found[1] == ({0}, '{"city": "Bern"}')


def test_calls_without_numbers_are_told_apart_by_their_ids():
    from agentpref_adapters.gateway.upstream import Answer

    answer = Answer()
    for name, text in (("a", '{"x": '), ("a", "1}"), ("b", "{}")):
        call = {"id": name, "function": {"name": name, "arguments": text}}
        answer.add({"choices": [{"delta": {"tool_calls": [call]}}]})
    calls = answer.choices[0].message["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == ['{"x": 1}', "{}"]


@pytest.mark.parametrize(
    ("header", "value"), [("Authorization", "Basic é"), ("Origin", "http://["), ("Host", "[")]
)
def test_odd_headers_are_no_failure_of_ours(url, header, value):
    answer = httpx.post(
        f"{url}/v1/chat/completions", json={"messages": ASK}, headers={header: value.encode()}
    )
    assert answer.status_code < 500
