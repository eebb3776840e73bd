"""A gateway that answers with what is live in a home: revisions, swaps, canaries, refusals."""

from __future__ import annotations

import time
from contextlib import ExitStack

import httpx
import openai
import pytest
from anyio import CapacityLimiter
from web import serving

import agentpref
from agentpref.serve.best import BestOf
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref_adapters.gateway import Access, Gateway, Keys, Routed, create_app

ASK = [{"role": "user", "content": "Tell me about ships."}]


@pytest.fixture
def home(registry):
    return registry.home


@pytest.fixture
def routers():
    return {}


@pytest.fixture
def url(home, backend, routers):
    def open_upstream(namespace):
        router = routers[namespace] = Router(Registry(home, namespace=namespace), backend)
        limiter = CapacityLimiter(64)
        return Routed(router, model="own", decode=backend.decode, limiter=limiter, max_tokens=12)

    gateway = Gateway(
        lambda namespace: agentpref.Log(home.path, namespace=namespace),
        open_upstream,
        Access(Keys(home)),
    )
    with serving(create_app(gateway)) as address:
        yield address


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, **more):
    asked = {"model": "own", "messages": ASK, "temperature": 0, **more}
    return client.chat.completions.create(**asked)


def test_the_live_revision_answers_is_named_and_is_logged_with_its_tokens(
    client, registry, runs, backend
):
    name = registry.list()[-1].revision_id
    registry.promote(name)
    raw = client.chat.completions.with_raw_response.create(
        model="own", messages=ASK, temperature=0, logprobs=True, max_completion_tokens=5
    )
    reply = raw.parse()
    assert reply.system_fingerprint == name == raw.headers["x-agentpref-revision"]
    (run,) = runs()
    assert (run.run_id, run.revision, run.output["content"]) == (
        reply.id, name, reply.choices[0].message.content,
    )  # fmt: skip
    logprobs = [token.logprob for token in reply.choices[0].logprobs.content]
    assert logprobs == pytest.approx(run.logprobs)
    assert len(run.token_ids) == reply.usage.completion_tokens <= 5
    assert reply.usage.prompt_tokens > 0
    assert run.params["max_completion_tokens"] == 5


def test_a_stream_says_the_same_as_a_whole_answer(client):
    whole = ask(client).choices[0].message.content
    pieces = [*ask(client, stream=True, stream_options={"include_usage": True})]
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole
    assert pieces[-2].choices[0].finish_reason in ("stop", "length")
    assert pieces[-1].usage.completion_tokens > 0


def test_a_swap_changes_who_answers_and_a_canary_keeps_to_its_thread(client, registry, routers):
    first, second = (revision.revision_id for revision in registry.list()[:2])
    assert ask(client).system_fingerprint == "base"
    router = routers["default"]
    router.activate(first)
    assert ask(client).system_fingerprint == first
    router.canary(second, 0.5)
    seen = {
        n: {ask(client, user=f"thread {n}", max_tokens=1).system_fingerprint for _ in range(2)}
        for n in range(12)
    }
    assert all(len(found) == 1 for found in seen.values()), "a thread stays on one side"
    assert set().union(*seen.values()) == {first, second}


def test_the_best_of_several_answers_is_given_where_a_reward_model_chooses(
    client, routers, runs, backend
):
    ask(client)
    with pytest.raises(openai.BadRequestError, match="best_of is 2, which needs a reward model"):
        ask(client, temperature=1.0, extra_body={"best_of": 2})
    routers["default"].backend = BestOf(
        backend, lambda request, replies: [-len(reply.token_ids) for reply in replies]
    )
    reply = ask(client, temperature=1.0, seed=3, extra_body={"best_of": 4})
    assert reply.choices[0].score == -reply.usage.completion_tokens
    assert runs(least=2)[-1].params["best_of"] == 4
    with pytest.raises(openai.BadRequestError, match="best_of is 65"):
        ask(client, temperature=1.0, extra_body={"best_of": 65})


def test_several_answers_with_a_seed_differ_and_can_be_repeated(client, runs):
    def drawn():
        reply = ask(client, n=3, temperature=1.5, seed=3)
        return [choice.message.content for choice in reply.choices]

    first = drawn()
    assert first == drawn()
    assert len(set(first)) > 1
    assert len(runs(least=6)) == 6


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        ({"model": "gpt-4"}, 404, "ask for 'own'"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty is not supported"),
        ({"top_logprobs": 5, "logprobs": True}, 400, "top_logprobs is not supported"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_completion_tokens": 0}, 400, "max_tokens"),
        ({"stop": ["x"] * 99}, 400, "stop"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_cannot_do_is_refused_before_the_first_piece(
    url, more, status, message, stream
):
    body = {"model": "own", "messages": ASK, "stream": stream, **more}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_neutral_settings_that_clients_always_send_are_accepted(client):
    assert ask(client, presence_penalty=0, frequency_penalty=0, logit_bias={}, top_p=1).id


def test_a_client_that_leaves_gives_its_revision_back(url, client, routers, runs):
    with ExitStack() as stack:
        body = {"model": "own", "messages": ASK, "stream": True, "max_tokens": 200}
        answer = stack.enter_context(httpx.stream("POST", f"{url}/v1/chat/completions", json=body))
        lines = answer.iter_lines()
        next(lines)
    (run,) = runs()
    assert run.metadata["finish_reason"] in ("incomplete", "length", "stop")
    end = time.monotonic() + 10
    while routers["default"]._leases:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_models_are_the_base_and_what_is_live(client, registry, url):
    registry.promote(registry.list()[0].revision_id)
    (model,) = client.models.list().data
    assert (model.id, model.model_extra["revision"]) == ("own", registry.list()[0].revision_id)
    assert httpx.get(f"{url}/health").json()["status"] == "ok"


def test_with_tools_text_is_streamed_as_it_comes_and_says_what_a_whole_answer_says(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    whole = ask(client, tools=[tool]).choices[0].message
    pieces = [p.choices[0].delta for p in ask(client, tools=[tool], stream=True)]
    texts = [delta.content for delta in pieces if delta.content]
    assert "".join(texts) == (whole.content or "")
    assert len(texts) > 1


def test_a_call_that_is_enforced_is_streamed_as_a_call(client):
    schema = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    about = {"tools": [tool], "tool_choice": "required", "max_tokens": 60}
    whole = ask(client, **about).choices[0].message.tool_calls
    deltas = [p.choices[0].delta for p in ask(client, **about, stream=True)]
    streamed = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [(c.id, c.function.name, c.function.arguments) for c in streamed] == [
        (c.id, c.function.name, c.function.arguments) for c in whole or ()
    ]
