"""Off-policy evaluation of whole conversations that a small random model sampled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import agentpref
from agentpref import offpolicy_traces
from agentpref.errors import ConfigError, EvaluationError
from agentpref.models.base import load_base
from agentpref.models.tokenizer import encode_prompt
from agentpref.offpolicy_traces import off_policy_of_traces
from agentpref.serve.registry import Registry
from agentpref.traces import RewardSpec, read_traces
from agentpref.types import Prompt
from tests.core.test_offpolicy import QUESTION, by_name, home, taught  # noqa: F401

SPEC = RewardSpec({"won": 1.0}, gamma=0.9)


class Talker:
    """Draws conversations of two answers, of a letter each, from the base at temperature 1."""

    def __init__(self, folder):
        self.base = load_base(str(folder), precision="float32")
        self.known = {}

    def next(self, messages, source):
        key = str(messages)
        if key not in self.known:
            ids = torch.tensor([encode_prompt(Prompt("", tuple(messages)), self.base.template)])
            with torch.no_grad():
                logits = self.base.model(input_ids=ids).logits[0, -1].double()
            letters = [self.base.tokenizer.decode([n]) for n in range(len(logits))]
            usable = [n for n, text in enumerate(letters) if text.isascii() and text.isalpha()]
            self.known[key] = usable, torch.softmax(logits[usable], 0).numpy()
        usable, chances = self.known[key]
        token = usable[source.choice(len(usable), p=chances)]
        return token, self.base.tokenizer.decode([token])

    def talk(self, log, count, *, revision="base", temperature=1.0, seed=0):
        source = np.random.default_rng(seed)
        for place in range(count):
            messages, thread = [*QUESTION], f"{seed}-{place}"
            for turn in range(2):
                token, text = self.next(messages, source)
                run = log.record(
                    messages, text, revision=revision, token_ids=[token], logprobs=[-1.0],
                    params={"temperature": temperature}, thread_id=thread,
                )  # fmt: skip
                log.feedback(run, key="won", score=float(token % 3 == turn), source="code")
                messages += [{"role": "assistant", "content": text},
                             {"role": "user", "content": "And then?"}]  # fmt: skip
        log.flush()


@pytest.fixture(scope="module")
def talker(random_base):
    return Talker(random_base)


def test_what_served_earned_by_its_conversations_what_it_earned(
    home, random_base, talker  # noqa: F811
):  # fmt: skip
    with agentpref.Log(home) as log:
        talker.talk(log, 60)
    found = off_policy_of_traces(home, ["base"], spec=SPEC, model=str(random_base))
    worth = [trace.value(0.9) for trace in read_traces(home, SPEC).traces
             if any(step.scored for step in trace.steps)]  # fmt: skip
    one = by_name(found)["base"]
    assert (found.by, found.answers, one.own) == ("conversation", 60, 60)
    assert found.earned == pytest.approx(np.mean(worth))
    assert one.value == pytest.approx(np.mean(worth), abs=1e-6)
    assert one.ips == pytest.approx(one.value, abs=1e-6)
    assert one.effective == pytest.approx(60)
    assert one.low < one.value < one.high


def test_a_revision_near_what_served_is_weighed_step_by_step(
    home, random_base, talker, monkeypatch  # noqa: F811
):  # fmt: skip
    with agentpref.Log(home) as log:
        talker.talk(log, 80)
    live, real, logps = Registry(home).live().revision_id, offpolicy_traces.scored, {}

    def near(*given):
        kept, found = real(*given)
        source = np.random.default_rng(0)
        found[live] = found["base"] + source.normal(0, 0.2, len(kept))
        logps.update({one.run.run_id: found[live][n] - found["base"][n]
                      for n, one in enumerate(kept)})  # fmt: skip
        return kept, found

    monkeypatch.setattr(offpolicy_traces, "scored", near)
    found = off_policy_of_traces(home, ["base", "live"], spec=SPEC)
    one = by_name(found)[live]
    assert one.refused == ()
    traces = [t for t in read_traces(home, SPEC).traces if any(s.scored for s in t.steps)]
    value = 0.0
    for step in range(2):
        weights = [np.exp(sum(logps[s.run.run_id] for s in t.steps[: step + 1])) for t in traces]
        earned = [w * t.steps[step].reward for w, t in zip(weights, traces, strict=True)]
        value += 0.9**step * sum(earned) / sum(weights)
    assert one.value == pytest.approx(value)
    assert one.effective < 80
    assert by_name(found)["base"].better is not None  # less live's


def test_a_conversation_with_a_step_that_cannot_be_weighed_is_left_out_and_told(
    home, random_base, talker  # noqa: F811
):  # fmt: skip
    with agentpref.Log(home) as log:
        talker.talk(log, 55)
        talker.talk(log, 3, temperature=0.0, seed=1)
    found = off_policy_of_traces(home, ["base"], spec=SPEC, model=str(random_base))
    assert (found.answers, found.left_out["greedy"]) == (55, 3)


def test_few_conversations_say_nothing(home, random_base, talker):  # noqa: F811
    with agentpref.Log(home) as log:
        talker.talk(log, 12)
    found = off_policy_of_traces(home, ["base"], spec=SPEC, model=str(random_base))
    (one,) = found.revisions
    assert one.value is None
    assert one.refused[0].startswith("12 conversations can be weighed, and it takes 50")


def test_without_a_score_it_says_under_which_key_to_log_one(home, random_base):  # noqa: F811
    with pytest.raises(EvaluationError, match="no conversation of 'default' has a score under"):
        off_policy_of_traces(home, ["base"], spec=SPEC, model=str(random_base))
    with pytest.raises(ConfigError, match="gamma"):
        RewardSpec({"won": 1.0}, gamma=2.0)
