"""What is loaded is what was meant: everything else is refused with its cure, before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from agentpref.errors import UnsupportedModel
from agentpref.models import loading
from agentpref.models.base import base_digests, find_base, load_base
from tests.core.learn.families import CONDITIONAL, FAMILIES

_MARK = "import pathlib; pathlib.Path({!r}).write_text('ran')\n"


@pytest.fixture
def folder(random_base: Path, tmp_path: Path) -> Path:
    """A copy of the base that a test may spoil."""
    return Path(shutil.copytree(random_base, tmp_path / "base"))


def change(file: Path, **values: object) -> None:
    """Set keys of a JSON file; ``None`` removes one."""
    content = json.loads(file.read_text()) if file.exists() else {}
    content = {k: v for k, v in {**content, **values}.items() if v is not None}
    file.write_text(json.dumps(content))


def rename(folder: Path, renamed: Callable[[str], str]) -> None:
    """Give the weights of a folder other names."""
    file = folder / "model.safetensors"
    weights = {renamed(name): tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def save(model: tf.PreTrainedModel, folder: Path) -> Path:
    """Replace the model in a folder, and keep its tokenizer."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    model.save_pretrained(folder)
    return folder


def sized(family: str, **settings: int) -> tf.PreTrainedModel:
    """A model of a family with an embedding for each token of the folder's tokenizer."""
    config = FAMILIES[family]()
    for name, value in {"vocab_size": 400, **settings}.items():
        setattr(config.get_text_config(), name, value)
    kind = tf.AutoModelForImageTextToText if family in CONDITIONAL else tf.AutoModelForCausalLM
    return kind.from_config(config)


def refused(folder: Path, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words) as caught:
        load_base(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


# Code


@pytest.mark.parametrize("kind", ["config", "model", "tokenizer"])
def test_a_models_own_code_is_not_run_though_the_user_would_type_yes(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    mark = folder / "ran"
    (folder / "own.py").write_text(_MARK.format(str(mark)))
    if kind == "tokenizer":
        own = {"AutoTokenizer": [None, "own.T"]}
        change(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map=own)
        change(folder / "config.json", model_type="own")
    else:
        named = {"config": "AutoConfig", "model": "AutoModelForCausalLM"}[kind]
        change(folder / "config.json", auto_map={named: "own.C"})
        change(folder / "config.json", model_type="own" if kind == "config" else "vit")
    refused(folder, r"names code of its own \(auto_map\), which is never run: use a model")
    assert asked == []
    assert not mark.exists()


def test_code_beside_a_model_that_transformers_knows_is_ignored(folder: Path) -> None:
    mark = folder / "ran"
    (folder / "own.py").write_text(_MARK.format(str(mark)))
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.C"})
    assert type(load_base(str(folder)).model) is tf.LlamaForCausalLM
    assert not mark.exists()


def test_an_attention_that_would_be_fetched_from_others_is_refused(folder: Path) -> None:
    change(folder / "config.json", attn_implementation="someone/attention")
    refused(folder, "'someone/attention'.*remove attn_implementation")


# Weights


def test_weights_under_other_names_are_refused(folder: Path) -> None:
    rename(folder, lambda name: f"_orig_mod.{name}")
    refused(folder, r"lacks lm_head|lacks model.*and \d+ more; it has besides _orig_mod\.model")


def test_a_model_without_its_head_is_refused(folder: Path) -> None:
    change(folder / "config.json", tie_word_embeddings=False)
    refused(folder, r"not those of a LlamaForCausalLM: the folder lacks lm_head\.weight; save")


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    change(folder / "config.json", intermediate_size=96)
    refused(folder, r"in another shape model\.layers\.0\.mlp\.down_proj\.weight.*and 3 more; save")


def test_weights_that_the_model_does_not_have_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    more = {f"value_head.{n}.weight": torch.zeros(2, 2) for n in range(5)}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    refused(folder, r"has besides value_head\.0.*and 2 more; save the whole model again")


def test_buffers_that_old_checkpoints_hold_are_ignored(folder: Path) -> None:
    file = folder / "model.safetensors"
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    save_file(load_file(file) | old, file, metadata={"format": "pt"})
    load_base(str(folder))


def test_gpt2_files_without_a_root_and_with_masks_load(folder: Path) -> None:
    save(sized("gpt2"), folder)
    rename(folder, lambda name: name.removeprefix("transformer."))
    file = folder / "model.safetensors"
    masks = {"h.0.attn.bias": torch.zeros(1, 1, 64, 64), "h.0.attn.masked_bias": torch.zeros(())}
    save_file(load_file(file) | masks, file, metadata={"format": "pt"})
    assert type(load_base(str(folder)).model) is tf.GPT2LMHeadModel


@pytest.mark.parametrize("with_model", [True, False])
def test_an_adapter_is_no_base(with_model: bool, folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    if with_model:
        shutil.copy(folder / "adapter_model.safetensors", folder / "model.safetensors")
    refused(folder, r"adapter_config\.json.*merge it first: peft\..*merge_and_unload")
    with pytest.raises(UnsupportedModel, match="merge it first"):
        find_base(str(folder))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gptq", {"bits": 4}),
        ("awq", {"bits": 4}),
        ("bitsandbytes", {"load_in_4bit": True}),
        ("compressed-tensors", {"config_groups": {}, "format": "pack-quantized"}),
        ("fp8", {}),
    ],
)
def test_a_quantized_model_is_refused(method: str, settings: dict, folder: Path) -> None:
    change(folder / "config.json", quantization_config={"quant_method": method, **settings})
    refused(folder, rf"is quantized \({method}\); use the unquantized model")


def test_gpt_oss_is_unpacked_as_it_loads(folder: Path) -> None:
    """As published: the experts' weights in MXFP4, in blocks of 32 with a scale each."""
    file = save(sized("gpt_oss", intermediate_size=32), folder) / "model.safetensors"
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(file).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, into, out = weight.shape
            blocks = torch.full((experts, out, into // 32, 16), 0x22, dtype=torch.uint8)
            weights[f"{name}_blocks"] = blocks  # 0x2 is 1.0 in E2M1
            weights[f"{name}_scales"] = torch.full(blocks.shape[:3], 126, dtype=torch.uint8)
        else:
            weights[name] = weight
    save_file(weights, file, metadata={"format": "pt"})
    change(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    layer = load_base(str(folder), precision="float32").model.model.layers[0].mlp.experts
    assert (layer.gate_up_proj == 0.5).all()
    assert layer.gate_up_proj.dtype == torch.float32


@pytest.mark.parametrize(
    "config",
    [
        tf.MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, state_size=4),
        tf.BloomConfig(vocab_size=400, hidden_size=16, n_layer=1, n_head=2),
    ],
    ids=["mamba", "bloom"],
)
def test_a_model_that_cannot_be_generated_with_is_refused(config, folder: Path) -> None:
    save(tf.AutoModelForCausalLM.from_config(config), folder)
    refused(folder, "takes no .*position_ids.*use a decoder-only transformer with attention")


# Tokenizers


def test_a_tokenizer_without_its_vocabulary_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    change(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    refused(folder, r"a tokenizer of \d special tokens and no vocabulary; add the files")


def test_a_vocabulary_without_its_merges_is_refused(folder: Path) -> None:
    split_tokenizer(folder)
    assert load_base(str(folder)).tokenizer("tide")["input_ids"]
    (folder / "merges.txt").unlink()
    refused(folder, "`vocab` and `merges`.*use a causal language model of transformers, with a tok")


def split_tokenizer(folder: Path) -> None:
    """Write a vocabulary and merges in the place of the tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    change(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")


def test_a_chat_template_that_cannot_be_parsed_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for message in %}")
    refused(folder, r"cannot be parsed \(line 1: .*correct chat_template\.jinja")


def test_chat_templates_without_a_default_are_refused(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    template = (folder / "chat_template.jinja").rename(
        folder / "additional_chat_templates" / "rag.jinja"
    )
    assert template.exists()
    refused(folder, r"templates named rag, but none named 'default'.*chat_template\.jinja")


def test_chat_templates_with_a_default_are_used(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    assert set(load_base(str(folder)).tokenizer.chat_template) == {"default", "rag"}


@pytest.mark.parametrize("use", ["pad", "template"])
def test_a_token_without_an_embedding_is_refused_where_it_is_used(use: str, folder: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<|more|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    load_base(str(folder))  # a token that is not used does no harm
    if use == "pad":
        tokenizer.pad_token = "<|more|>"
    else:
        tokenizer.chat_template += "<|more|>"
    tokenizer.save_pretrained(folder)
    refused(folder, rf"for {rows} tokens.*'<\|more\|>' \({rows}\); call resize_token_embeddings")


# Digests


def test_the_digest_of_a_model_is_the_one_that_revisions_of_0_1_0_name() -> None:
    data = Path(__file__).parents[2] / "data"
    manifest = data / "home-0.1.0/adapters/rev-000001-a1850639a4fd/manifest.json"
    base = json.loads(manifest.read_text())["base"]
    assert base_digests(data / "tiny-0.1.0") == (base["digest"], base["template_digest"])


@pytest.mark.parametrize(
    "name", ["vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model"]
)
def test_files_that_are_not_read_do_not_change_the_digest(name: str, folder: Path) -> None:
    change(folder / "tokenizer_config.json", added_tokens_decoder={})
    before = base_digests(folder)
    (folder / name).write_text("{}")
    assert base_digests(folder) == before


@pytest.mark.parametrize(
    "name", ["vocab.json", "merges.txt", "added_tokens.json", "additional_chat_templates/rag.jinja"]
)
def test_files_that_change_the_tokenizer_change_its_digest_alone(name: str, folder: Path) -> None:
    split_tokenizer(folder)
    weights, tokenizer = base_digests(folder)
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text((file.read_text() if file.exists() else "") + "\n")
    assert base_digests(folder)[0] == weights
    assert base_digests(folder)[1] != tokenizer


# Models with more parts than a language model


@pytest.mark.parametrize("family", CONDITIONAL)
def test_a_model_that_sees_is_loaded_whole_and_knows_its_text_models_positions(
    family: str, folder: Path
) -> None:
    model = sized(family)
    base = load_base(str(save(model, folder)))
    assert type(base.model) is type(model)
    assert base.positions == model.config.get_text_config().max_position_embeddings == 64


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_base_knows_its_positions(family: str, folder: Path) -> None:
    assert load_base(str(save(sized(family), folder))).positions == 64


@pytest.mark.guarantee("serving")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_loaded_base_stays_as_it_is_when_its_file_is_overwritten_and_truncated(
    folder: Path, precision: str
) -> None:
    """bfloat16 is what the file holds: transformers leaves such weights mapped."""
    file = folder / "model.safetensors"
    weights = {k: tensor.to(getattr(torch, precision)) for k, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    model = load_base(str(folder), precision=precision).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.write(bytes(size))
        stream.truncate(1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_base_whose_file_changes_while_it_is_loaded_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, file = loading.load_model, folder / "model.safetensors"

    def load_and_edit(*arguments, **options):
        model = load(*arguments, **options)
        with file.open("r+b") as stream:
            stream.seek(-4, 2)
            stream.write(bytes(4))
        return model

    monkeypatch.setattr(loading, "load_model", load_and_edit)
    with pytest.raises(UnsupportedModel, match="changed while they were loaded"):
        load_base(str(folder))
