"""Three policies in one model: which is active, which is trained, and what is saved."""

from __future__ import annotations

import json

import pytest
import torch

from agentpref.config import LoraSettings
from agentpref.errors import InvalidAdapter
from agentpref.learn import adapter
from agentpref.models.adapter_files import read_adapter
from agentpref.models.base import load_base
from tests.core.learn.families import CONDITIONAL, MIXTURES, random_model


@pytest.fixture
def attach(random_base):
    def call(live=None, settings=None, seed=0):
        base = load_base(str(random_base))
        files = None if live is None else read_adapter(live)
        return base, adapter.attach(base, files, settings or LoraSettings(rank=8), seed=seed)

    return call


@pytest.fixture
def saved(attach, tmp_path):
    """Folder of an adapter that differs from the base."""
    base, model = attach(seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.02)
    adapter.save(model, base, tmp_path / "saved")
    return tmp_path / "saved"


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model, policy):
    with torch.no_grad(), adapter.policy(model, policy) as active:
        return active(torch.tensor([[5, 6, 7]])).logits


def test_only_the_candidate_is_trainable_whichever_policy_was_active(attach, saved):
    _, model = attach(live=saved)
    mine = {name for name, _ in model.named_parameters() if ".candidate." in name}
    assert trainable(model) == mine != set()
    for policy in ("base", "live", "candidate"):
        logits(model, policy)
        assert trainable(model) == mine


def test_each_policy_has_its_own_logits(attach, saved):
    _, model = attach(live=saved)
    base, live = logits(model, "base"), logits(model, "live")
    assert not torch.allclose(base, live)
    assert torch.equal(logits(model, "candidate"), live), "a candidate starts as live"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".candidate." in name:
                parameter.zero_()
    assert torch.equal(logits(model, "candidate"), base)
    assert torch.equal(logits(model, "live"), live)


def test_without_a_live_adapter_live_is_the_base(attach):
    _, model = attach()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.02)
    assert torch.equal(logits(model, "live"), logits(model, "base"))
    assert not torch.equal(logits(model, "candidate"), logits(model, "base"))


@pytest.mark.parametrize("inner", ["base", "live", "candidate"])
@pytest.mark.parametrize("outer", ["base", "live", "candidate"])
def test_a_policy_within_another_one_gives_way_to_it_again(attach, saved, outer, inner):
    _, model = attach(live=saved)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".candidate." in name:
                parameter.mul_(2.0)
    expected = logits(model, outer)
    with adapter.policy(model, outer) as active:
        logits(model, inner)
        with torch.no_grad():
            assert torch.equal(active(torch.tensor([[5, 6, 7]])).logits, expected)
    assert trainable(model)


@pytest.mark.parametrize("policy", ["base", "live"])
def test_the_candidate_is_active_again_after_an_error(attach, saved, policy):
    _, model = attach(live=saved)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".candidate." in name:
                parameter.mul_(2.0)
    before = logits(model, "candidate")
    with pytest.raises(ValueError, match="halt"), adapter.policy(model, policy):
        raise ValueError("halt")
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)
    assert trainable(model)


def test_rank_and_alpha_are_those_of_the_settings(attach):
    _, model = attach(settings=LoraSettings(rank=16, alpha=64))
    config = model.peft_config["candidate"]
    assert (config.r, config.lora_alpha) == (16, 64)
    layers = {name.split(".candidate.")[0].split(".")[-2] for name in trainable(model)}
    assert layers == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}, (
        "all linear layers, and not the head"
    )


def test_attaching_does_not_change_the_hosts_random_state(attach):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    attach(seed=9)
    assert torch.equal(torch.rand(1), expected)


def test_saved_files_are_the_same_in_every_process(saved):
    """Peft keeps the layers' names in a set, whose order changes with the hash seed."""
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert {file.name for file in saved.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_weights_are_saved_as_float32_whatever_their_type(attach, tmp_path):
    from safetensors.torch import load_file

    base, model = attach()
    model.to(torch.bfloat16)
    adapter.save(model, base, tmp_path / "half")
    weights = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert not any("candidate" in name or "base_layer" in name for name in weights)


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj"}
LINEAR_ATTENTION = {"in_proj_qkvz", "in_proj_ba", "out_proj"}


@pytest.mark.parametrize("family", MIXTURES)
def test_of_a_mixture_of_experts_the_experts_and_routers_are_left_alone(family):
    names = adapter.adaptable_layers(random_model(family))
    assert not any(".experts." in name for name in names)
    others = {"qwen2_moe": FEED_FORWARD, "qwen3_next": LINEAR_ATTENTION}.get(family, set())
    assert {name.rpartition(".")[2] for name in names} == ATTENTION | others


@pytest.mark.parametrize("family", CONDITIONAL)
def test_of_a_model_that_sees_only_the_language_model_is_adapted(family):
    model = random_model(family)
    names = adapter.adaptable_layers(model)
    config = model.config.get_text_config()
    assert len(names) == 7 * config.num_hidden_layers
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert {name.rpartition(".")[2] for name in names} == ATTENTION | FEED_FORWARD


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon", "gpt_neox"])
def test_of_other_models_the_layers_are_those_that_peft_calls_all_linear(family):
    from peft import LoraConfig, get_peft_model

    ours = adapter.adaptable_layers(random_model(family))
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(random_model(family), config)
    assert {f"base_model.model.{name}" for name in ours} == {
        name.removesuffix(".lora_A.default")
        for name, _ in theirs.named_modules()
        if name.endswith(".lora_A.default")
    }


def test_a_live_adapter_of_another_model_is_refused(attach, saved):
    from safetensors.torch import load_file, save_file

    file = saved / "adapter_model.safetensors"
    weights = {name.replace("model.layers", "layers"): w for name, w in load_file(file).items()}
    save_file(weights, file)
    with pytest.raises(InvalidAdapter, match=r"13 other layers that a LlamaForC.*roll back"):
        attach(live=saved)
