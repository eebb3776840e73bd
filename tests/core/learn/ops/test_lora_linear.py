"""A linear layer with its adapter: equal to the sum of the two, in values and in gradients."""

from __future__ import annotations

import pytest
import torch

from agentpref.learn.ops.lora import lora_linear


@pytest.fixture
def parts():
    torch.manual_seed(0)
    made = {"x": (2, 5, 6), "weight": (4, 6), "bias": (4,), "down": (3, 6), "up": (4, 3)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in made.items()}
    for name in ("x", "down", "up"):
        tensors[name].requires_grad_()
    return tensors


@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_layer_plus_the_scaled_adapter(parts, with_bias):
    x, weight, bias, down, up = parts.values()
    bias = bias if with_bias else None
    expected = torch.nn.functional.linear(x, weight, bias) + 0.7 * (x @ down.T @ up.T)
    torch.testing.assert_close(lora_linear(x, weight, bias, down, up, 0.7), expected)


def test_gradients_are_those_of_the_function(parts):
    x, weight, bias, down, up = parts.values()
    assert torch.autograd.gradcheck(
        lambda x, down, up: lora_linear(x, weight, bias, down, up, 0.7), (x, down, up)
    )


def test_a_bfloat16_layer_keeps_its_adapter_in_float32(parts):
    x, weight, bias, down, up = (tensor.detach().bfloat16() for tensor in parts.values())
    down, up = down.float().requires_grad_(), up.float().requires_grad_()
    y = lora_linear(x.requires_grad_(), weight, bias, down, up, 0.7)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert down.grad.dtype == up.grad.dtype == torch.float32
