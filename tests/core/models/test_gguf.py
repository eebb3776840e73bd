"""Unpacking GGUF: a tiny packed Llama becomes a folder that updates can train on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agentpref.errors import UnsupportedModel
from agentpref.models.base import load_base
from agentpref.models.gguf import unpack

gguf = pytest.importorskip("gguf")

WIDTH, HIDDEN, HEADS, LAYERS = 32, 64, 2, 2


def write_gguf(file: Path, *, template: bool = True) -> np.ndarray:
    """A Llama of a few thousand random weights with the bundled tokenizer, packed in 4 bits.

    Returns its embeddings before they were packed.
    """
    base = load_base("tiny")
    words = sorted(base.tokenizer.get_vocab().items(), key=lambda item: item[1])
    backend = base.tokenizer.backend_tokenizer.to_str()
    merges = [" ".join(pair) for pair in json.loads(backend)["model"]["merges"]]
    special = set(base.tokenizer.all_special_tokens) | {"<|im_start|>"}
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([3 if word in special else 1 for word, _ in words])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(base.tokenizer.eos_token_id)
    writer.add_bos_token_id(base.tokenizer.eos_token_id)
    if template:
        writer.add_chat_template(base.tokenizer.chat_template)
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> np.ndarray:
        weights = rng.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1 if len(shape) == 2 else None
        packed = weights if kind is None else gguf.quantize(weights, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        return weights

    embeddings = tensor("token_embd.weight", len(words), WIDTH)
    tensor("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{layer}.{part}.weight", WIDTH, WIDTH)
        tensor(f"blk.{layer}.ffn_gate.weight", HIDDEN, WIDTH)
        tensor(f"blk.{layer}.ffn_up.weight", HIDDEN, WIDTH)
        tensor(f"blk.{layer}.ffn_down.weight", WIDTH, HIDDEN)
        tensor(f"blk.{layer}.attn_norm.weight", WIDTH)
        tensor(f"blk.{layer}.ffn_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return embeddings


def test_a_packed_model_is_written_as_one_that_loads_and_has_its_weights(tmp_path, capfd) -> None:
    embeddings = write_gguf(tmp_path / "small.gguf")
    (tmp_path / "model").mkdir()
    unpack(tmp_path / "small.gguf", tmp_path / "model")
    assert capfd.readouterr().err == ""
    base = load_base(str(tmp_path / "model"), precision="stored")
    assert str(base.model.dtype) == "torch.bfloat16"
    found = base.model.get_input_embeddings().weight.float().numpy()
    assert np.abs(found - embeddings).mean() < 0.15  # what 4 bits round off
    assert base.template.turn_end == base.tokenizer.eos_token_id


def test_a_file_that_is_no_gguf_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    (tmp_path / "model").mkdir()
    with pytest.raises(UnsupportedModel, match=r"'broken\.gguf' cannot be loaded"):
        unpack(tmp_path / "broken.gguf", tmp_path / "model")


def test_a_model_without_a_chat_template_is_refused(tmp_path) -> None:
    write_gguf(tmp_path / "plain.gguf", template=False)
    (tmp_path / "model").mkdir()
    with pytest.raises(UnsupportedModel, match="no chat template"):
        unpack(tmp_path / "plain.gguf", tmp_path / "model")
