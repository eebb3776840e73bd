"""Off-policy evaluation of real revisions of a small random model, on logs that they sampled."""

from __future__ import annotations

import shutil
from contextlib import closing

import numpy as np
import pytest
import torch

import agentpref
from agentpref.errors import ConfigError, EvaluationError, UnknownRevision
from agentpref.models.base import load_base
from agentpref.models.tokenizer import encode_prompt
from agentpref.offpolicy import off_policy
from agentpref.serve.registry import Registry
from agentpref.types import Prompt
from tests.core.test_pipeline import learn, teach

QUESTION = [{"role": "user", "content": "Is 5 a number?"}]


@pytest.fixture(scope="module")
def taught(tmp_path_factory, random_base):
    """A home with a live revision."""
    home = tmp_path_factory.mktemp("taught") / "home"
    teach(home, range(60))
    report = learn(home, random_base)
    assert report.verdict == "promoted", report.reasons
    return home


@pytest.fixture
def home(taught, tmp_path):
    return shutil.copytree(taught, tmp_path / "home")


class Sampler:
    """Draws first tokens of an answer from the base, and knows the chance of each."""

    def __init__(self, base_folder):
        base = load_base(str(base_folder), precision="float32")
        self.tokenizer = base.tokenizer
        ids = torch.tensor([encode_prompt(Prompt("", tuple(QUESTION)), base.template)])
        with torch.no_grad():
            self.logits = base.model(input_ids=ids).logits[0, -1].double()
        letters = [self.tokenizer.decode([n]) for n in range(len(self.logits))]
        self.usable = [n for n, text in enumerate(letters) if text.isascii() and text.isalpha()]

    def chances(self, temperature):
        """Of the usable tokens, given that one of them comes."""
        return torch.softmax(self.logits[self.usable] / temperature, 0).numpy()

    def draw(
        self, log, count, *, temperature=1.0, seed=0, revision="base", thread=None, key=None, **more
    ):
        source, chances = np.random.default_rng(seed), self.chances(temperature)
        for place in range(count):
            token = self.usable[source.choice(len(self.usable), p=chances)]
            text = self.tokenizer.decode([token])
            run = log.record(
                QUESTION, text, revision=revision, token_ids=[token], logprobs=[-1.0],
                params={"temperature": temperature, **more}, thread_id=thread or f"t{place}",
            )  # fmt: skip
            if key is None:
                log.thumbs(run, up=self.likes(token), user_id="u")
            else:
                log.feedback(run, key=key, score=1.0)
        log.flush()

    @staticmethod
    def likes(token):
        return token % 3 == 0


@pytest.fixture(scope="module")
def sampler(random_base):
    return Sampler(random_base)


def by_name(found):
    return {one.revision: one for one in found.revisions}


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_what_served_earned_what_it_earned(home, random_base, sampler, temperature):
    with agentpref.Log(home) as log:
        sampler.draw(log, 60, temperature=temperature)
    found = off_policy(home, ["base"], model=str(random_base))
    [base] = found.revisions
    assert found.answers == 60
    assert base.value == pytest.approx(found.earned, abs=1e-9)
    assert (base.effective, base.own) == (pytest.approx(60), 60)
    assert base.low <= base.value <= base.high
    assert base.refused == ()


def test_another_revision_would_have_earned_what_its_own_answers_do(home, random_base, sampler):
    with agentpref.Log(home) as log:
        sampler.draw(log, 400, temperature=4.0)
    live = Registry(home).live().revision_id
    found = by_name(off_policy(home, model=str(random_base)))
    one, chances = found[live], chances_under(home, random_base, sampler, temperature=4.0)
    truth = sum(
        float(p) for p, token in zip(chances, sampler.usable, strict=True) if sampler.likes(token)
    )
    assert one.refused == ()
    assert one.low <= truth <= one.high
    assert one.high - one.low < 0.2
    assert 20 < one.effective < 400
    low, high = found["base"].better
    assert low < found["base"].value - one.value < high


def test_a_revision_too_far_from_the_log_is_refused(home, random_base, sampler):
    with agentpref.Log(home) as log:
        sampler.draw(log, 400, temperature=2.0)
    one = by_name(off_policy(home, model=str(random_base)))[Registry(home).live().revision_id]
    assert (one.value, one.low, one.better) == (None, None, None)
    assert "too far from what served" in one.refused[0]


def chances_under(home, folder, sampler, temperature):
    """Of the usable tokens under the live revision, exactly."""
    from peft import PeftModel

    base = load_base(str(folder), precision="float32")
    model = PeftModel.from_pretrained(base.model, str(Registry(home).live().path))
    ids = torch.tensor([encode_prompt(Prompt("", tuple(QUESTION)), base.template)])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1].double()
    return torch.softmax(logits[sampler.usable] / temperature, 0).numpy()


def test_two_loggers_are_one_mixture(home, random_base, sampler):
    live = Registry(home).live().revision_id
    with agentpref.Log(home) as log:
        sampler.draw(log, 40, seed=1)
        sampler.draw(log, 40, seed=2, revision=live)
    found = by_name(off_policy(home, model=str(random_base)))
    assert {name: one.own for name, one in found.items()} == {"base": 40, live: 40}


def test_answers_that_cannot_be_weighed_are_counted_and_said(home, random_base, sampler):
    with agentpref.Log(home) as log:
        sampler.draw(log, 60, temperature=1.0)
        sampler.draw(log, 3, temperature=1.0, top_p=0.9)
        sampler.draw(log, 2, temperature=1.0, revision="rev-000099-aaaaaaaaaaaa")
        for number, more in enumerate(
            [
                {"revision": "base", "params": {"temperature": 0}},
                {"revision": "base", "params": {"temperature": 1}},
                {"params": {"temperature": 1}},
                {"revision": "base", "token_ids": [1], "logprobs": [-1.0]},
                {"revision": "base", "token_ids": [sampler.usable[0], sampler.usable[1]],
                 "logprobs": [-1.0, -1.0], "params": {"temperature": 1}},
            ]
        ):  # fmt: skip
            run = log.record(QUESTION, f"answer {number}", **more)
            log.thumbs(run, up=True)
    found = off_policy(home, ["base"], model=str(random_base))
    assert found.answers == 60
    assert found.left_out == {
        "truncated_sampling": 3, "unknown_revision": 2, "no_tokens": 2, "no_revision": 1,
        "unknown_temperature": 1, "tokens_disagree": 1,
    }  # fmt: skip


def test_a_greedy_log_says_nothing_of_any_revision(home, random_base, sampler):
    with agentpref.Log(home) as log:
        sampler.draw(log, 3, temperature=1.0)
    with closing(agentpref.Log(home)) as log:
        for number in range(30):
            run = log.record(QUESTION, f"n{number}", revision="base", token_ids=[5], logprobs=[0.0],
                             params={"temperature": 0})  # fmt: skip
            log.thumbs(run, up=True)
        log.flush()
    found = off_policy(home, model=str(random_base))
    for one in found.revisions:
        assert one.value is None
        assert "30 answers were written at temperature 0" in one.refused[0]


def test_answers_of_one_length_are_weighed_together(home, random_base, sampler):
    with agentpref.Log(home) as log:
        sampler.draw(log, 60, temperature=2.0)
    found = by_name(off_policy(home, model=str(random_base), by="length"))
    live = found[Registry(home).live().revision_id]
    assert live.effective == pytest.approx(60), "all have one token"


def test_conversations_count_once_and_the_newest_answers_come_first(home, random_base, sampler):
    with agentpref.Log(home) as log:
        sampler.draw(log, 60, temperature=1.0)
    assert off_policy(home, ["base"], model=str(random_base), limit=25).answers == 25


def test_one_conversation_says_nothing_however_many_answers_it_has(home, random_base, sampler):
    with agentpref.Log(home) as log:
        sampler.draw(log, 60, thread="one")
    [base] = off_policy(home, ["base"], model=str(random_base)).revisions
    assert "the 60 answers are of 1 conversations" in base.refused[0]


def test_where_all_earned_the_same_nothing_is_told(home, random_base, sampler):
    with agentpref.Log(home) as log:
        sampler.draw(log, 60, key="resolved")
    [base] = off_policy(home, ["base"], reward="resolved", model=str(random_base)).revisions
    assert base.refused == (
        "all answers earned the same, so nothing can be told from what they earned",
    )


def test_a_limit_and_a_time_are_said(home, random_base, sampler):
    with agentpref.Log(home) as log:
        sampler.draw(log, 60)
    found = off_policy(home, ["base"], model=str(random_base), limit=55)
    assert found.notes == ("the newest 55 answers that can be weighed; --limit reads more",)
    with pytest.raises(EvaluationError, match="no answer of 'default' since then has a score"):
        off_policy(home, model=str(random_base), since="2100-01-01")
    with pytest.raises(EvaluationError, match=r"there are scores under 'thumbs'"):
        off_policy(home, reward="stars", model=str(random_base))


def test_a_key_without_scores_and_one_with_two_scales_are_refused(home, random_base, sampler):
    with pytest.raises(EvaluationError, match="no answer of 'default' has a score under 'stars'"):
        off_policy(home, reward="stars", model=str(random_base))
    with pytest.raises(ConfigError, match="by is 'token', but must be answer or length"):
        off_policy(home, by="token", model=str(random_base))
    with pytest.raises(UnknownRevision):
        off_policy(home, ["rev-000099-aaaaaaaaaaaa"], model=str(random_base))


def test_the_base_alone_needs_its_name(tmp_path, sampler):
    home = tmp_path / "new"
    with agentpref.Log(home) as log:
        sampler.draw(log, 3)
    with pytest.raises(ConfigError, match="name it"):
        off_policy(home, ["base"])
