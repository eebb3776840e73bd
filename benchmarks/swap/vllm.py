"""A real vLLM server, and vLLM's way to load an adapter in place.

``load_inplace`` puts the new adapter's weights under the old one's name, while the server answers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx

from agentpref.models.base import load_base
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.serve.watch import Watcher
from agentpref_adapters._vllm_process import VllmProcess, vllm_process
from agentpref_adapters._vllm_server import Model, Server, completion_body
from agentpref_adapters.vllm import VllmBackend
from benchmarks.swap import rival
from benchmarks.swap.elsewhere import elsewhere
from benchmarks.swap.load import Engine, Options, Rival
from benchmarks.swap.stage import Ids, Stage, encoded, request

MAX_LORAS = 8
"""More than usual: here revisions change faster than requests end."""

# Settings for a server on a processor, unless the user has set others.
ON_A_PROCESSOR = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
_NAME = "live"
_TIMEOUT = 120.0


def engine(python: str | None) -> Engine:
    """The engine as a server that the given interpreter runs."""

    @contextmanager
    def serve(stage: Stage) -> Iterator[Router]:
        with (
            _server(stage, python) as server,
            closing(VllmBackend(server.url, model=stage.base, max_loras=MAX_LORAS)) as backend,
            Router(Registry(stage.home), backend) as router,
        ):
            Watcher(router)
            _warm_up(stage, router)
            yield router

    def load_inplace(stage: Stage, options: Options) -> Mapping[str, Any]:
        with (
            _server(stage, python) as process,
            closing(Server(process.url, timeout=_TIMEOUT)) as server,
        ):
            return _load_inplace(stage, options, server)

    return Engine("vllm", serve, activation=3.0, rivals=(Rival("load_inplace", load_inplace),))


@contextmanager
def _server(stage: Stage, python: str | None) -> Iterator[VllmProcess]:
    options = ("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager")
    os.environ.update(ON_A_PROCESSOR | os.environ)
    with (
        tempfile.TemporaryDirectory() as logs,
        vllm_process(
            stage.base, *options, logs=Path(logs), python=python, max_loras=MAX_LORAS
        ) as server,
    ):
        yield server


def _warm_up(stage: Stage, router: Router) -> None:
    """vLLM compiles for its first adapter, which takes ten seconds and is not measured."""
    with elsewhere(stage) as other:
        router.activate(other.publish(0))
    router.generate(request(stage.prompts[0]))


def _load_inplace(stage: Stage, options: Options, server: Server) -> Mapping[str, Any]:
    tokenizer = load_base(stage.base)
    ends = [int(tokenizer.tokenizer.eos_token_id)]
    model = Model(_NAME, "", None, None)
    prompts = {p: encoded(tokenizer, p)["input_ids"][0].tolist() for p in stage.prompts}

    def swap(adapter: int) -> None:
        body = {"lora_name": _NAME, "lora_path": str(stage.folders[adapter]), "load_inplace": True}
        found = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=_TIMEOUT)
        found.raise_for_status()

    def answer(prompt: str) -> Ids:
        body = completion_body(request(prompt), model, prompts[prompt], ends)
        return server.complete(body).token_ids

    swap(0)
    answer(stage.prompts[0])
    return rival.measure(stage, options, swap=swap, answer=answer)
