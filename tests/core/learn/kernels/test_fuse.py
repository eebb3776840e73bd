"""Modules are replaced if, and only if, the replacement gives the same; RMS norm is one."""

from __future__ import annotations

import pytest
import torch

from agentpref.learn import adapter, logps
from agentpref.learn.kernels.fuse import fuse, rms_norm
from tests.core.learn.families import ROWS, adapted_model, random_model

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def test_every_module_of_a_llama_is_fused():
    model = adapted_model("llama")
    parts = {"layers": 2 * 7, "norms": 2 * 2 + 1, "gates": 2, "attentions": 2, "last layer": 1}
    assert fuse(model) == sum(parts.values())


def test_a_norm_of_another_formula_is_left_alone():
    model = adapted_model("gemma")  # its norms multiply by one plus the weight
    fuse(model)
    norm = model.get_base_model().model.norm
    assert "forward" not in vars(norm)


def test_a_norm_without_weights_is_left_alone():
    class BareRMSNorm(torch.nn.Module):
        def forward(self, x):
            return x

    model = adapted_model("llama")
    model.get_base_model().model.norm = BareRMSNorm()
    fuse(model)
    assert "forward" not in vars(model.get_base_model().model.norm)


def test_a_gate_with_another_activation_is_left_alone():
    model = adapted_model("gemma")  # gelu
    fuse(model)
    assert "forward" not in vars(model.get_base_model().model.layers[0].mlp)


def attention(model):
    return model.get_base_model().model.layers[0].self_attn


def last_layer(model):
    return model.get_base_model().model.layers[-1]


def test_an_attention_that_norms_its_heads_is_fused():
    model = adapted_model("qwen3")
    fuse(model)
    assert "forward" in vars(attention(model))


def test_an_attention_that_norms_all_heads_at_once_is_left_alone():
    model = adapted_model("olmo2")
    fuse(model)
    assert "forward" not in vars(attention(model))


def test_an_attention_with_a_window_is_left_alone():
    model = adapted_model("mistral, wide window")
    fuse(model)
    assert "forward" not in vars(attention(model))


def test_an_attention_with_other_rotary_positions_is_left_alone(monkeypatch):
    from transformers.models.llama import modeling_llama

    right = modeling_llama.apply_rotary_pos_emb
    wrong = lambda q, k, cos, sin: right(q, k, cos, -sin)  # noqa: E731
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", wrong)
    model = adapted_model("llama")
    fuse(model)
    assert "forward" not in vars(attention(model))


def test_an_attention_without_rotary_positions_is_left_alone_even_if_its_scores_hardly_differ(
    monkeypatch,
):
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    model = adapted_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-3)
    model.get_base_model().to(torch.bfloat16)
    fuse(model)
    assert "forward" not in vars(attention(model))


def test_a_last_layer_with_scaled_residuals_is_left_alone():
    model = adapted_model("granite")
    last_layer(model).residual_multiplier = 0.5
    fuse(model)
    assert "forward" not in vars(last_layer(model))
    assert "forward" in vars(attention(model))


def test_the_last_layer_skips_the_prompt_of_shared_rows():
    model = adapted_model("llama")
    fuse(model)
    route = logps.choose_route(model, ROWS, pad=0, longest=40).route
    batch, seen = route.layout(ROWS, 0), []
    hook = last_layer(model).mlp.register_forward_hook(lambda *parts: seen.append(parts[2].shape))
    route.states(model, batch)
    hook.remove()
    assert route.name == "shared"
    assert [shape[1] for shape in seen] == [batch.ids.shape[1] - batch.mask.shape[-1]]


def test_weights_are_held_once():
    model = adapted_model("llama")
    fuse(model)
    layer = model.get_base_model().model.layers[0]
    projections = [getattr(layer.self_attn, f"{name}_proj").base_layer.weight for name in "qkv"]
    gated = [layer.mlp.gate_proj.base_layer.weight, layer.mlp.up_proj.base_layer.weight]
    for together in (projections, gated):
        assert len({weight.untyped_storage().data_ptr() for weight in together}) == 1


def test_the_output_of_a_gate_is_not_kept_for_the_backward_pass():
    model = adapted_model("llama")
    fuse(model)
    kept = []
    with (
        adapter.policy(model, "candidate"),
        torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor),
    ):
        model(IDS)
    of_each_token = {tensor.shape[-1] for tensor in kept if tensor.shape[:-1] == IDS.shape}
    wide = model.config.intermediate_size
    assert 2 * wide in of_each_token
    assert wide not in of_each_token


@pytest.mark.parametrize("policy", ["base", "candidate"])
def test_every_policy_gives_the_same_logits_as_before(policy):
    model = adapted_model("qwen3")
    with adapter.policy(model, policy), torch.no_grad():
        before = model(IDS).logits
    fuse(model)
    with adapter.policy(model, policy), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)


def test_the_state_dict_keeps_its_names():
    from peft import get_peft_model_state_dict

    model = adapted_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fuse(model)
    assert model.state_dict().keys() == before.keys()
    assert get_peft_model_state_dict(model, adapter_name="candidate")


def test_a_dora_adapter_keeps_its_own_forward():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(random_model("llama"), config, "candidate").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
        before = model(IDS).logits
        fuse(model)
        torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)


def test_a_trained_adapter_in_bfloat16_is_fused_like_a_fresh_one(random_base):
    """Rounding differences in sums that cancel must not keep a layer from being fused."""
    from agentpref.config import LoraSettings
    from agentpref.models.base import load_base

    fused = []
    for trained in (False, True):
        base = load_base(str(random_base), precision="bfloat16")
        model = adapter.attach(base, None, LoraSettings(), seed=0)
        if trained:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.05)
        fused.append(fuse(model))
    assert fused[0] == fused[1] > 2 * 7


def defined_norm(x, weight, eps):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def check(mine, defined, *inputs):
    weights = torch.randn_like(defined)
    torch.testing.assert_close(mine, defined)
    for a, b in zip(
        torch.autograd.grad((mine * weights).sum(), inputs),
        torch.autograd.grad((defined * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_rms_norm_equals_its_definition():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8)
    check(rms_norm(x, weight, 1e-5), defined_norm(x, weight, 1e-5), x)


def test_rms_norm_of_zeros_is_zero():
    x = torch.zeros(1, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4), 1e-6)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(1, 4))
    assert torch.isfinite(x.grad).all()


def test_rms_norm_keeps_the_dtype():
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert rms_norm(x, torch.ones(8, dtype=torch.bfloat16), 1e-6).dtype == torch.bfloat16
