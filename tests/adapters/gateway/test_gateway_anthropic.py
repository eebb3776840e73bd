"""Anthropic's messages through the gateway, by its own client."""

from __future__ import annotations

import anthropic
import httpx
import pytest

ASK = [{"role": "user", "content": "say this"}]
TOOL = {"name": "weather", "description": "of a city", "input_schema": {"type": "object"}}


@pytest.fixture
def client(url):
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_a_whole_message_is_logged_in_openais_shape(client, runs, upstream):
    reply = client.messages.create(
        model="big", max_tokens=20, system=[{"type": "text", "text": "Be brief."}],
        messages=ASK, stop_sequences=["END"], metadata={"user_id": "ana"},
        thinking={"type": "adaptive"},
        extra_body={"temperature": 0.5},
    )  # fmt: skip
    assert reply.content[0].text == "say this"
    assert (reply.stop_reason, reply.usage.output_tokens) == ("end_turn", 2)
    (run,) = runs()
    assert run.run_id == reply.id
    assert [*run.prompt.messages] == [{"role": "system", "content": "Be brief."}, *ASK]
    assert run.params == {"max_tokens": 20, "stop": ["END"], "temperature": 0.5}
    assert run.user_id
    assert run.metadata["left_out"] == ["thinking"]
    assert "metadata" not in upstream.asked[0], "none of it is for the upstream"


def test_a_stream_has_anthropics_events(client, runs):
    with client.messages.stream(model="big", max_tokens=20, messages=ASK) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "say this "
    assert (final.content[0].text, final.stop_reason) == ("say this ", "end_turn")
    assert final.usage.input_tokens + final.usage.output_tokens == 5
    (run,) = runs()
    assert run.run_id == final.id


@pytest.mark.parametrize("stream", [False, True])
def test_tool_use_and_its_result_go_both_ways(client, runs, upstream, stream):
    asked = {"model": "big", "max_tokens": 20, "messages": ASK, "tools": [TOOL],
             "tool_choice": {"type": "any"}}  # fmt: skip
    if stream:
        with client.messages.stream(**asked) as events:
            reply = events.get_final_message()
    else:
        reply = client.messages.create(**asked)
    (use,) = [block for block in reply.content if block.type == "tool_use"]
    assert (use.name, use.input, reply.stop_reason) == ("weather", {"city": "Bern"}, "tool_use")
    assert upstream.asked[-1]["tool_choice"] == "required"
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain"}
    client.messages.create(
        model="big", max_tokens=20,
        messages=[*ASK, {"role": "assistant", "content": reply.content},
                  {"role": "user", "content": [result, {"type": "text", "text": "thanks"}]}],
    )  # fmt: skip
    sent = upstream.asked[-1]["messages"]
    assert sent[1]["tool_calls"][0]["function"]["arguments"] == '{"city":"Bern"}'
    assert sent[2] == {"role": "tool", "tool_call_id": use.id, "content": "rain"}
    assert sent[3] == {"role": "user", "content": "thanks"}
    assert len(runs(least=2)) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mcp_servers": [{}]}, "mcp_servers is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages.0"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0"),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice"),
        ({"tools": [{}]}, "tools.0 needs a name"),
    ],
)
def test_what_has_no_counterpart_is_refused_in_anthropics_shape(url, more, message):
    body = {"model": "big", "max_tokens": 5, "messages": ASK, **more}
    answer = httpx.post(f"{url}/v1/messages", json=body)
    assert answer.status_code == 400
    found = answer.json()
    assert (found["type"], found["error"]["type"]) == ("error", "invalid_request_error")
    assert message in found["error"]["message"]


def test_a_stream_that_breaks_ends_with_an_error_event(client, runs):
    with (
        pytest.raises(anthropic.APIError, match="broke off"),
        client.messages.stream(
            model="big", max_tokens=5, messages=[{"role": "user", "content": "break it"}]
        ) as stream,
    ):
        stream.until_done()
    (run,) = runs()
    assert run.metadata["finish_reason"] == "incomplete"


def test_a_wrong_key_is_told_in_anthropics_shape(start, home):
    from agentpref_adapters.gateway import Keys

    key = Keys(home).add("app")
    url = start()
    right = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)
    assert right.messages.create(model="big", max_tokens=5, messages=ASK).content
    wrong = anthropic.Anthropic(base_url=url, api_key="apk-app-nothing", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError, match="API key is wrong"):
        wrong.messages.create(model="big", max_tokens=5, messages=ASK)
    for client in (right, wrong):
        client.close()


def test_a_tool_of_anthropics_own_servers_is_refused_by_name(url):
    tool = {"type": "web_search_20250305", "name": "web_search"}
    body = {"model": "big", "max_tokens": 5, "messages": ASK, "tools": [tool]}
    answer = httpx.post(f"{url}/v1/messages", json=body)
    assert answer.status_code == 400
    assert "tools.0" in answer.json()["error"]["message"]
