"""Serving inside the process, over transformers.

One model is in memory, with the LoRA matrices of all loaded revisions beside it. One thread runs it
for all requests together. A request gets its revision's matrices when it comes and keeps them to
its last token, whatever is loaded or unloaded meanwhile. Requests join and leave between two
tokens, and loading does not touch the model, so a swap delays nobody.

torch and transformers are imported when a backend is made.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from agentpref.config import Precision
from agentpref.errors import (
    BackendClosed,
    ConfigError,
    GenerationFailed,
    MissingDependency,
    ProbeFailed,
    SwapFailed,
)
from agentpref.home import Home
from agentpref.models.base import BaseModel, load_base
from agentpref.models.decoding import Decoding
from agentpref.models.text_stream import TextStream
from agentpref.models.threads import disband, sharing
from agentpref.serve import watch
from agentpref.serve.backend import (
    CLOSED,
    PROBE,
    Capabilities,
    GenerationRequest,
    Reply,
    Revision,
    encode_request,
    place_in_process,
)
from agentpref.serve.router import Router
from agentpref.serve.validate import check_published, check_revision
from agentpref.types import BASE
from agentpref_adapters._transformers_adapters import Adapter, Layers
from agentpref_adapters._transformers_engine import ActiveRequest, Engine, NotFinite
from agentpref_adapters._transformers_grammar import Constraint, Constraints

_DIED = (
    "the thread that runs the model died of an error, which it printed; make a new backend to "
    "continue serving"
)


IDLE_SECONDS = 0.5
"""After so long without a request, the model's thread gives its OpenMP team away."""


def open_router(
    home: Home | str | Path | None,
    model: BaseModel | str,
    namespace: str = "default",
    *,
    follow: float | None = 1.0,
    precision: Precision | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Router:
    """Serve a home's live revision of a base model inside this process.

    Closing the router closes the backend, too. ``home``, ``namespace`` and ``follow`` are those of
    :func:`agentpref.serve.watch.open_router`, which also says what is raised.

    Args:
        model: the base model, as for ``agentpref.update``.
        precision: the number format of a model that is named, as in the update's settings.
        chat_template_kwargs: what its chat template is always given, as in the update's settings.
    """
    return watch.open_router(
        home,
        lambda: TransformersBackend(
            model, precision=precision, chat_template_kwargs=chat_template_kwargs
        ),
        namespace=namespace,
        follow=follow,
    )


class TransformersBackend:
    """A serving backend over a causal model of transformers, in this process.

    Temperature 0 gives the likeliest token, whatever penalties the model's own generation settings
    ask for. ``Reply.token_ids`` are all generated tokens, with the end of the turn;
    ``Reply.logprobs`` are the model's own, before temperature and top-p.

    Args:
        model: the base model, or its name. A loaded one belongs to the backend until it is closed:
            hooks on its layers apply adapters.
        max_batch: the most requests that are answered together; others wait.
        precision: the number format of a model that is named; by default ``"auto"``: bfloat16 where
            the processor multiplies it natively, and float32 elsewhere, as an update's default is.
        chat_template_kwargs: what the chat template of a model that is named is always given.

    Raises:
        ConfigError: a loaded model is given with what only a named one takes.
        ModelError: the model cannot be found, or is of a kind that cannot be served.
        MissingDependency: torch, transformers or safetensors is not installed.
    """

    def __init__(
        self,
        model: BaseModel | str,
        *,
        max_batch: int = 16,
        precision: Precision | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        _require_safetensors()
        if isinstance(model, str):
            model = load_base(
                model, precision=precision or "auto", chat_template_kwargs=chat_template_kwargs
            )
        else:
            for option, value in (
                ("chat_template_kwargs", chat_template_kwargs),
                ("precision", precision),
            ):
                if value is not None:
                    raise ConfigError(f"a loaded model has its {option}; give it to load_base")
        self.base = model
        model.template.require_plain_answers(model.name)
        self._layers = Layers(self.base.model)
        self._decoding = Decoding.of(self.base)
        self._constraints = Constraints(self.base, self._decoding)
        self._embedded = self.base.embedded
        self._tokenizing = threading.Lock()
        self._adapters: dict[str, Adapter] = {}
        self._instructions: dict[str, str] = {}
        self._place = place_in_process()
        engine = Engine(self.base.model, self._layers, self._decoding.pad)
        self._sharing = ExitStack()
        self._sharing.enter_context(sharing())  # before the thread starts: it takes the number
        self._thread = ModelThread(engine, max_active=max_batch)
        disband()  # of who loaded the model

    def capabilities(self) -> Capabilities:
        """Any number of revisions, as memory allows; streaming."""
        return Capabilities(engine="transformers", streaming=True, places=(self._place,))

    def validate(self, revision: Revision) -> None:
        """Check a revision's files, digests, tensors and numbers against this model."""
        check_revision(revision, base=self.base.identity, layers=self._layers.shapes())

    def load(self, revision: Revision) -> None:
        """Load a revision beside the others, while requests continue.

        Its files are read once: what is loaded is what was checked.

        Raises:
            InvalidAdapter: its files are not those that were published.
            SwapFailed: it could not be read or does not fit; it is then not loaded.
        """
        name = revision.revision_id
        self._thread.require_open()
        if name not in self._adapters:
            files = check_published(revision)
            try:
                self._instructions[name] = revision.instructions
                self._adapters[name] = self._layers.read(name, files)
            except Exception as error:  # of torch or safetensors
                raise SwapFailed(
                    f"{name} could not be loaded from {revision.path} ({type(error).__name__}: "
                    f"{error}); train it on this model, or publish it again"
                ) from error
            disband()

    def probe(self, revision_id: str) -> Reply:
        """Answer the probe of :mod:`agentpref.serve.backend`.

        Raises:
            ProbeFailed: the revision gave a log-probability that is not finite.
            SwapFailed: the engine raised.
        """
        try:
            return self.generate(revision_id, PROBE)
        except NotFinite as error:
            raise ProbeFailed(f"{revision_id} failed its probe: {error}") from error
        except GenerationFailed as error:
            raise SwapFailed(f"{revision_id} could not be probed: {error}") from error

    def unload(self, revision_id: str, places: Sequence[str] | None = None) -> None:
        """Drop a revision's adapter; a request that uses it keeps it to its end."""
        if places is None or self._place in places:
            self._adapters.pop(revision_id, None)
            self._instructions.pop(revision_id, None)

    def list_loaded(self) -> tuple[str, ...]:
        """Name the revisions whose adapters are in memory, oldest first."""
        return tuple(self._adapters)

    def generate(self, revision_id: str, request: GenerationRequest) -> Reply:
        """Answer a request with one revision, or ``"base"``.

        Raises:
            ConfigError: no answer fulfils the schemas that it is to be held to.
            GenerationFailed: the revision is not loaded, the prompt does not fit, the model cannot
                call tools, or the engine raised; the backend stays usable.
        """
        results = self._submit(revision_id, request, streaming=False).results()
        return next(item for item in results if isinstance(item, Reply))

    def stream(self, revision_id: str, request: GenerationRequest) -> Iterator[str | Reply]:
        """Yield pieces of text as they come, then the reply; raises as :meth:`generate` does.

        The pieces are the model's text, tool calls included. Closing the stream early stops
        generating.
        """
        yield from self._submit(revision_id, request, streaming=True).results()

    def close(self) -> None:
        """Finish active requests, fail waiting ones with ``BackendClosed``, and stop."""
        self._thread.close()
        self._sharing.close()
        self._layers.close()
        self._adapters.clear()

    def _submit(
        self, revision_id: str, request: GenerationRequest, *, streaming: bool
    ) -> ActiveRequest:
        self._thread.require_open()
        told = self._instructions.get(revision_id, "")
        prompt, constraint = self._encode(request, told)
        room = self._decoding.room(prompt, request.max_tokens)
        if max(prompt) >= self._embedded:  # on a GPU, it would end the process
            raise GenerationFailed(
                f"the prompt writes token {max(prompt)}, but {self.base.name!r} has embeddings for "
                f"{self._embedded} tokens; leave {self.decode([max(prompt)], whole=True)!r} out"
            )
        text = TextStream(self.decode, request.stop)
        adapter = self._adapters.get(revision_id)
        if adapter is None and revision_id != BASE:
            self._thread.require_open()
            raise GenerationFailed(f"{revision_id} is not loaded; load it first")
        active = ActiveRequest(
            revision_id,
            adapter,
            request,
            prompt,
            text,
            self._decoding.end_tokens,
            room,
            streaming,
            constraint,
        )
        self._thread.submit(active)
        return active

    def _encode(
        self, request: GenerationRequest, instructions: str = ""
    ) -> tuple[tuple[int, ...], Constraint | None]:
        with self._tokenizing:
            prompt = encode_request(request, self.base.template, self.base.name, instructions)
            return prompt, self._constraints.of(request)

    def decode(self, tokens: Sequence[int], *, whole: bool = False) -> str:
        """Token ids as text; special tokens are left out, unless it is to be ``whole``."""
        with self._tokenizing:
            return self._decoding.decode(tokens, whole=whole)


class ModelThread:
    """The one thread that runs a model; threads that share a model mix up its state.

    It admits requests to an engine, oldest first, between two steps, and at most ``max_active``.
    """

    def __init__(self, engine: Engine, *, max_active: int) -> None:
        """Start the thread; it is a daemon and does not delay the end of the process."""
        self.waiting: deque[ActiveRequest] = deque()  # submitted and not yet admitted
        self._engine = engine
        self._max_active = max_active
        self._arrived = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="agentpref-model", daemon=True)
        self._thread.start()

    def require_open(self) -> None:
        """Refuse if the thread was closed or died, or in a forked process, which has none."""
        if self._closed or not self._thread.is_alive():
            raise BackendClosed(CLOSED)

    def submit(self, request: ActiveRequest) -> None:
        """Queue a request; ``BackendClosed`` as for :meth:`require_open`."""
        self.require_open()  # before the lock, which another thread may have held at a fork
        with self._arrived:
            self.require_open()
            self.waiting.append(request)
            self._arrived.notify()

    def close(self) -> None:
        """Fail the waiting requests, finish the active ones, and end the thread."""
        self._fail_waiting()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (admitted := self._next()) is not None:
                self._engine.admit(admitted)
                self._engine.step()
        finally:
            self._fail_waiting()
            for request in self._engine.abandon():  # only where the engine raised after all
                request.fail(BackendClosed(_DIED))

    def _next(self) -> list[ActiveRequest] | None:
        """Wait for work; return the requests to admit, or ``None`` at the end."""
        with self._arrived:
            if not self._arrived.wait_for(self._is_due, IDLE_SECONDS):
                disband()  # others compute faster without this thread's team
                self._arrived.wait_for(self._is_due)
            if self._closed and not self._engine.has_work:
                return None
            room = self._max_active - self._engine.active
            return [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]

    def _is_due(self) -> bool:
        return bool(self.waiting) or self._closed or self._engine.has_work

    def _fail_waiting(self) -> None:
        with self._arrived:
            self._closed = True
            abandoned, self.waiting = self.waiting, deque()
            self._arrived.notify()
        for request in abandoned:
            request.fail(BackendClosed(CLOSED))


def _require_safetensors() -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "serving adapters needs safetensors; install it with: pip install 'agentpref[train]'"
        ) from error
