"""A gateway before upstreams of all kinds: what they refuse, leave out and get wrong."""

from __future__ import annotations

import logging

import httpx
import orjson
import pytest
from starlette.responses import Response
from web import serving

import agentpref
from agentpref_adapters.gateway import Access, Gateway, Keys, Proxied, create_app

BODY = {"model": "big", "messages": [{"role": "user", "content": "hello there"}]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


REFUSED = {"message": "m", "param": "temperature", "code": "bad"}


def reply(choice, **more):
    content = {"id": "u", "object": "chat.completion", "model": "big", "choices": [choice], **more}
    return Response(orjson.dumps(content), media_type="application/json")


def said(content, reason="stop", **message):
    message = {"role": "assistant", "content": content, **message}
    return {"index": 0, "message": message, "finish_reason": reason}


def events(*pieces):
    lines = (b"data: %s\n\n" % (p if isinstance(p, bytes) else orjson.dumps(p)) for p in pieces)
    return Response(b"".join(lines), media_type="text/event-stream")


def piece(delta, reason=None):
    return {"id": "u", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def ask(url, path="/v1/chat/completions", **more):
    return httpx.post(f"{url}{path}", json={**BODY, "max_tokens": 9, **more})


def test_no_cookie_of_the_upstream_reaches_another_call(url, upstream):
    upstream.script = [Response(b"{}", headers={"Set-Cookie": "session=of-one"})]
    ask(url)
    ask(url)
    assert upstream.cookies == [None, None]


def test_health_asks_the_upstream_before_anybody_has_called(home):
    gateway = Gateway(
        lambda namespace: agentpref.Log(home.path),
        lambda namespace: Proxied("http://127.0.0.1:9", timeout=1.0),
        Access(Keys(home)),
    )
    with serving(create_app(gateway)) as url:
        answer = httpx.get(f"{url}/health")
    assert answer.status_code == 503
    assert "cannot be reached" in answer.json()["problems"]["default"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_upstream_is_a_line_in_the_operators_log(url, upstream, caplog, stream):
    upstream.script = [Response(b"<html>", 500)]
    with caplog.at_level(logging.WARNING, logger="agentpref"):
        assert ask(url, stream=stream).status_code == 502
    assert "answered with status 500" in caplog.text


def test_a_stream_that_breaks_off_is_a_line_in_the_operators_log(url, upstream, caplog):
    upstream.script = [events(piece({"content": "so"}))]
    with caplog.at_level(logging.WARNING, logger="agentpref"):
        assert "broke off" in ask(url, stream=True).text
    assert "broke off" in caplog.text


@pytest.mark.parametrize(
    ("answer", "status", "error"),
    [
        (
            Response(orjson.dumps({"error": REFUSED}), 400),
            400,
            REFUSED,
        ),
        (Response(b"", 503, {"Retry-After": "4"}), 503, {"message": "answered with status 503"}),
        (
            Response(orjson.dumps({"error": {"message": "not in your region, sk-upstream"}}), 403),
            502,
            {"message": "status 403: not in your region, …"},
        ),
        (Response(b"", 401), 502, {"message": "set AGENTPREF_UPSTREAM_KEY"}),
        (
            Response(b"", 307, {"Location": "http://b/v1"}),
            502,
            {"message": "redirects to http://b"},
        ),
        (Response(b"[1]", 200), 502, {"message": "no JSON object"}),
        (Response(b'{"choices": 3}', 200), 502, {"message": "gave no choices"}),
    ],
    ids=["400", "503", "403", "401", "307", "list", "no choices"],
)
def test_what_the_upstream_refuses_says_what_it_said_and_what_to_do(
    url, upstream, answer, status, error
):
    upstream.script = [answer]
    found = ask(url)
    assert found.status_code == status
    assert error["message"] in found.json()["error"]["message"]
    for name in ("param", "code"):
        assert found.json()["error"][name] == error.get(name, found.json()["error"][name])
    assert found.headers.get("retry-after") == answer.headers.get("retry-after")


@pytest.mark.parametrize("content", ["", None])
def test_an_answer_that_says_nothing_is_a_run_that_can_be_judged(url, upstream, runs, content):
    upstream.script = [reply(said(content))]
    run_id = ask(url).json()["id"]
    (run,) = runs()
    assert (run.run_id, run.output["content"]) == (run_id, "")
    thumb = {"inference_id": run_id, "metric_name": "thumbs", "value": False}
    assert httpx.post(f"{url}/feedback", json=thumb).status_code == 200


def test_a_stream_that_ends_without_saying_done_is_whole_for_the_client_and_the_log(
    url, upstream, runs
):
    upstream.script = [events(piece({"content": "Noon."}), piece({}, "stop"))]
    text = ask(url, stream=True).text
    assert "error" not in text
    assert text.endswith("data: [DONE]\n\n")
    (run,) = runs()
    assert run.metadata["finish_reason"] == "stop"


def test_comments_other_line_ends_and_several_lines_of_data_are_read(url, upstream, runs):
    lines = orjson.dumps(piece({"content": "Noon."}, "stop"), option=orjson.OPT_INDENT_2)
    data = b"".join(b"data:%s\r\n" % line for line in lines.splitlines())
    stream = b": keep-alive\r\n\r\nevent: x\r\n" + data + b"\r\ndata: [DONE]\r\n\r\n"
    upstream.script = [Response(stream, media_type="text/event-stream; charset=utf-8")]
    ask(url, stream=True)
    (run,) = runs()
    assert run.output["content"] == "Noon."


def test_a_piece_without_end_is_refused(url, upstream):
    upstream.script = [Response(b"data: " + b"x" * (9 << 20), media_type="text/event-stream")]
    assert "more than 4,194,304 bytes" in ask(url, stream=True).text


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (reply("text"), {"content": [], "stop_reason": "end_turn"}),
        (reply(said("x"), usage="many"), {"usage": {"input_tokens": 0, "output_tokens": 0}}),
        (
            reply(said([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])),
            {"content": [{"type": "text", "text": "ab"}]},
        ),
        (
            reply(said(None, tool_calls=[{"id": "c1"}])),
            {"content": [{"type": "tool_use", "id": "c1", "name": None, "input": {}}]},
        ),
        (
            reply(said(None, tool_calls=[{**CALL, "function": {"name": "f", "arguments": "{b"}}])),
            {
                "content": [
                    {"type": "tool_use", "id": "c1", "name": "f", "input": {"arguments": "{b"}}
                ],
                "stop_reason": "tool_use",
            },
        ),
        (reply(said(None, tool_calls=[CALL])), {"stop_reason": "tool_use"}),
        (
            reply({**said("x"), "stop_reason": "END"}),
            {"stop_reason": "stop_sequence", "stop_sequence": "END"},
        ),
    ],
    ids=["choice", "usage", "parts", "no function", "no JSON", "stop with calls", "stop sequence"],
)
def test_whatever_an_upstream_answers_is_a_message_of_anthropics(url, upstream, answer, found):
    upstream.script = [answer]
    message = ask(url, "/v1/messages").json()
    assert {key: message[key] for key in found} == found


def test_a_stream_with_calls_ends_with_tool_use_whatever_the_upstream_calls_it(url, upstream):
    upstream.script = [events(piece({"tool_calls": [{"index": 0, **CALL}]}), piece({}, "stop"))]
    text = ask(url, "/v1/messages", stream=True).text
    assert '"stop_reason":"tool_use"' in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0 needs a function with a name"),
        ({"logprobs": "yes"}, "logprobs must be true or false"),
    ],
)
def test_a_request_without_sense_is_refused_here(url, upstream, more, message):
    answer = ask(url, **more)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
    assert upstream.asked == []


def test_a_method_that_messages_has_not_is_told_in_anthropics_shape(url):
    answer = httpx.get(f"{url}/v1/messages")
    assert (answer.status_code, answer.json()["type"]) == (405, "error")
