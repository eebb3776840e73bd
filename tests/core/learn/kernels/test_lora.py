"""A layer with its adapter equals the sum of both; a stack of layers equals its layers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from agentpref.learn.kernels.lora import Layer, Stack, lora_linear, swiglu_linear

NAMES = ("first", "second")


@pytest.fixture
def parts():
    torch.manual_seed(0)
    made = {"x": (2, 5, 6), "weight": (4, 6), "bias": (4,), "down": (3, 6), "up": (4, 3)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in made.items()}
    for name in ("x", "down", "up"):
        tensors[name].requires_grad_()
    return tensors


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_output_is_the_layers_plus_the_scaled_adapters(parts, with_bias):
    x, weight, bias, down, up = parts.values()
    bias = bias if with_bias else None
    expected = torch.nn.functional.linear(x, weight, bias) + 0.7 * (x @ down.T @ up.T)
    torch.testing.assert_close(lora_linear(x, Layer(weight, bias, down, up, 0.7)), expected)


def test_gradients_of_a_layer_with_an_adapter_are_true(parts):
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


def test_the_output_after_a_gate_is_the_layers_of_the_gated_values(parts, gated):
    layer = Layer(*list(parts.values())[1:], 0.7)
    gate, value = gated.chunk(2, -1)
    expected = lora_linear(torch.nn.functional.silu(gate) * value, layer)
    torch.testing.assert_close(swiglu_linear(gated, layer), expected)


def test_gradients_after_a_gate_are_true(parts, gated):
    _, weight, bias, down, up = parts.values()
    assert torch.autograd.gradcheck(
        lambda x, down, up: swiglu_linear(x, Layer(weight, bias, down, up, 0.7)), (gated, down, up)
    )


def test_the_input_of_a_gated_layer_is_not_kept(parts, gated):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        swiglu_linear(gated, Layer(*list(parts.values())[1:], 0.7))
    of_each_token = [tensor.shape[-1] for tensor in kept if tensor.shape[:-1] == (2, 5)]
    assert of_each_token == [gated.shape[-1]]


class Two(torch.nn.Module):
    """Two layers that read the same input, of different widths."""

    def __init__(self, bias):
        super().__init__()
        self.first = torch.nn.Linear(6, 5, bias=bias)
        self.second = torch.nn.Linear(6, 3, bias=bias)

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x)], -1)


def adapted(bias, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=list(NAMES), **options)
    model = get_peft_model(Two(bias).requires_grad_(False), config, "candidate").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
    return model


def layers(model):
    return [getattr(model.base_model.model, name) for name in NAMES]


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_of_a_stack_are_those_of_its_layers(bias):
    model = adapted(bias)
    x = torch.randn(2, 4, 6, requires_grad=True)
    leaves = [x, *(p for name, p in model.named_parameters() if "lora_" in name)]
    stack = Stack(layers(model))
    assert stack.serves()
    outs = [stack(x), model(x)]
    weights = torch.linspace(-1, 1, 8)
    gradients = [torch.autograd.grad((out * weights).sum(), leaves) for out in outs]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("bias", [False, True])
def test_a_stack_without_an_active_adapter_is_the_base(bias):
    model = adapted(bias)
    stack, x = Stack(layers(model)), torch.randn(4, 6)
    with model.disable_adapter():
        assert stack.serves()
        torch.testing.assert_close(stack(x), model(x))


def test_adopted_layers_use_the_stacks_memory():
    model = adapted(bias=True)
    x = torch.randn(4, 6)
    before = model(x)
    stack = Stack(layers(model))
    stack.adopt()
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
        for layer in layers(model):
            layer.base_layer.weight.zero_()
            layer.base_layer.bias.zero_()
        with model.disable_adapter():
            assert not stack(x).any()


def test_a_stack_does_not_serve_layers_with_different_adapters():
    model = adapted(bias=False)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    model.set_adapter("other")
    assert not Stack(layers(model)).serves()


def test_a_stack_does_not_serve_dora():
    assert not Stack(layers(adapted(bias=False, use_dora=True))).serves()


def test_a_stack_does_not_serve_a_merged_adapter():
    model = adapted(bias=False)
    model.merge_adapter()
    assert not Stack(layers(model)).serves()
