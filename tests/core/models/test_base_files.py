"""A base model read from its files has the digests and layers of the loaded model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from agentpref.errors import ModelNotFound, UnsupportedModel
from agentpref.models.base import load_base
from agentpref.models.base_files import read_base
from tests.core.learn.families import FAMILIES

_SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_HEADS = {**_SHAPE, "head_dim": 16}
KNOWN = {
    "llama": tf.LlamaConfig(**_SHAPE),
    "llama, tied": tf.LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "qwen2": tf.Qwen2Config(**_SHAPE),
    "qwen3": tf.Qwen3Config(**_HEADS),
    "mistral": tf.MistralConfig(**_SHAPE),
    "gemma": tf.GemmaConfig(**_HEADS),
    "gemma2": tf.Gemma2Config(**_HEADS),
    "gemma3": tf.Gemma3TextConfig(**_HEADS),
    "phi": tf.PhiConfig(**_SHAPE),
    "phi3": tf.Phi3Config(**_SHAPE, pad_token_id=0),
    "olmo2": tf.Olmo2Config(**_SHAPE),
    "granite": tf.GraniteConfig(**_SHAPE),
    "smollm3": tf.SmolLM3Config(**_SHAPE, pad_token_id=0),
    "gpt2": tf.GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "gpt_neox": tf.GPTNeoXConfig(**{**_SHAPE, "num_key_value_heads": None}),
    "falcon": tf.FalconConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "mixtral": tf.MixtralConfig(**_SHAPE, num_local_experts=2),
    "olmoe": tf.OlmoeConfig(**_SHAPE, num_experts=2),
    "qwen3_moe": tf.Qwen3MoeConfig(
        **_HEADS, num_experts=2, moe_intermediate_size=16, mlp_only_layers=[0]
    ),
    "gemma3, with images": FAMILIES["gemma3, with images"](),
}
UNKNOWN = {
    "qwen2_moe": tf.Qwen2MoeConfig(**_SHAPE, num_experts=2),
    "opt": tf.OPTConfig(
        vocab_size=50, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4
    ),
}


def save(config: tf.PreTrainedConfig, folder: Path, **how: object) -> nn.Module:
    kind = tf.AutoModelForCausalLM
    if isinstance(config, tf.Gemma3Config):
        kind = tf.AutoModelForImageTextToText
    model = kind.from_config(config)
    model.save_pretrained(folder, **how)
    return model


def linear_layers(model: tf.PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear layer of the language model, as the modules themselves say."""
    shapes = {}
    inside = set(model.get_decoder().modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module in inside:
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nf, module.nx)
    return shapes


@pytest.mark.parametrize("family", KNOWN)
def test_the_layers_equal_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    model = save(KNOWN[family], tmp_path)
    assert read_base(str(tmp_path)).layers == linear_layers(model)


def test_layers_are_read_from_several_files(tmp_path: Path) -> None:
    model = save(KNOWN["llama"], tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert read_base(str(tmp_path)).layers == linear_layers(model)


def test_other_weight_files_in_the_folder_are_not_read(tmp_path: Path) -> None:
    model = save(KNOWN["mistral"], tmp_path)
    save_file({"layers.0.wq.weight": torch.zeros(2, 2)}, tmp_path / "consolidated.safetensors")
    assert read_base(str(tmp_path)).layers == linear_layers(model)


def test_layers_are_read_from_gpt2_files_without_a_root(tmp_path: Path) -> None:
    model = save(KNOWN["gpt2"], tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    assert "h.0.attn.c_attn.weight" in bare
    bare["h.0.attn.bias"] = torch.zeros(1, 1, 64, 64)
    save_file(bare, file, metadata={"format": "pt"})
    assert read_base(str(tmp_path)).layers == linear_layers(model)
    assert linear_layers(tf.AutoModelForCausalLM.from_pretrained(tmp_path)) == linear_layers(model)


@pytest.mark.parametrize("family", UNKNOWN)
def test_an_unknown_family_has_no_layers(family: str, tmp_path: Path) -> None:
    save(UNKNOWN[family], tmp_path)
    assert read_base(str(tmp_path)).layers is None


def test_a_model_with_an_unexplained_matrix_has_no_layers(tmp_path: Path) -> None:
    save(KNOWN["llama"], tmp_path)
    file = tmp_path / "model.safetensors"
    more = load_file(file) | {"model.layers.0.extra.weight": torch.zeros(2, 2)}
    save_file(more, file, metadata={"format": "pt"})
    assert read_base(str(tmp_path)).layers is None


def test_a_quantized_model_has_no_layers(tmp_path: Path) -> None:
    save(KNOWN["llama"], tmp_path)
    file = tmp_path / "config.json"
    config = orjson.loads(file.read_bytes()) | {"quantization_config": {"quant_method": "gptq"}}
    file.write_bytes(orjson.dumps(config))
    assert read_base(str(tmp_path)).layers is None


@pytest.mark.parametrize("name", ["tiny", None])
def test_the_identity_equals_that_of_the_loaded_model(name: str | None, random_base: Path) -> None:
    name = name or str(random_base)
    loaded, read = load_base(name), read_base(name)
    assert read.identity == loaded.identity
    assert read.path == loaded.path
    assert read.layers == linear_layers(loaded.model)


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "safetensors", "numpy"]))
from agentpref.models.base_files import read_base
print(len(read_base("tiny").layers))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0


def test_a_name_without_a_model_raises_model_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        read_base(str(tmp_path / "nowhere"))


@pytest.fixture
def broken(tmp_path: Path, random_base: Path) -> Path:
    return Path(shutil.copytree(random_base, tmp_path / "base"))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, "config.json cannot be read"),
        ("config.json", b"[]", "is not a JSON object"),
        ("config.json", b"{", "config.json cannot be read"),
        ("model.safetensors", b"", "cannot be read as safetensors"),
        ("model.safetensors", b"\2\0\0\0\0\0\0\0[]", "cannot be read as safetensors"),
        ("model.safetensors", b'\x08\0\0\0\0\0\0\0{"a": 1}', "cannot be read as safetensors"),
        ("model.safetensors", b"\xff" * 16, "cannot be read as safetensors"),
    ],
)
def test_damaged_files_are_refused(broken: Path, file: str, content: bytes | None, words) -> None:
    (broken / file).unlink()
    if content is not None:
        (broken / file).write_bytes(content)
    with pytest.raises(UnsupportedModel, match=words):
        read_base(str(broken))


@pytest.mark.parametrize("part", ["../model.safetensors", "/etc/passwd", 3])
def test_an_index_that_names_files_elsewhere_is_refused(broken: Path, part: object) -> None:
    (broken / "model.safetensors").rename(broken / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.norm.weight": part}}
    (broken / "model.safetensors.index.json").write_bytes(orjson.dumps(index))
    with pytest.raises(UnsupportedModel, match="must name files in its own folder"):
        read_base(str(broken))


def test_weights_under_another_file_name_are_refused(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "weights.safetensors")
    with pytest.raises(UnsupportedModel, match="neither model"):
        read_base(str(broken))
