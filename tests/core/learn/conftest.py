"""Examples and learners that the learning tests share."""

from __future__ import annotations

import pytest

from agentpref.config import UpdateConfig
from agentpref.learn.learner import Learner
from agentpref.models.adapter_files import read_adapter
from agentpref.models.base import load_base
from tests.core.learn.examples import make_pair


@pytest.fixture
def pairs():
    return [make_pair(n, f"yes, {n} it is", "no" * (1 + n % 3)) for n in range(12)]


@pytest.fixture
def make_learner(random_base):
    def make(live=None, base=random_base, **changes):
        return Learner(
            load_base(str(base)),
            None if live is None else read_adapter(live),
            UpdateConfig(**{"batch_size": 4, "learning_rate": 3e-3, **changes}),
            caches={},
            progress=lambda stage, done, total: None,
        )

    return make
