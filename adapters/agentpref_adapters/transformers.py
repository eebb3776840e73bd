"""Serving inside the process, over transformers and peft.

One model is in memory with the LoRA adapters of all loaded revisions beside it. One thread owns it:
adapters are added, removed and switched there only, between batches, so that no token ever comes
from two of them. Requests that wait for the same revision are generated together, padded on the
left; each row keeps its own sampling settings, limits and stop strings. Caches of keys and values
live as long as a batch, so none outlasts a swap. Nothing here knows which revision is live.

torch, transformers and peft are imported when a backend is made, never before.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from agentpref.errors import (
    AgentprefError,
    GenerationFailed,
    MissingDependency,
    ServingError,
    SwapFailed,
    UnsupportedModel,
)
from agentpref.learn.base import BaseModel, load_base
from agentpref.learn.encode import encode_prompt
from agentpref.record.home import Home
from agentpref.serve.backend import (
    PROBE,
    Capabilities,
    GenerationRequest,
    Reply,
    Revision,
    place_in_process,
)
from agentpref.serve.owner import Owner
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.serve.text import TextStream
from agentpref.serve.validate import check_revision
from agentpref.types import Prompt
from agentpref_adapters._transformers_adapters import Adapters, linear_layers
from agentpref_adapters._transformers_decode import Row, generate

_RENEW = "close the backend and make a new one"
_ASKED_OF_FORWARD = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}


def open_router(
    home: Home | str | Path | None, model: BaseModel | str, namespace: str = "default"
) -> Router:
    """Serve a home's live revision of a base model from inside this process.

    Args:
        home: the home, its folder, or ``None`` for ``AGENTPREF_HOME`` or ``./.agentpref``.
        model: the base model, as for ``agentpref.update``.
        namespace: whose revisions.

    Raises:
        NotAHome: there is no home in the folder.
        ModelError: the model cannot be found or served.
        RevisionError: what is live is broken or was trained on another base.
    """
    registry = Registry(home, namespace=namespace)
    with ExitStack() as on_failure:
        backend = TransformersBackend(model)
        on_failure.callback(backend.close)
        router = Router(registry, backend)
        on_failure.pop_all()
    return router


class TransformersBackend:
    """A serving backend over a causal model of transformers, in this process.

    Greedy means the likeliest token, whatever penalties the model's own generation settings ask
    for. ``Reply.token_ids`` are all that was generated, the end of turn included;
    ``Reply.logprobs`` are the model's own, before temperature and top-p.

    Args:
        base: the model, or its name. A model that is given is the backend's own from then on:
            adapters are put into its layers.
        max_batch: how many requests are generated together at most.

    Raises:
        ModelError: the model cannot be found, or is of a kind that cannot be served.
        MissingDependency: torch, transformers or peft is not installed.
    """

    def __init__(self, base: BaseModel | str, *, max_batch: int = 16) -> None:
        """Load the base model and start the thread that owns it."""
        self.base = load_base(base) if isinstance(base, str) else base
        _require_servable(self.base)
        model, tokenizer = self.base.model, self.base.tokenizer
        self._layers = linear_layers(model)
        self._ends = _end_tokens(self.base)
        self._pad = int(tokenizer.pad_token_id or 0)
        self._tokenizing = threading.Lock()
        self._adapters = Adapters(model)
        self._place = place_in_process()
        self._loaded: tuple[str, ...] = ()
        self._owner: Owner[Row] = Owner(self._serve, max_batch=max_batch)

    def capabilities(self) -> Capabilities:
        """Any number of revisions, as memory allows; streaming."""
        return Capabilities(engine="transformers", streaming=True, place=self._place)

    def validate(self, revision: Revision) -> None:
        """Check a revision's files, digests, tensors and numbers against this very model."""
        check_revision(revision, base=self.base.identity, layers=self._layers)

    def load(self, revision: Revision) -> None:
        """Put a revision's adapter beside the others.

        Raises:
            SwapFailed: peft could not load it; nothing of it remains.
        """
        name, folder = revision.revision_id, revision.path
        with _translated(
            SwapFailed, f"{name} could not be loaded from {folder}", "publish it again"
        ):
            self._change(lambda: self._adapters.add(name, folder))

    def probe(self, revision_id: str) -> Reply:
        """Answer the probe of :mod:`agentpref.serve.backend`.

        Raises:
            SwapFailed: the revision raised, or gave a log-probability that is not finite.
        """
        try:
            return self.generate(revision_id, PROBE)
        except GenerationFailed as error:
            raise SwapFailed(f"{revision_id} failed its probe: {error}") from error

    def unload(self, revision_id: str) -> None:
        """Take a revision's adapter out of the model."""
        with _translated(ServingError, f"{revision_id} could not be unloaded", _RENEW):
            self._change(lambda: self._adapters.remove(revision_id))

    def list_loaded(self) -> tuple[str, ...]:
        """Name the revisions whose adapters are in the model."""
        return self._loaded

    def generate(self, revision_id: str, request: GenerationRequest) -> Reply:
        """Answer a request with one revision, or ``"base"``.

        Raises:
            GenerationFailed: the revision is not loaded, the prompt does not fit, or the engine
                raised; the backend stays usable.
        """
        results = self._submit(revision_id, request, streaming=False).results()
        return next(item for item in results if isinstance(item, Reply))

    def stream(self, revision_id: str, request: GenerationRequest) -> Iterator[str | Reply]:
        """Yield pieces of text as they are certain, then the reply; raises as ``generate`` does.

        The pieces are the text as the model wrote it, tool calls included. A stream that is
        closed early stops generating.
        """
        yield from self._submit(revision_id, request, streaming=True).results()

    def close(self) -> None:
        """Finish the batch at hand, fail what waits with ``BackendClosed``, and stop."""
        self._owner.close()

    def _change(self, change: Any) -> None:
        def changed() -> None:
            try:
                change()
            finally:
                self._loaded = self._adapters.names()

        self._owner.call(changed)

    def _submit(self, revision_id: str, request: GenerationRequest, *, streaming: bool) -> Row:
        prompt = self._encode(request)
        positions = getattr(self.base.model.config, "max_position_embeddings", None) or math.inf
        room = int(min(request.max_tokens, positions - len(prompt)))
        if room < 1:
            raise GenerationFailed(
                f"the prompt has {len(prompt)} tokens, the model takes {positions}; shorten it"
            )
        text = TextStream(self._decode, request.stop)
        row = Row(revision_id, request, prompt, text, self._ends, room, streaming=streaming)
        self._owner.submit(row)
        return row

    def _encode(self, request: GenerationRequest) -> tuple[int, ...]:
        prompt = Prompt("", request.messages, request.tools)
        what = f"the chat template of {self.base.name!r} does not render the messages"
        cure = "check their roles and contents"
        with _translated(GenerationFailed, what, cure), self._tokenizing:
            return encode_prompt(prompt, self.base.tokenizer)

    def _decode(self, tokens: Sequence[int]) -> str:
        with self._tokenizing:
            return str(self.base.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _serve(self, rows: list[Row]) -> None:
        waiting = [row for row in rows if not row.done]
        try:
            self._adapters.activate(rows[0].key)
            if waiting:
                generate(self.base.model, waiting, self._pad)
        except Exception as error:  # not swallowed: every row that still waits raises it
            for row in waiting:
                row.fail(_failure(row, error))


def _require_servable(base: BaseModel) -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "serving adapters needs peft; install it with: pip install 'agentpref[train]'"
        ) from error
    missing = _ASKED_OF_FORWARD - set(inspect.signature(base.model.forward).parameters)
    if missing:
        raise UnsupportedModel(
            f"{base.name!r} takes no {', '.join(sorted(missing))} and cannot be generated with "
            f"here; use a decoder-only transformer"
        )


def _end_tokens(base: BaseModel) -> frozenset[int]:
    ends = {base.tokenizer.eos_token_id}
    generation = base.model.generation_config
    configured = generation.eos_token_id if generation is not None else None
    ends.update(configured if isinstance(configured, list) else [configured])
    return frozenset(int(token) for token in ends if token is not None)


@contextmanager
def _translated(kind: type[ServingError], what: str, cure: str) -> Iterator[None]:
    """Raise whatever torch, peft, jinja or a tokenizer raises as an error of ours."""
    try:
        yield
    except AgentprefError:
        raise
    except Exception as error:
        raise kind(f"{what} ({type(error).__name__}: {error}); {cure}") from error


def _failure(row: Row, error: Exception) -> GenerationFailed:
    """An error of its own for each row, since each is raised in a thread of its own."""
    cause = f"({type(error).__name__}: {error}); the backend stays usable, try again"
    if isinstance(error, AgentprefError):
        cause = f"({error})"
    failure = GenerationFailed(f"{row.key} could not answer {cause}")
    failure.__cause__ = error
    return failure
