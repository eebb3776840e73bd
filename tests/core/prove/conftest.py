"""Learners that were taught one thing each, for the tests of what is measured of models."""

from __future__ import annotations

import pytest

from agentpref.config import KLSettings, LossSettings, UpdateConfig
from agentpref.learn.learner import Learner
from agentpref.models.base import load_base
from agentpref.types import Completion, Example, Prompt


def make_pair(number: int, chosen: str, rejected: str = "no, never", **changes) -> Example:
    prompt = Prompt(f"prompt{number}", ({"role": "user", "content": f"Is {number} a number?"},))
    details = {"origin": "comparison", **changes}
    return Example(
        f"pair{number}-{chosen}",
        "test",
        float(number),
        prompt,
        (completion(chosen, 1.0), completion(rejected, 0.0)),
        **details,
    )


def completion(text: str, label: float) -> Completion:
    return Completion({"role": "assistant", "content": text}, label)


@pytest.fixture(scope="session")
def pair_of():
    """The factory ``pair_of(number, chosen, rejected, **changes)``."""
    return make_pair


def make_thumb(number: int, answer: str, liked: bool, **changes) -> Example:
    """An answer to the question of the pair of the same number, and whether it was liked."""
    return Example(
        f"thumb{number}-{answer}",
        "test",
        float(number),
        make_pair(number, answer).prompt,
        (completion(answer, float(liked)),),
        "thumb",
        **changes,
    )


@pytest.fixture(scope="session")
def thumb_of():
    """The factory ``thumb_of(number, answer, liked, **changes)``."""
    return make_thumb


@pytest.fixture(scope="session")
def fresh_learner(random_base):
    """A factory of learners whose candidate is still the base."""

    def make(**changes):
        settings = {
            "batch_size": 8,
            "learning_rate": 2e-2,
            "loss": LossSettings(beta=1e-3, nll=1.0),  # above all, to imitate
            "kl": KLSettings(weight=0.0),
            **changes,
        }
        return Learner(
            load_base(str(random_base)),
            None,
            UpdateConfig(**settings),
            caches={},
            progress=lambda stage, done, total: None,
        )

    return make


@pytest.fixture(scope="session")
def taught(fresh_learner):
    """Teach a fresh learner one answer to everything: ``taught("yes")``; once per answer."""
    known: dict[str, Learner] = {}

    def make(answer: str, epochs: int = 4) -> Learner:
        if answer not in known:
            known[answer] = fresh_learner(epochs=epochs)
            rows = known[answer].encode([make_pair(n, answer) for n in range(24)])
            known[answer].fit(rows, new=len(rows))
        return known[answer]

    return make
