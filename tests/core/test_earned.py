"""What logged answers say of a candidate before it serves: as `ope` says it of a revision after."""

from __future__ import annotations

from contextlib import closing

import pytest

import agentpref
from agentpref.config import UpdateConfig
from agentpref.earned import MOST, compared
from agentpref.home import Home
from agentpref.learn.learner import Learner
from agentpref.models.base import load_base
from agentpref.offpolicy import off_policy
from agentpref.prove.evidence import EarnedEvidence
from agentpref.prove.value import EARNED, earned
from agentpref.record.database import connect
from agentpref.serve.registry import Registry
from agentpref.serve.validate import check_revision
from tests.core.test_offpolicy import QUESTION, home, sampler, taught  # noqa: F401


def candidate(folder, random_base) -> Learner:
    """A learner whose candidate is what serves in a home, beside the base."""
    files = check_revision(Registry(folder).live())
    base = load_base(str(random_base), precision="float32")
    return Learner(base, None, UpdateConfig(precision="float32"), candidate=files)


def ask(folder, random_base) -> EarnedEvidence | None:
    with closing(connect(Home.open(folder), readonly=True)) as connection:
        return compared(connection, "default", candidate(folder, random_base), None)


def test_a_candidate_would_earn_what_its_revision_is_said_to(home, random_base, sampler):  # noqa: F811
    with agentpref.Log(home) as log:
        sampler.draw(log, MOST, temperature=6.0)
    found = ask(home, random_base)
    same = {one.revision: one for one in off_policy(home, model=str(random_base)).revisions}
    served, base = same[Registry(home).live().revision_id], same["base"]
    assert found.answers == MOST
    assert found.candidate == pytest.approx(served.value, abs=1e-4)
    assert found.live == pytest.approx(base.value, abs=1e-4)
    low, high = base.better  # of the base less what serves
    assert (found.low, found.high) == (
        pytest.approx(-high, abs=0.03),
        pytest.approx(-low, abs=0.03),
    )
    (check,) = earned(found)
    assert check.passed is (found.high >= 0)


def test_greedy_answers_and_none_say_nothing(home, random_base):  # noqa: F811
    assert ask(home, random_base) is None
    with agentpref.Log(home) as log:
        for number in range(60):
            run = log.record(
                QUESTION, "x", revision="base", token_ids=[5], params={"temperature": 0},
                thread_id=f"t{number}",
            )  # fmt: skip
            log.thumbs(run, up=bool(number % 2))
    assert ask(home, random_base) is None


def test_a_proven_loss_is_a_veto_and_a_likely_one_is_none():
    (veto,) = earned(EarnedEvidence(0.6, 0.4, -0.35, -0.05, 200))
    assert (veto.name, veto.passed) == (EARNED, False)
    assert "a proven loss" in veto.message
    (open_,) = earned(EarnedEvidence(0.6, 0.5, -0.25, 0.05, 200))
    assert open_.passed
    assert not [*earned(None)]
