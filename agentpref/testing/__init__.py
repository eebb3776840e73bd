"""Fakes for the tests of applications, and of agentpref itself.

:class:`FakeBackend` serves any revision without a model, deterministically, and fails on request.
:func:`write_adapter` makes a small adapter that passes every check. :class:`FakeJudge` judges by a
rule, and :class:`JudgeServer` does so behind OpenAI's API. None of them needs torch or numpy.
"""

from __future__ import annotations

import random
import re
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from agentpref.errors import BackendClosed, GenerationFailed, ProbeFailed, SwapFailed
from agentpref.serve.backend import (
    PROBE,
    Capabilities,
    GenerationRequest,
    Reply,
    Revision,
    place_in_process,
    read_answer,
)
from agentpref.serve.folders import CONFIG_FILE, WEIGHTS_FILE
from agentpref.serve.validate import check_published
from agentpref.testing.judges import FakeJudge as FakeJudge
from agentpref.testing.judges import JudgeServer as JudgeServer
from agentpref.types import BASE

_LAYERS: Mapping[str, tuple[int, int]] = {"model.layers.0.self_attn.q_proj": (16, 16)}


def echo(revision_id: str, request: GenerationRequest) -> str:
    """The default answer of :class:`FakeBackend`: the revision's name and the last message."""
    return f"{revision_id} heard: {request.messages[-1].get('content')}"


@dataclass(eq=False)
class FakeBackend:
    """A serving backend with no model behind it. All but ``answer`` is given by keyword.

    Args:
        answer: called with a revision's id and a request, returns the text of the answer, which may
            contain ``<tool_call>`` blocks. Each character is a token of log-probability -1.
        fail_load: revisions that cannot be loaded. All three sets may be changed at any time.
        fail_probe: revisions that load, but fail their probe.
        fail_generate: revisions that raise instead of answering.
        gate: if given, every ``generate`` waits for it, so a test decides how long requests are in
            flight.
        max_loaded: how many revisions fit beside each other.
        place: where it claims to load them; by default a place of its own in this process.

    ``calls`` lists the calls so far: ``("load", revision_id)`` and so on.
    """

    answer: Callable[[str, GenerationRequest], str] = echo
    _: KW_ONLY
    fail_load: set[str] = field(default_factory=set)
    fail_probe: set[str] = field(default_factory=set)
    fail_generate: set[str] = field(default_factory=set)
    gate: threading.Event | None = None
    max_loaded: int | None = None
    place: str = field(default_factory=place_in_process)
    calls: list[tuple[str, str]] = field(default_factory=list, init=False)
    _loaded: dict[str, Revision] = field(default_factory=dict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _closed: bool = field(default=False, init=False)

    def capabilities(self) -> Capabilities:
        """Say what the fake can do."""
        return Capabilities("fake", True, (self.place,), self.max_loaded)

    def validate(self, revision: Revision) -> None:
        """Refuse a revision whose files are not those that were published."""
        self._note("validate", revision.revision_id)
        check_published(revision)

    def load(self, revision: Revision) -> None:
        """Load a revision, unless it is in ``fail_load`` or there is no room."""
        name = revision.revision_id
        self._note("load", name)
        if name in self.fail_load:
            raise SwapFailed(f"{name} is in fail_load; take it out to load it")
        with self._lock:
            if self.max_loaded is not None and len({*self._loaded, name}) > self.max_loaded:
                raise SwapFailed(f"{name} does not fit: {self.max_loaded} are loaded; unload one")
            self._loaded[name] = revision

    def probe(self, revision_id: str) -> Reply:
        """Answer a fixed prompt, unless the revision is in ``fail_probe``."""
        self._note("probe", revision_id)
        if revision_id in self.fail_probe:
            raise ProbeFailed(f"{revision_id} is in fail_probe; take it out to probe it")
        return self._reply(revision_id, PROBE)

    def unload(self, revision_id: str, places: Sequence[str] | None = None) -> None:
        """Unload a revision, if ``places`` includes the backend's own."""
        self._note("unload", revision_id)
        if places is None or self.place in places:
            with self._lock:
                self._loaded.pop(revision_id, None)

    def list_loaded(self) -> tuple[str, ...]:
        """Name the loaded revisions, in the order they were loaded."""
        with self._lock:
            return tuple(self._loaded)

    def generate(self, revision_id: str, request: GenerationRequest) -> Reply:
        """Answer a request, once ``gate`` is set."""
        self._note("generate", revision_id)
        if self.gate is not None:
            self.gate.wait()
        return self._reply(revision_id, request)

    def stream(self, revision_id: str, request: GenerationRequest) -> Iterator[str | Reply]:
        """Yield the answer word by word, then the reply."""
        yield from re.findall(r"[^ ]* |[^ ]+", self._text(revision_id, request))
        yield self.generate(revision_id, request)

    def close(self) -> None:
        """Refuse every later call."""
        self._closed = True

    def _note(self, call: str, revision_id: str) -> None:
        if self._closed:
            raise BackendClosed(f"the backend was closed before {call}; make a new one")
        self.calls.append((call, revision_id))

    def _text(self, revision_id: str, request: GenerationRequest) -> str:
        if revision_id != BASE and revision_id not in self.list_loaded():
            raise GenerationFailed(f"{revision_id} is not loaded; load it first")
        if revision_id in self.fail_generate:
            raise GenerationFailed(f"{revision_id} is in fail_generate; take it out to ask it")
        return self.answer(revision_id, request)

    def _reply(self, revision_id: str, request: GenerationRequest) -> Reply:
        text = self._text(revision_id, request)
        message = read_answer(request, text)
        tokens = tuple(map(ord, text))
        return Reply(revision_id, message, tokens, (-1.0,) * len(tokens), "stop")


def write_adapter(
    folder: Path,
    *,
    seed: int = 0,
    rank: int = 8,
    layers: Mapping[str, tuple[int, int]] = _LAYERS,
) -> Path:
    """Write a random LoRA adapter as peft would save it; return the folder.

    Args:
        folder: where to write; it is made if it is missing.
        seed: adapters with different seeds have different content.
        rank: the LoRA rank.
        layers: (out, in) of the linear layers that it adapts, by module name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": sorted(layers),
    }
    (folder / CONFIG_FILE).write_bytes(orjson.dumps(config))
    # Safetensors: the header's length, the header, then the numbers.
    source, data = random.Random(seed), b""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for module, (wide, narrow) in layers.items():
        for side, (rows, columns) in (("A", (rank, narrow)), ("B", (wide, rank))):
            numbers = array("f", (source.gauss(0, 0.1) for _ in range(rows * columns)))
            header[f"base_model.model.{module}.lora_{side}.weight"] = {
                "dtype": "F32",
                "shape": [rows, columns],
                "data_offsets": [len(data), len(data) + 4 * len(numbers)],
            }
            data += numbers.tobytes()
    table = orjson.dumps(header)
    (folder / WEIGHTS_FILE).write_bytes(len(table).to_bytes(8, "little") + table + data)
    return folder
