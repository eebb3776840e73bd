"""What is measured of models: how far a candidate moved, and what it writes."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from agentpref.config import UpdateConfig
from agentpref.learn import memory
from agentpref.learn.encode import EncodedExample
from agentpref.learn.learner import Learner
from agentpref.models.base import load_base
from agentpref.models.tokenizer import encode_prompt
from agentpref.prove.checks import run_checks
from agentpref.prove.evaluate import answer, kl_from_base
from agentpref.prove.metrics import distinct_n
from agentpref.prove.probes import Writing, choose_probes, generations, token_limit

CALL, BROKEN = '<tool_call>{"a":1}</tool_call>', '<tool_call>{"a":1</tool_call>'


@pytest.fixture
def prompts(pair_of):
    return [pair_of(number, "yes").prompt for number in (3, 50, 1234)]


def encoded(pair_of, *completions):
    return EncodedExample(pair_of(1, "yes"), (1,), completions, (None, None))


def tokens(learner, text):
    return learner.base.tokenizer(text, add_special_tokens=False)["input_ids"]


def poison(learner):
    with learner.policy("candidate") as model, torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))


# KL


def test_a_fresh_candidate_has_not_moved(fresh_learner, pair_of):
    learner = fresh_learner()
    rows = learner.encode([pair_of(n, "yes") for n in range(5)])
    assert kl_from_base(learner, rows, seed=0) == pytest.approx(0.0, abs=1e-6)


def kl_by_hand(learner, prompt, completion):
    """KL(base ‖ candidate) per token of the completion, of which there are 16 at least."""
    ids, logs = torch.tensor([prompt + completion]), []
    for policy in ("base", "candidate"):
        with torch.no_grad(), learner.policy(policy) as model:
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        logs.append(logits.double().log_softmax(-1))
    base, candidate = logs
    return float((base.exp() * (base - candidate)).sum()) / max(16, len(completion))


def test_kl_is_the_mean_over_completions_of_their_means(taught, pair_of, monkeypatch):
    learner = taught("yes")
    answers = [("yes", "no"), ("yes, " * 9, "no"), ("perhaps", "a " * 20), ("yes", "never")]
    rows = learner.encode([pair_of(10**n, *sides) for n, sides in enumerate(answers)])
    each = [kl_by_hand(learner, r.prompt, side) for r in rows for side in r.completions]
    expected = sum(each) / len(each)
    assert expected > 0.1
    assert kl_from_base(learner, rows, seed=0) == pytest.approx(expected, rel=1e-3)
    monkeypatch.setattr(memory, "tokens_per_pass", lambda device: 1)
    assert kl_from_base(learner, rows, seed=0) == pytest.approx(expected, rel=1e-3), (
        "whatever the passes"
    )


def test_of_a_thumb_only_the_answer_that_was_given_counts(taught, pair_of, thumb_of):
    learner = taught("yes")
    rows = [
        *learner.encode([thumb_of(1, "yes", True), thumb_of(22, "no " * 9, False)]),
        *learner.encode([pair_of(333, "perhaps", "never")]),
    ]
    each = [kl_by_hand(learner, row.prompt, row.completions[0]) for row in rows]
    each.append(kl_by_hand(learner, rows[-1].prompt, rows[-1].completions[1]))
    expected = sum(each) / 4
    assert kl_from_base(learner, rows, seed=0) == pytest.approx(expected, rel=1e-3)


# Limits


@pytest.mark.parametrize(
    ("longest", "limit"), [(1, 64), (32, 64), (50, 100), (128, 256), (999, 256)]
)
def test_an_answer_may_be_twice_as_long_as_the_longest_logged(pair_of, longest, limit):
    short = encoded(pair_of, (2,), (3,))
    long = (7,) * longest
    for row in (
        encoded(pair_of, long, (3,)),
        encoded(pair_of, (2,), long),
    ):
        assert token_limit([short, row]) == limit


# Probes


NARROW = 128
TURN = ({"role": "user", "content": "Tell me."}, {"role": "assistant", "content": "tide " * 9})


@pytest.fixture(scope="module")
def narrow(narrow_base):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft corrects itself
        return Learner(load_base(str(narrow_base)), None, UpdateConfig(max_length=512))


def after(example, *turns):
    """The example with turns before its question."""
    prompt = replace(example.prompt, messages=(*turns, *example.prompt.messages))
    return replace(example, prompt=replace(prompt, id=f"after {len(turns)}"))


def test_max_length_is_bounded_by_the_positions_and_the_report_says_so(
    narrow, fresh_learner, pair_of
):
    assert narrow.max_length == NARROW
    assert narrow.notes() == ["max_length is 128 instead of 512: the model has 128 positions"]
    fitting = fresh_learner(max_length=400)
    assert (fitting.max_length, fitting.notes()) == (400, [])
    long = pair_of(1, "tide " * NARROW)
    (row,) = narrow.encode([pair_of(2, "yes"), long])
    assert narrow.objections[long.example_id].reason == "too_long"
    (row,) = narrow.encode([after(pair_of(3, "yes"), *TURN * 9)])
    assert max(map(len, row.completions)) + len(row.prompt) <= NARROW
    assert narrow.shortened["prompt_shortened"] == 1


def test_probes_leave_room_for_an_answer(narrow, pair_of):
    """A prompt that fits with its own answers can leave no room for an answer at the limit."""
    question = {"role": "user", "content": "tide " * 60}
    alone = replace(pair_of(1, "yes").prompt, id="alone", messages=(question,))
    single = replace(pair_of(3, "yes"), prompt=alone)
    rows = narrow.encode([pair_of(1, "yes"), after(pair_of(2, "yes"), *TURN * 2), single])
    (without_a_turn,) = narrow.encode([after(pair_of(2, "yes"), *TURN)])
    lengths = [len(row.prompt) for row in rows]
    assert max(lengths[0], len(without_a_turn.prompt)) <= 64 < min(lengths[1:])
    probes = choose_probes(narrow, rows, limit=64, seed=0)
    asked = [rows[0].prompt, without_a_turn.prompt, rows[2].prompt]
    assert sorted(probes.prompts_of(narrow, "live")) == sorted(asked)
    assert probes.notes == (
        "2 of 3 prompts leave no room for an answer of 64 tokens in the model's 128 positions: 1 "
        "were asked without their oldest turns, and the answers to 1 are cut where the positions "
        "end",
    )
    prompts = probes.prompts_of(narrow, "candidate")
    (found,) = generations(narrow, "candidate", [Writing(prompts, 64)])
    assert found.mean_length == (64 + 64 + NARROW - lengths[2]) / 3, "this model never ends"
    assert found.endless == 2, "where the positions end is not where the answer would"
    assert choose_probes(narrow, rows[:1], limit=64, seed=0).asked == [rows[0]]
    assert choose_probes(narrow, rows[:1], limit=64, seed=0).notes == ()


def test_a_check_that_asks_for_more_than_the_positions_fails_with_the_cure(narrow):
    def check(ask):
        return bool(ask([{"role": "user", "content": "tide " * NARROW}]))

    (result,) = run_checks({"long": check}, lambda messages: answer(narrow, messages))
    assert not result.passed
    assert "tokens, the model takes 128; shorten it" in result.message


# Answers


def generate(learner, policy, prompts, *, limit):
    asked = [encode_prompt(prompt, learner.base.template) for prompt in prompts]
    (found,) = generations(learner, policy, [Writing(asked, limit)])
    return found


def test_a_candidate_answers_as_it_was_taught(taught, prompts):
    learner = taught("yes")
    assert [answer(learner, prompt.messages) for prompt in prompts] == ["yes"] * 3
    found = generate(learner, "candidate", prompts, limit=64)
    assert found.mean_length == len(tokens(learner, "yes")) + 1, "the end of turn is a token too"
    assert (found.empty, found.endless, found.tool_parse, found.finite) == (0, 0, None, True)


def test_the_base_answers_beside_it_as_plain_transformers_does(taught, prompts):
    learner, limit = taught("yes"), 40
    found = generate(learner, "base", prompts, limit=limit)
    lengths, texts = [], []
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(prompt, learner.base.template)])
        with torch.no_grad(), learner.policy("base") as model:
            out = model.generate(input_ids=ids, max_new_tokens=limit, do_sample=False)
        lengths.append(out.shape[1] - ids.shape[1])
        texts.append(tuple(out[0, ids.shape[1] :].tolist()))
    assert found.mean_length == sum(lengths) / 3
    assert found.endless == sum(length == limit for length in lengths) > 0
    assert found.distinct_2 == distinct_n(texts, 2)


def test_without_a_live_adapter_live_answers_as_the_base(taught, prompts):
    learner = taught("yes")
    live = generate(learner, "live", prompts, limit=16)
    assert live == generate(learner, "base", prompts, limit=16)
    assert live != generate(learner, "candidate", prompts, limit=16)


def test_answers_of_no_text_are_counted(taught, prompts):
    found = generate(taught(""), "candidate", prompts, limit=64)
    assert (found.empty, found.endless, found.mean_length) == (3, 0, 1.0)
    assert found.harmed == 3


def test_an_answer_with_two_faults_is_harmed_once(taught, prompts):
    found = generate(taught("no " * 40), "candidate", prompts, limit=30)
    assert (found.endless, found.repeated, found.harmed) == (3, 3, 3)


def test_an_answer_that_just_ends_at_the_limit_is_not_endless(taught, prompts):
    learner = taught("yes")
    whole = len(tokens(learner, "yes")) + 1
    assert generate(learner, "candidate", prompts, limit=whole).endless == 0
    assert generate(learner, "candidate", prompts, limit=whole - 1).endless == 3


@pytest.mark.parametrize(("text", "rate"), [(CALL, 1.0), (BROKEN, 0.0)])
def test_tool_calls_are_parsed(taught, prompts, text, rate):
    learner = taught(text, epochs=12)
    assert answer(learner, prompts[0].messages) == text
    assert generate(learner, "candidate", prompts, limit=64).tool_parse == rate


def test_numbers_that_are_not_finite_are_seen(fresh_learner, prompts):
    learner = fresh_learner()
    assert generate(learner, "candidate", prompts, limit=4).finite
    poison(learner)
    assert not generate(learner, "candidate", prompts, limit=4).finite
    assert generate(learner, "base", prompts, limit=4).finite
