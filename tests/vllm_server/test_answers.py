"""What a real vLLM answers through the backend is what transformers and peft answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from asked import MAX_LORAS, QUESTIONS, ask

from agentpref.serve.backend import GenerationRequest, Reply, Revision
from agentpref_adapters.vllm import VllmBackend

Expected = Callable[..., Reply]
Publish = Callable[[int], list[Revision]]


@pytest.fixture
def loaded(backend: VllmBackend, publish: Publish) -> list[Revision]:
    """As many revisions as fit, ready to answer; the first two are asked."""
    revisions = publish(MAX_LORAS)
    for revision in revisions:
        backend.validate(revision)
        backend.load(revision)
        backend.probe(revision.revision_id)
    return revisions[:2]


def alike(ours: Reply, theirs: Reply) -> None:
    """The same tokens, text and end; log-probabilities as near as two kernels come."""
    assert ours.token_ids == theirs.token_ids
    assert ours.message == theirs.message
    assert ours.finish_reason == theirs.finish_reason
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)


def streamed(backend: VllmBackend, name: str, request: GenerationRequest) -> tuple[str, Reply]:
    *pieces, reply = backend.stream(name, request)
    assert isinstance(reply, Reply)
    return "".join(map(str, pieces)), reply


def test_prompts_are_longer_than_a_block_of_the_cache(backend: VllmBackend) -> None:
    assert len(backend._encode(ask(QUESTIONS[0]))) > 2 * 128


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_answers_are_those_of_transformers_and_peft(
    backend: VllmBackend, loaded, expected: Expected, question: str
) -> None:
    request = ask(question)
    for revision in (None, *loaded):
        name = _name(revision)
        reply = backend.generate(name, request)
        assert reply.revision == name
        alike(reply, expected(revision, request))
    replies = {backend.generate(name, request).token_ids for name in map(_name, [None, *loaded])}
    assert len(replies) == 3, "else a mixed-up revision would not be noticed"


def test_a_stream_is_the_same_answer_in_pieces(
    backend: VllmBackend, loaded, expected: Expected
) -> None:
    for revision, question in zip((None, *loaded), QUESTIONS, strict=True):
        name, request = _name(revision), ask(question)
        text, reply = streamed(backend, name, request)
        alike(reply, expected(revision, request))
        assert text == (reply.message.get("content") or "")


def test_concurrent_requests_are_answered_by_their_own_revision(
    backend: VllmBackend, loaded, expected: Expected
) -> None:
    assert wrong_of_many(backend, loaded, expected) == []


@pytest.mark.xfail(reason="vllm-project/vllm#48421: on processors an adapter is added to the base")
def test_the_base_answers_beside_revisions(
    backend: VllmBackend, loaded, expected: Expected
) -> None:
    assert wrong_of_many(backend, [None, *loaded], expected) == []


def wrong_of_many(
    backend: VllmBackend, revisions: Sequence[Revision | None], expected: Expected
) -> list[Reply]:
    """Ask all of them everything from eight threads; return what is not as expected."""
    asked = [(revision, ask(question)) for question in QUESTIONS for revision in revisions] * 3
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda one: backend.generate(_name(one[0]), one[1]), asked))
    return [
        reply
        for (revision, request), reply in zip(asked, replies, strict=True)
        if reply.token_ids != expected(revision, request).token_ids
    ]


def test_max_tokens_ends_an_answer(backend: VllmBackend, loaded, expected: Expected) -> None:
    request = ask(QUESTIONS[0], max_tokens=3)
    reply = backend.generate(loaded[0].revision_id, request)
    assert (len(reply.token_ids), reply.finish_reason) == (3, "length")
    alike(reply, expected(loaded[0], request))


def test_an_answer_ends_at_the_end_of_the_context(
    backend: VllmBackend, loaded, expected: Expected
) -> None:
    request = ask(QUESTIONS[0], max_tokens=100_000)
    room = 512 - len(backend._encode(request))
    reply = backend.generate(loaded[0].revision_id, request)
    assert len(reply.token_ids) <= room
    limited = expected(loaded[0], replace(request, max_tokens=room))
    assert reply.token_ids == limited.token_ids


def test_a_stop_string_ends_an_answer(backend: VllmBackend, loaded, expected: Expected) -> None:
    for revision in (None, loaded[0]):
        name = _name(revision)
        whole = str(expected(revision, ask(QUESTIONS[1])).message["content"])
        stop = whole[len(whole) // 2 :][:3]
        request = ask(QUESTIONS[1], stop=(stop,))
        reply, theirs = backend.generate(name, request), expected(revision, request)
        assert reply.message == theirs.message
        assert stop not in str(reply.message["content"])
        assert reply.finish_reason == "stop"
        text, last = streamed(backend, name, request)
        assert text == reply.message["content"]
        assert last.message == reply.message


def test_a_seed_fixes_a_sampled_answer(backend: VllmBackend, loaded) -> None:
    name = loaded[0].revision_id
    request = ask(QUESTIONS[0], temperature=1.0, top_p=0.9, seed=7)
    first = backend.generate(name, request)
    assert backend.generate(name, request).token_ids == first.token_ids
    others = {backend.generate(name, replace(request, seed=seed)).token_ids for seed in range(4)}
    assert len(others) > 1
    assert all(math.isfinite(logprob) and logprob <= 0 for logprob in first.logprobs)


def test_tools_reach_the_prompt(backend: VllmBackend, expected: Expected) -> None:
    tool = {
        "type": "function",
        "function": {"name": "set_timer", "parameters": {"type": "object", "properties": {}}},
    }
    request = replace(ask("Set a timer of 5 minutes."), tools=(tool,), max_tokens=48)
    alike(backend.generate("base", request), expected(None, request))


def test_a_conversation_of_several_turns_is_answered(
    backend: VllmBackend, loaded, expected: Expected
) -> None:
    turns = ({"role": "system", "content": "Be brief."}, *ask("Hello!").messages)
    turns += ({"role": "assistant", "content": "Hello."}, {"role": "user", "content": "And now?"})
    request = GenerationRequest(messages=turns, max_tokens=16)
    alike(backend.generate(loaded[1].revision_id, request), expected(loaded[1], request))


def _name(revision: Revision | None) -> str:
    return "base" if revision is None else revision.revision_id
