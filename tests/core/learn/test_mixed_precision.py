"""Models in bfloat16: float32 between products, and float32 to judge by, leave the model alone."""

from __future__ import annotations

import pytest
import torch

from agentpref.learn import logps
from agentpref.learn.precision import exact, mixed
from tests.core.learn.families import FAMILIES, ROWS, held_in

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def scores(model):
    with torch.no_grad():
        return torch.tensor(logps.score(model, ROWS, route=logps.UNMIXED, pad=0))


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_gives_what_the_model_gives_in_float32(family):
    model = held_in(family, torch.bfloat16)
    dtypes = [parameter.dtype for parameter in model.parameters()]
    with exact(model):
        assert model.dtype == torch.float32
        found = scores(model)
    assert [parameter.dtype for parameter in model.parameters()] == dtypes
    torch.testing.assert_close(found, scores(model.float()), atol=1e-5, rtol=1e-5)


def test_exact_takes_no_gradient():
    model = held_in("llama", torch.bfloat16)
    with exact(model):
        assert not model(input_ids=torch.tensor([[5, 6]])).logits.requires_grad


def test_mixed_rounds_less_than_bfloat16_throughout():
    model = held_in("llama", torch.bfloat16)
    with exact(model):
        true = scores(model)
    own = scores(model)
    with mixed(model):
        found = scores(model)
    assert (found - true).square().mean() < (own - true).square().mean()
    assert torch.equal(scores(model), own), "afterwards the model is as it was"


@pytest.mark.parametrize("context", [mixed, exact])
def test_a_model_in_float32_is_left_as_it_is(context):
    model = held_in("llama", torch.float32)
    expected = scores(model)
    with context(model):
        assert not torch.is_autocast_enabled("cpu")
        assert torch.equal(scores(model), expected)
