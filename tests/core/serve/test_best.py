"""The best of several answers: drawn from one revision, chosen by a score, refused without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from agentpref.errors import ConfigError, GenerationFailed, RewardError
from agentpref.serve.backend import GenerationRequest, Reply, encode_request
from agentpref.serve.best import BestOf
from agentpref.testing import FakeBackend

ASKED: Any = ({"role": "user", "content": "Hello?"},)


def answer(revision: str, request: GenerationRequest) -> str:
    return "x" * (1 + (request.seed or 0) * 7 % 5)


def longest(request: GenerationRequest, replies: Sequence[Reply]) -> list[float]:
    return [float(len(str(reply.message["content"]))) for reply in replies]


def asking(n: int, **given: Any) -> GenerationRequest:
    return GenerationRequest(ASKED, **{"temperature": 0.8, "seed": 0, "best_of": n} | given)


def test_the_best_of_several_answers_is_given_with_its_score() -> None:
    backend = FakeBackend(answer)
    reply = BestOf(backend, longest).generate("base", asking(4))
    assert (reply.message["content"], reply.score) == ("xxxxx", 5.0)
    assert [call for call, _ in backend.calls].count("generate") == 4


def test_one_answer_is_the_backends_own() -> None:
    reply = BestOf(FakeBackend(answer), longest).generate("base", asking(1))
    assert (reply.message["content"], reply.score) == ("x", None)


def test_a_stream_gives_the_best_answer_whole() -> None:
    pieces = [*BestOf(FakeBackend(answer), longest).stream("base", asking(4))]
    assert pieces[0] == "xxxxx"
    assert isinstance(pieces[1], Reply)
    assert pieces[1].score == 5.0
    plain = [*BestOf(FakeBackend(answer), longest).stream("base", asking(1))]
    assert plain[0] == "x"


def test_answers_that_cannot_be_scored_fail_the_request() -> None:
    def broken(request: GenerationRequest, replies: Sequence[Reply]) -> list[float]:
        raise RewardError("it was deleted")

    with pytest.raises(GenerationFailed, match="the best of 3 cannot be chosen: it was deleted"):
        BestOf(FakeBackend(answer), broken).generate("base", asking(3))


def test_everything_else_is_the_backends() -> None:
    backend = FakeBackend(answer)
    best = BestOf(backend, longest)
    assert best.capabilities() == backend.capabilities()
    assert best.list_loaded() == ()
    assert best.probe("base").revision == "base"
    best.unload("base")
    best.close()
    assert backend.calls[-1][0] == "unload"


@pytest.mark.parametrize("n", [0, 65, 2.5, True])
def test_a_number_out_of_range_is_refused(n: Any) -> None:
    with pytest.raises(ConfigError, match=r"best_of is .* a whole number from 1 to 64"):
        asking(n)


def test_greedy_answers_have_no_best() -> None:
    with pytest.raises(ConfigError, match="best_of is 4 with temperature 0"):
        asking(4, temperature=0.0)


def test_an_engine_without_a_score_refuses() -> None:
    with pytest.raises(ConfigError, match="needs a reward model; wrap the backend"):
        encode_request(asking(2), None, "tiny")  # type: ignore[arg-type]
