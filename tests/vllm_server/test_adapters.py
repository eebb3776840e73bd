"""What a real vLLM takes without a word, we refuse; and what we export, it takes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import httpx
import orjson
import pytest
from asked import QUESTIONS, ask
from bad_adapters import BAD_ADAPTERS, BadAdapter

from agentpref.errors import InvalidAdapter, WrongBase
from agentpref.models.base_files import BaseFiles
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter
from agentpref_adapters._vllm_process import VllmProcess
from agentpref_adapters.vllm import VllmBackend

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def with_a_nan(folder: Path, layers: dict[str, tuple[int, int]]) -> None:
    write_adapter(folder, layers=layers)
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-4] + struct.pack("<f", float("nan")))


def half_as_wide(folder: Path, layers: dict[str, tuple[int, int]]) -> None:
    write_adapter(folder, layers={name: (o // 2, i // 2) for name, (o, i) in layers.items()})


def with_layers_missing(folder: Path, layers: dict[str, tuple[int, int]]) -> None:
    """The settings name a kind of layer of which only the first has weights."""
    first = next(iter(layers))
    write_adapter(folder, layers={first: layers[first]})
    config = orjson.loads((folder / CONFIG).read_bytes())
    config["target_modules"] = [first.rpartition(".")[2]]
    (folder / CONFIG).write_bytes(orjson.dumps(config))


BAD = {"NaN": with_a_nan, "half-width": half_as_wide, "missing layers": with_layers_missing}


def loaded_by_vllm_itself(server: VllmProcess, name: str, folder: Path) -> int:
    """Load a folder past us, and unload it again; say what vLLM answered."""
    body = {"lora_name": name, "lora_path": str(folder)}
    status = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body).status_code
    httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": name})
    return status


@pytest.mark.parametrize("flaw", BAD)
def test_a_bad_adapter_that_vllm_accepts_is_refused_before_it_is_sent(
    server: VllmProcess,
    registry: Registry,
    backend: VllmBackend,
    base: BaseFiles,
    tmp_path: Path,
    flaw: str,
) -> None:
    folder = tmp_path / "bad"
    BAD[flaw](folder, dict(base.layers or {}))
    assert loaded_by_vllm_itself(server, f"bad {flaw}", folder) == 200, "vLLM is better than it was"
    with pytest.raises(InvalidAdapter, match=r"model\.layers"):
        backend.validate(registry.publish(folder, parent=None, model=base.identity, training={}))


def test_vllm_serves_as_many_bad_adapters_as_the_guide_says(
    server: VllmProcess, base: BaseFiles, tmp_path: Path
) -> None:
    """All of them are refused by us: tests/core/serve/test_bad_adapters.py."""
    served = [bad.name for bad in BAD_ADAPTERS if _serves(server, bad, base, tmp_path)]
    guide = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text(encoding="utf-8")
    assert f"{len(served)} of the {len(BAD_ADAPTERS)}" in " ".join(guide.split()), served


def _serves(server: VllmProcess, bad: BadAdapter, base: BaseFiles, folder: Path) -> bool:
    bad.make(base.path, folder / bad.name)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"lora_name": bad.name, "lora_path": str(folder / bad.name)}
        if client.post("/v1/load_lora_adapter", json=body).is_error:
            return False
        asked = {"model": bad.name, "prompt": "Hello", "max_tokens": 2}
        answered = client.post("/v1/completions", json=asked).is_success
        client.post("/v1/unload_lora_adapter", json={"lora_name": bad.name})
    return answered


def test_an_adapter_of_another_base_is_refused_before_it_is_sent(
    server: VllmProcess,
    registry: Registry,
    backend: VllmBackend,
    base: BaseFiles,
    adapters: list[Path],
) -> None:
    other = {**base.identity, "digest": "0" * 64}
    revision = registry.publish(adapters[0], parent=None, model=other, training={})
    assert loaded_by_vllm_itself(server, "other", revision.path) == 200
    with pytest.raises(WrongBase):
        backend.validate(revision)


def test_plain_vllm_and_plain_peft_load_an_exported_revision(
    server: VllmProcess,
    registry: Registry,
    publish: Callable[..., list],
    expected,
    oracle,
    base: BaseFiles,
    tmp_path: Path,
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (revision,) = publish(1)
    request = ask(QUESTIONS[0], max_tokens=12)
    right = expected(revision, request).token_ids
    folder = tmp_path / "exported"
    registry.export(revision.revision_id, folder)

    body = {"lora_name": "exported", "lora_path": str(folder)}
    assert httpx.post(f"{server.url}/v1/load_lora_adapter", json=body).status_code == 200
    prompt = list(oracle._encode(request)[0])
    asked = {"model": "exported", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    answer = httpx.post(
        f"{server.url}/v1/completions", json=asked | {"return_token_ids": True}, timeout=60
    ).json()
    httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "exported"})
    assert tuple(answer["choices"][0]["token_ids"]) == right

    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder).eval()
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert tuple(ids[0, len(prompt) :].tolist()) == right
