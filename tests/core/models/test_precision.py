"""What a base is held in: the machine's choice, or what was asked for, or words why not."""

from __future__ import annotations

import pytest
import torch

from agentpref.errors import MissingDependency, UnsupportedModel
from agentpref.models import base
from agentpref.models.base import load_base


def with_capabilities(monkeypatch, **found):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx2": True}, "float32"),
    ],
)
def test_auto_is_bfloat16_where_that_is_native(monkeypatch, found, chosen):
    with_capabilities(monkeypatch, **found)
    assert base.choose_precision("auto", gpu=False) == chosen


def test_auto_is_float32_where_torch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert base.choose_precision("auto", gpu=False) == "float32"


def test_what_was_asked_for_is_taken(monkeypatch):
    with_capabilities(monkeypatch)
    assert base.choose_precision("bfloat16", gpu=False) == "bfloat16"


def test_four_bits_need_a_gpu():
    with pytest.raises(UnsupportedModel, match="needs a GPU"):
        base.choose_precision("4bit", gpu=False)


def test_four_bits_need_bitsandbytes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(MissingDependency, match="pip install 'agentpref\\[quantized\\]'"):
        base.choose_precision("4bit", gpu=True)


def test_four_bits_are_asked_of_transformers(monkeypatch):
    options = base.precision_options("4bit")
    assert options["quantization_config"].load_in_4bit
    assert options["quantization_config"].bnb_4bit_quant_type == "nf4"


def test_a_base_is_held_in_what_was_asked_and_its_scores_stand_apart(random_base):
    wide, narrow = (load_base(str(random_base), precision=held) for held in ("float32", "bfloat16"))
    assert (wide.model.dtype, narrow.model.dtype) == (torch.float32, torch.bfloat16)
    assert wide.numbers != narrow.numbers
    assert wide.identity == narrow.identity


def test_serving_is_in_float32_on_a_cpu(random_base):
    assert load_base(str(random_base)).precision == "float32"


def test_scores_are_known_by_a_bases_bytes_and_not_its_name(random_base, tmp_path):
    import shutil

    moved = shutil.copytree(random_base, tmp_path / "elsewhere")
    assert load_base(str(moved)).numbers == load_base(str(random_base)).numbers
