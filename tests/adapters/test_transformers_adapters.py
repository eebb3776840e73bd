"""LoRA matrices in the layers, compared with peft, alone and side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from served import REVISIONS, Served, get

from agentpref.config import Precision
from agentpref.errors import GenerationFailed, SwapFailed
from agentpref.home import Home
from agentpref.models.adapter_files import read_adapter
from agentpref.models.base import load_base
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter
from agentpref_adapters._transformers_adapters import Adapter, Layers, Share, shares_of
from agentpref_adapters.transformers import TransformersBackend

TOKENS = torch.arange(3, 19).reshape(4, 4)
ADAPTERS = [Adapter(str(number), {}) for number in range(3)]


@given(st.lists(st.sampled_from([None, *ADAPTERS]), min_size=1, max_size=12))
def test_rows_are_ordered_so_that_each_adapter_has_one_run(rows: list[Adapter | None]) -> None:
    order, shares = shares_of(rows)
    assert sorted(order) == list(range(len(rows)))
    sorted_rows = [rows[row] for row in order]
    answered: list[Adapter | None] = [None] * len(rows)
    for adapter, begin, end in shares:
        answered[begin:end] = [adapter] * (end - begin)
    assert answered == sorted_rows
    assert len(shares) == len({row for row in rows if row is not None})
    assert shares_of(sorted_rows)[0] == list(range(len(rows))), "sorted rows stay where they are"


def logits(model, layers: Layers, shares: list[Share], tokens=TOKENS):
    with torch.inference_mode(), layers.answering(shares, *tokens.shape):
        return model(input_ids=tokens).logits.float()


def of_peft(base: str, folder: Path, precision: Precision = "float32"):
    peft = PeftModel.from_pretrained(load_base(base, precision=precision).model, str(folder))
    with torch.inference_mode():
        return peft(input_ids=TOKENS).logits.float()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_logits_are_those_of_peft(served: Served, precision: Precision) -> None:
    model = load_base(served.base, precision=precision).model
    layers = Layers(model)
    revision = get(served)
    adapter = layers.read(revision.revision_id, read_adapter(revision.path))
    ours = logits(model, layers, [Share(adapter, 0, 4)])
    assert torch.allclose(ours, of_peft(served.base, revision.path, precision), atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [5, 16])
def test_the_scale_is_that_of_peft(
    served: Served, tmp_path: Path, alpha: int, rslora: bool
) -> None:
    config = LoraConfig(
        r=8, lora_alpha=alpha, use_rslora=rslora, target_modules=["q_proj", "down_proj"]
    )
    peft = get_peft_model(load_base(served.base).model, config)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    peft.save_pretrained(tmp_path)
    model = load_base(served.base).model
    layers = Layers(model)
    ours = logits(model, layers, [Share(layers.read("one", read_adapter(tmp_path)), 0, 4)])
    assert torch.allclose(ours, of_peft(served.base, tmp_path), atol=1e-4)


def test_each_share_of_a_batch_gets_its_own(served: Served) -> None:
    model = load_base(served.base).model
    plain = model(input_ids=TOKENS).logits
    layers = Layers(model)
    adapters = [layers.read(str(n), read_adapter(get(served, n).path)) for n in range(REVISIONS)]
    mixed = logits(model, layers, [Share(adapters[0], 0, 1), Share(adapters[1], 2, 4)])
    for rows, adapter in ((slice(0, 1), adapters[0]), (slice(2, 4), adapters[1])):
        alone = logits(model, layers, [Share(adapter, 0, 4)])
        assert torch.allclose(mixed[rows], alone[rows], atol=1e-5)
    assert torch.allclose(mixed[1], plain[1], atol=1e-5), "in no share: the base"
    assert torch.equal(logits(model, layers, []), plain)
    layers.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_gets_its_tokens_in_one_list_is_adapted_row_by_row(served: Served) -> None:
    model = load_base(served.base).model
    layers = Layers(model)
    adapter = layers.read("one", read_adapter(get(served).path))
    layer = model.model.layers[0].mlp.up_proj
    inputs = torch.randn(6, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), layers.answering([Share(adapter, 2, 4)], 6, 5):
        by_row, in_one = layer(inputs), layer(inputs.flatten(0, 1))
        assert torch.allclose(by_row.flatten(0, 1), in_one, atol=1e-6)
        for some in (6, 7):  # as many as there are rows, and yet none of them is one
            with pytest.raises(GenerationFailed, match="cannot be told apart"):
                layer(inputs.flatten(0, 1)[:some])


def test_an_adapter_of_another_model_is_not_read(
    backend: TransformersBackend, tmp_path: Path
) -> None:
    registry = Registry(Home.create(tmp_path / "home"))
    for name, shapes in {
        "missing": {"model.layers.9.self_attn.q_proj": (64, 64)},
        "wide": {"model.layers.0.self_attn.q_proj": (64, 128)},
    }.items():
        folder = write_adapter(tmp_path / name, layers=shapes)
        made = registry.publish(folder, parent=None, model={}, training={})
        with pytest.raises(SwapFailed, match=f"{made.revision_id} could not be loaded .* train it"):
            backend.load(made)
    assert backend.list_loaded() == ()
