"""Modules are replaced where, and only where, the replacement gives what they gave."""

from __future__ import annotations

import pytest
import torch

from agentpref.learn import adapter
from agentpref.learn.fuse import fuse
from tests.core.learn.families import adapted_model

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def test_a_llama_is_fused_whole():
    model = adapted_model("llama")
    assert fuse(model) == 2 * 7 + 2 * 2 + 1 + 2 + 2  # layers, norms, gates, attentions


def test_a_norm_of_another_formula_is_left_alone():
    model = adapted_model("gemma")  # its norms multiply by one plus the weight
    fuse(model)
    norm = model.get_base_model().model.norm
    assert "forward" not in vars(norm)


def test_a_gate_with_another_activation_is_left_alone():
    model = adapted_model("gemma")  # gelu
    fuse(model)
    assert "forward" not in vars(model.get_base_model().model.layers[0].mlp)


@pytest.mark.parametrize("policy", ["base", "candidate"])
def test_every_policy_speaks_as_before(policy):
    model = adapted_model("qwen3")
    with adapter.policy(model, policy), torch.no_grad():
        before = model(IDS).logits
    fuse(model)
    with adapter.policy(model, policy), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)


def test_what_is_saved_is_not_touched():
    from peft import get_peft_model_state_dict

    model = adapted_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fuse(model)
    assert model.state_dict().keys() == before.keys()
    assert get_peft_model_state_dict(model, adapter_name="candidate")


def test_a_dora_adapter_keeps_its_own_forward():
    from peft import LoraConfig, get_peft_model

    from tests.core.learn.families import random_model

    config = LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(random_model("llama"), config, "candidate").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
        before = model(IDS).logits
        fuse(model)
        torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)
