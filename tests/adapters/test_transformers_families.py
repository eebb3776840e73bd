"""Mixtures of experts and models that see: trained, published, and served in this process."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import safe_open

import agentpref
from agentpref.config import GateSettings, KLSettings, LossSettings, UpdateConfig
from agentpref.models.base import load_base
from agentpref.models.tokenizer import encode_prompt
from agentpref.serve.backend import GenerationRequest
from agentpref.serve.registry import Registry
from agentpref.types import BASE, Prompt
from agentpref_adapters.transformers import TransformersBackend
from tests.core.learn.families import CONDITIONAL, FAMILIES, MIXTURES

CONFIG = UpdateConfig(
    held_out=0.4,
    precision="float32",
    batch_size=8,
    learning_rate=1e-2,
    epochs=3,
    kl=KLSettings(weight=0.0),
    loss=LossSettings(beta=1.0, nll=1.0),
    gate=GateSettings(
        cross_fit_below=0, kl_budget=1e3, distinct_floor=0.0, length_ratio=(1e-3, 1e3)
    ),
)
LENGTH = 6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::UserWarning", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    ),
]


def request(number: int) -> GenerationRequest:
    asked = {"role": "user", "content": f"Is {number} a number?"}
    return GenerationRequest(messages=(asked,), max_tokens=LENGTH)


def base_of(family: str, tokenizer: Path, folder: Path) -> Path:
    """A folder with a random model of a family, and the tokenizer of another folder."""
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = FAMILIES[family]()
    text = config.get_text_config()
    text.vocab_size, text.max_position_embeddings = 400, 512
    text.eos_token_id = json.loads((tokenizer / "config.json").read_text())["eos_token_id"]
    torch.manual_seed(0)
    kind = tf.AutoModelForImageTextToText if family in CONDITIONAL else tf.AutoModelForCausalLM
    model = kind.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def teach(home: Path) -> None:
    """Log that "yes" is liked better than "no, never"."""
    with agentpref.Log(home) as log:
        for number in range(40):
            asked = list(request(number).messages)
            log.compare(log.record(asked, "yes"), log.record(asked, "no, never"), winner="a")


def greedy(base, adapter: Path, asked: GenerationRequest) -> tuple[int, ...]:
    """What peft's model writes, from a whole forward pass for each token."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base.model, str(adapter)).eval()
    ids = [*encode_prompt(Prompt("", asked.messages), base.template)]
    start = len(ids)
    while len(ids) - start < LENGTH and ids[-1:] != [base.tokenizer.eos_token_id]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return tuple(ids[start:])


@pytest.mark.parametrize("family", [*MIXTURES, *CONDITIONAL])
def test_a_night_publishes_what_the_backend_serves(
    family: str, random_base: Path, tmp_path: Path
) -> None:
    base, home = base_of(family, random_base, tmp_path / "base"), tmp_path / "home"
    teach(home)
    report = agentpref.update(home, model=str(base), config=CONFIG, checks={})
    assert report.verdict == "promoted", report.reasons
    revision = Registry(home).get(str(report.revision))

    with safe_open(revision.path / "adapter_model.safetensors", "pt") as file:
        layers = {name.partition(".lora_")[0] for name in file.keys()}  # noqa: SIM118
    assert not any("experts." in name or "shared_expert_gate" in name for name in layers)
    text = "model.language_model.layers." if family in CONDITIONAL else "model.layers."
    assert all(name.startswith(f"base_model.model.{text}") for name in layers)

    backend = TransformersBackend(str(base), precision="float32")
    backend.validate(revision)
    backend.load(revision)
    pairs = [(name, request(n)) for n in (1, 77, 1234) for name in (revision.revision_id, BASE)]
    alone = [backend.generate(*pair).token_ids for pair in pairs]
    with ThreadPoolExecutor(len(pairs)) as threads:
        together = [r.token_ids for r in threads.map(lambda pair: backend.generate(*pair), pairs)]
    backend.close()
    assert alone == together
    assert alone[0] != alone[1]
    assert alone[0] == greedy(load_base(str(base)), revision.path, pairs[0][1])
