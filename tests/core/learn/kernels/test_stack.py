"""Layers in a stack give what they give alone, and hold their weights once."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from agentpref.learn.kernels.stack import Stack

NAMES = ("first", "second")


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
def test_values_and_gradients_are_those_of_the_layers(bias):
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
def test_without_an_adapter_it_is_the_base(bias):
    model = adapted(bias)
    stack, x = Stack(layers(model)), torch.randn(4, 6)
    with model.disable_adapter():
        assert stack.serves()
        torch.testing.assert_close(stack(x), model(x))


def test_adopted_layers_hold_the_stacks_own_memory():
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


def test_layers_that_speak_as_different_adapters_are_not_served():
    model = adapted(bias=False)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    model.set_adapter("other")
    assert not Stack(layers(model)).serves()


def test_an_adapter_of_another_formula_is_not_served():
    assert not Stack(layers(adapted(bias=False, use_dora=True))).serves()


def test_a_merged_adapter_is_not_served():
    model = adapted(bias=False)
    model.merge_adapter()
    assert not Stack(layers(model)).serves()
