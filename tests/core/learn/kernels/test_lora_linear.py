"""A linear layer with its adapter: equal to the sum of the two, in values and in gradients."""

from __future__ import annotations

import pytest
import torch

from agentpref.learn.kernels.lora import Layer, lora_linear, swiglu_linear


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
    torch.testing.assert_close(lora_linear(x, Layer(weight, bias, down, up, 0.7)), expected)


def test_gradients_are_those_of_the_function(parts):
    x, weight, bias, down, up = parts.values()
    assert torch.autograd.gradcheck(
        lambda x, down, up: lora_linear(x, Layer(weight, bias, down, up, 0.7)), (x, down, up)
    )


def test_a_bfloat16_layer_keeps_its_adapter_in_float32(parts):
    x, weight, bias, down, up = (tensor.detach().bfloat16() for tensor in parts.values())
    down, up = down.float().requires_grad_(), up.float().requires_grad_()
    y = lora_linear(x.requires_grad_(), Layer(weight, bias, down, up, 0.7))
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert down.grad.dtype == up.grad.dtype == torch.float32


@pytest.fixture
def gated():
    torch.manual_seed(1)
    return torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)


def test_behind_a_gate_it_is_the_layer_of_the_gated_values(parts, gated):
    layer = Layer(*list(parts.values())[1:], 0.7)
    gate, value = gated.chunk(2, -1)
    expected = lora_linear(torch.nn.functional.silu(gate) * value, layer)
    torch.testing.assert_close(swiglu_linear(gated, layer), expected)


def test_gradients_behind_a_gate_are_those_of_the_function(parts, gated):
    _, weight, bias, down, up = parts.values()
    assert torch.autograd.gradcheck(
        lambda x, down, up: swiglu_linear(x, Layer(weight, bias, down, up, 0.7)), (gated, down, up)
    )


def test_what_a_gated_layer_reads_is_not_kept(parts, gated):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        swiglu_linear(gated, Layer(*list(parts.values())[1:], 0.7))
    of_each_token = [tensor.shape[-1] for tensor in kept if tensor.shape[:-1] == (2, 5)]
    assert of_each_token == [gated.shape[-1]]
