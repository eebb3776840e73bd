"""Judges behind OpenAI's API, a LangChain chat model and a model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage

from agentpref.errors import JudgeError
from agentpref.prefer.judges.hearing import Case, Forgetful, Spending, hear
from agentpref.prefer.judges.rubric import Rubric, parse
from agentpref.prefer.judges.verdicts import Opinion, Question
from agentpref.testing import JudgeServer
from agentpref_adapters import judges


def rubric(*lines: str) -> Rubric:
    return parse("t", "\n".join(("---", "principles: [be brief]", *lines, "---", "")))


def case(number: int) -> Case:
    asked = ({"role": "user", "content": f"question {number}"},)
    answers = ({"role": "assistant", "content": text} for text in ("short", "much longer"))
    return Case(Question(asked, *answers))


CASES = [case(number) for number in range(40)]


def heard(judge: Any, cases: Sequence[Case] = CASES, **given: Any) -> dict[int, Opinion]:
    return dict(hear(judge, cases, **{"memory": Forgetful(), "spending": Spending()} | given))


def test_faults_of_a_server_lose_no_verdict() -> None:
    faults: dict[str, Any] = {"stalls": 0.05, "malformed": 0.1, "busy": 0.1, "broken": 0.05}
    spending = Spending()
    with JudgeServer(**faults, stall=0.5, chatter=True, delay=0.001) as server:
        judge = judges.openai(rubric("model: m", f"base_url: {server.url}", "timeout: .25"))
        found = heard(judge, spending=spending, concurrency=16)
        assert server.calls["judged"] == 80 + 1  # and a control of the answer that always wins
        assert all(server.calls[fault] for fault in faults)
    assert {number: one.winner for number, one in found.items()} == dict.fromkeys(range(40), "a")
    assert spending.failed == {}
    malformed = server.calls["malformed"]
    assert spending.prompt_tokens + spending.completion_tokens == 120 * (81 + malformed)


def test_confidence_is_read_where_the_server_gives_log_probabilities() -> None:
    with JudgeServer(logprobs=True) as server:
        judge = judges.openai(rubric("model: m", f"base_url: {server.url}"))
        assert heard(judge, CASES[:1])[0].confidence == pytest.approx(0.9, abs=0.01)


def test_a_server_that_is_not_there_is_named_after_the_retries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(judges, "RETRIES", 0)
    judge = judges.openai(rubric("model: m", "base_url: http://127.0.0.1:9/v1"))
    with pytest.raises(JudgeError, match=r"m at http://127.0.0.1:9/v1 failed \(APIConnectionError"):
        judge.judge([CASES[0].question.prompt], [CASES[0].question[1:]])


def test_a_missing_key_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(JudgeError, match="set the environment variable MY_KEY"):
        judges.openai(rubric("model: m", "api_key_env: MY_KEY"))


@pytest.mark.parametrize("engine", [judges.openai, judges.langchain, judges.transformers])
def test_a_rubric_without_a_model_is_refused(engine: Any) -> None:
    with pytest.raises(JudgeError, match="names no model"):
        engine(rubric())


def test_a_chat_model_of_langchain_judges() -> None:
    usage = {"input_tokens": 9, "output_tokens": 3, "total_tokens": 12}
    said = AIMessage("Reason: it is brief\nVerdict: B", usage_metadata=usage)
    judge = judges.of_chat_model(rubric("model: m"), GenericFakeChatModel(messages=iter([said])))
    (verdict,) = judge.judge([CASES[0].question.prompt], [CASES[0].question[1:]])
    assert (verdict.winner, verdict.rationale) == ("b", "it is brief")
    assert (verdict.prompt_tokens, verdict.completion_tokens) == (9, 3)


def test_a_provider_of_langchain_that_fails_is_told() -> None:
    judge = judges.of_chat_model(rubric("model: m"), GenericFakeChatModel(messages=iter([])))
    with pytest.raises(JudgeError, match="judge 't' failed"):
        judge.judge([CASES[0].question.prompt], [CASES[0].question[1:]])


def test_a_model_in_this_process_that_cannot_judge_is_told_so() -> None:
    judge = judges.transformers(rubric("model: tiny", "max_tokens: 16"))
    spending = Spending()
    found = heard(judge, CASES[:2], spending=spending)
    assert found == {}
    assert spending.failed == {"no verdict": 4}
    assert spending.prompt_tokens > 0


def test_a_small_model_in_this_process_finds_the_form_of_a_verdict() -> None:
    judge = judges.transformers(rubric("model: tiny", "max_tokens: 400", "scale: 2"))
    spending = Spending()
    found = heard(judge, CASES[:3], spending=spending)
    assert (len(found), spending.failed) == (3, {})
    assert all(one.as_given.winner in ("a", "b") for one in found.values())


def test_a_question_that_the_model_refuses_is_no_dead_server() -> None:
    with JudgeServer(refuses=0.5) as server:
        judge = judges.openai(rubric("model: m", f"base_url: {server.url}", "control: false"))
        spending = Spending()
        found = heard(judge, spending=spending, concurrency=1)
    (why,) = spending.failed
    assert why.startswith("refused by m: Error code: 400")
    assert 0 < len(found) < 40
