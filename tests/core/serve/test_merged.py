"""Merged exports: models that plain transformers loads, and that answer as the adapter does."""

from __future__ import annotations

import json
import math
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentpref.errors import (
    ConfigError,
    InvalidAdapter,
    ModelNotFound,
    NotKept,
    RevisionError,
    UnsupportedModel,
    WrongBase,
)
from agentpref.home import Home
from agentpref.models import merging
from agentpref.models.base import base_digests, find_base, identity
from agentpref.record.database import connect
from agentpref.record.updates import taint
from agentpref.serve import merged as module
from agentpref.serve.backend import Revision
from agentpref.serve.folders import MANIFEST_FILE, WEIGHTS_FILE
from agentpref.serve.merged import export_merged
from agentpref.serve.pruning import mark_pruned
from agentpref.serve.registry import Registry

QUESTIONS = ("When are you open?", "What is the capital of France?", "Please answer briefly.")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Home.create(tmp_path / "home"))


@pytest.fixture
def publish(registry: Registry, tmp_path: Path) -> Callable[..., Revision]:
    """Publish a random adapter of a base: ``publish("tiny", size=.05, r=8)``."""

    def call(name: str, size: float = 0.05, **settings: object) -> Revision:
        folder = find_base(name)
        model = AutoModelForCausalLM.from_pretrained(folder)
        options = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
        adapted = get_peft_model(model, LoraConfig(**options))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for key, weight in adapted.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(weight, std=size)
        adapted.save_pretrained(tmp_path / "adapter")
        about = identity(name, *base_digests(folder), {})
        return registry.publish(tmp_path / "adapter", parent=None, model=about, training={})

    return call


def answers(model: torch.nn.Module, tokenizer) -> list[list[int]]:
    found = []
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        given = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = model.generate(**given, max_new_tokens=24, do_sample=False)
        found.append(written[0, given["input_ids"].shape[1] :].tolist())
    return found


def logits(model: torch.nn.Module, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(QUESTIONS[0], return_tensors="pt")).logits.float()


def test_plain_transformers_writes_from_the_folder_what_the_adapter_writes(
    registry, publish, tmp_path, random_base
) -> None:
    revision = publish(str(random_base))
    done = export_merged(registry, revision.revision_id, tmp_path / "whole")
    assert (done.path, done.dtype) == (tmp_path / "whole", "float32")
    whole = AutoModelForCausalLM.from_pretrained(done.path)
    tokenizer = AutoTokenizer.from_pretrained(done.path)
    base = AutoModelForCausalLM.from_pretrained(random_base)
    before = answers(base, tokenizer)
    adapted = PeftModel.from_pretrained(base, revision.path)
    assert answers(whole, tokenizer) == answers(adapted, tokenizer) != before
    check_rounding(whole.double(), adapted.double(), tokenizer)


def check_rounding(whole: torch.nn.Module, adapted: PeftModel, tokenizer) -> None:
    """In float64, merged logits are off by what merging in float32 rounded, and by no more.

    A weight of W + BA is rounded after each product of B and A, and after the sum; a rounding is
    off by at most half an eps. To first order a logit moves by the sum of its weights' errors, each
    times its derivative. They are independent, so Hoeffding's inequality bounds the sum.
    """
    given = tokenizer(QUESTIONS[0], return_tensors="pt")
    one, other = whole(**given).logits, adapted(**given).logits
    gap = (one - other).abs()
    one.flatten()[gap.argmax()].backward()
    squares = 0.0
    for name, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (side["default"].weight.abs() for side in (layer.lora_A, layer.lora_B))
            weight = whole.get_submodule(name).weight
            most = weight.abs() + len(a) * (b @ a)
            squares += (weight.grad * most).square().sum().item()
    assert squares > 0.0
    half = torch.finfo(torch.float32).eps / 2
    by_chance = math.sqrt(2 * math.log(2 * gap.numel() / 1e-9))  # one logit of all, in 1e9 bases
    assert gap.max() <= by_chance * half * math.sqrt(squares)


def test_the_bundled_model_keeps_its_bfloat16_and_answers_alike_but_for_the_rounding(
    registry, publish, tmp_path
) -> None:
    revision = publish("tiny", size=0.01)
    done = export_merged(registry, revision.revision_id, tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(done.path)
    assert done.dtype == "bfloat16"
    assert whole.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(done.path)
    base = AutoModelForCausalLM.from_pretrained(find_base("tiny"), dtype=torch.float32)
    before = logits(base, tokenizer)
    adapted = PeftModel.from_pretrained(base, revision.path)
    whole = whole.float()  # rounded weights, exact arithmetic: the same on every processor
    assert answers(whole, tokenizer) == answers(adapted, tokenizer)
    one, other = logits(whole, tokenizer), logits(adapted, tokenizer)
    assert (one - other).abs().max() <= torch.finfo(torch.bfloat16).eps * other.abs().max()
    assert (one - other).abs().max() < (before - other).abs().max() / 4


def test_what_is_not_weights_is_the_bases_byte_for_byte(
    registry, publish, tmp_path, random_base
) -> None:
    base = shutil.copytree(random_base, tmp_path / "base")
    (base / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false}')
    (base / "LICENSE").write_text("Apache-2.0")
    (base / "notes.txt").write_text("not of the model")
    revision = publish(str(base))
    done = export_merged(registry, revision.revision_id, tmp_path / "whole")
    assert base_digests(done.path)[1] == base_digests(base)[1]
    same = {file.name for file in base.iterdir()} - {"model.safetensors", "notes.txt"}
    assert all((done.path / name).read_bytes() == (base / name).read_bytes() for name in same)
    assert {file.name for file in done.path.iterdir()} == same | {
        "model.safetensors", MANIFEST_FILE
    }  # fmt: skip
    written, read = (load_file(f / "model.safetensors") for f in (done.path, base))
    assert {k: (v.dtype, v.shape) for k, v in written.items()} == {
        k: (v.dtype, v.shape) for k, v in read.items()
    }
    assert done.path.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in done.path.iterdir()} == {0o644}


def test_layers_that_hold_their_weights_transposed_are_merged_too(
    registry, publish, tmp_path, narrow_base
) -> None:
    revision = publish(str(narrow_base), fan_in_fan_out=True, use_rslora=True, lora_alpha=3)
    done = export_merged(registry, revision.revision_id, tmp_path / "whole")
    tokenizer = AutoTokenizer.from_pretrained(done.path)
    whole = AutoModelForCausalLM.from_pretrained(done.path)
    base = AutoModelForCausalLM.from_pretrained(narrow_base)
    adapted = PeftModel.from_pretrained(base, revision.path)
    assert torch.allclose(logits(whole, tokenizer), logits(adapted, tokenizer), atol=1e-4)


def test_a_weight_is_rounded_once(tmp_path, registry, publish) -> None:
    revision = publish("tiny", size=0.001)
    done = export_merged(registry, revision.revision_id, tmp_path / "whole")
    name = "model.layers.0.self_attn.q_proj"
    before, after = (
        load_file(folder / "model.safetensors")[f"{name}.weight"]
        for folder in (find_base("tiny"), done.path)
    )
    adapter = load_file(revision.path / WEIGHTS_FILE)
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    assert after.equal((before.float() + b @ a).bfloat16()), "alpha and r are both 8"


def test_progress_tells_of_each_layer(registry, publish, tmp_path, random_base) -> None:
    told: list[tuple[str, int, int]] = []
    revision = publish(str(random_base), target_modules=["q_proj"])
    export_merged(
        registry, revision.revision_id, tmp_path / "whole", progress=lambda *call: told.append(call)
    )
    assert told == [
        ("reading the base", 0, 1),
        ("reading the base", 1, 1),
        ("merging (layers)", 1, 2),
        ("merging (layers)", 2, 2),
        ("writing the model", 0, 1),
        ("writing the model", 1, 1),
    ]


def _taint(registry: Registry, revision: Revision) -> None:
    with closing(connect(registry.home)) as connection:
        taint(connection, [revision.revision_id], 5.0)


def _prune(registry: Registry, revision: Revision) -> None:
    with closing(connect(registry.home)) as connection:
        mark_pruned(connection, revision.revision_id, 5.0)


def _quarantine(registry: Registry, revision: Revision) -> None:
    registry.quarantine(revision.revision_id, "it answers in Latin")


def _edit(registry: Registry, revision: Revision) -> None:
    file = revision.path / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"!")


@pytest.mark.guarantee("serving", "tainted, pruned, in quarantine, edited")
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_taint, "is tainted"),
        (_prune, "was pruned"),
        (_quarantine, "is in quarantine: it answers in Latin"),
        (_edit, WEIGHTS_FILE),
    ],
)
def test_what_must_not_serve_is_not_merged_and_the_base_is_not_read(
    registry, publish, tmp_path, random_base, monkeypatch, spoil, words: str
) -> None:
    revision = publish(str(random_base))
    spoil(registry, revision)
    monkeypatch.setattr(merging, "load_stored", None)
    with pytest.raises(RevisionError, match=words):
        export_merged(registry, revision.revision_id, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_a_revision_that_is_tainted_while_it_is_merged_leaves_nothing(
    registry, publish, tmp_path, random_base, monkeypatch
) -> None:
    revision, merge = publish(str(random_base)), merging.merge

    def merge_and_taint(*arguments: object) -> None:
        merge(*arguments)
        _taint(registry, revision)

    monkeypatch.setattr(module.merging, "merge", merge_and_taint)
    with pytest.raises(RevisionError, match="is tainted"):
        export_merged(registry, revision.revision_id, tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if "whole" in path.name] == []


def test_another_base_and_a_quantized_one_are_refused(
    registry, publish, tmp_path, random_base
) -> None:
    base = shutil.copytree(random_base, tmp_path / "base")
    revision = publish(str(base))
    with pytest.raises(WrongBase, match="was trained on another base model"):
        export_merged(registry, revision.revision_id, tmp_path / "whole", model="tiny")
    config = json.loads((base / "config.json").read_text())
    packed = config | {"quantization_config": {"quant_method": "mxfp4"}}
    (base / "config.json").write_text(json.dumps(packed))
    with pytest.raises(UnsupportedModel, match=r"is quantized.*beside it: `agentpref adapters exp"):
        export_merged(registry, revision.revision_id, tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if "whole" in path.name] == []


def test_a_base_that_was_moved_is_found_where_it_is_said_to_be(
    registry, publish, tmp_path, random_base
) -> None:
    base = shutil.copytree(random_base, tmp_path / "base")
    revision = publish(str(base))
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelNotFound, match=r"is not where it was trained: .* with --model"):
        export_merged(registry, revision.revision_id, tmp_path / "whole")
    export_merged(registry, revision.revision_id, tmp_path / "whole", model=str(tmp_path / "moved"))
    assert (tmp_path / "whole" / "model.safetensors").exists()


def test_a_target_that_is_not_free_is_refused_before_the_base_is_read(
    registry, publish, tmp_path, random_base, monkeypatch
) -> None:
    revision = publish(str(random_base))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    monkeypatch.setattr(merging, "load_stored", None)
    with pytest.raises(ConfigError, match=r"contains 'thesis\.txt'"):
        export_merged(registry, revision.revision_id, tmp_path / "full")
    with pytest.raises(ConfigError, match="inside the home"):
        export_merged(registry, revision.revision_id, registry.home.path / "whole")


@contextmanager
def _small_files(most: int) -> Iterator[None]:
    """Writing more than so many bytes to a file fails, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_at_the_target(registry, publish, tmp_path, random_base) -> None:
    revision = publish(str(random_base))
    with _small_files(100_000), pytest.raises(NotKept, match=r"free space on its disk"):
        export_merged(registry, revision.revision_id, tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if "whole" in path.name] == []


def test_a_weight_that_its_format_cannot_hold_is_refused(
    registry, publish, tmp_path, random_base
) -> None:
    base = shutil.copytree(random_base, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16).save_pretrained(base)
    revision = publish(str(base), size=3e5)
    with pytest.raises(InvalidAdapter, match=r"numbers too large for the base's torch\.float16"):
        export_merged(registry, revision.revision_id, tmp_path / "whole")
