"""Serving through vLLM servers, which run elsewhere: in another process, container or machine.

Prompts are rendered and tokenised here, by the code that training uses, and go to the server as
token ids; what comes back is decoded here, too. So no template or parser of the server's can make
serving differ from training. Adapters go by their revision's id and lie in the registry's folder,
neither of which is ever reused: vLLM's prefix cache is keyed by both, and a reused one serves stale
tokens. All that can be checked of an adapter is checked before a server hears of it.

A server that restarts comes back empty. Nothing watches for that: the request that meets an unknown
adapter has it loaded again, checked and probed, and is then answered. Needs neither vLLM nor torch.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import orjson

from agentpref.errors import (
    BackendClosed,
    ConfigError,
    GenerationFailed,
    ProbeFailed,
    ServerUnreachable,
    SwapFailed,
    WrongBase,
)
from agentpref.home import Home
from agentpref.learn.encode import encode_prompt
from agentpref.models.base import load_tokenizer
from agentpref.models.base_files import read_base
from agentpref.models.text_stream import TextStream
from agentpref.serve.backend import PROBE, Capabilities, GenerationRequest, Reply, Revision
from agentpref.serve.manifest import is_revision_id
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.serve.validate import check_published, check_revision
from agentpref.serve.watch import Watcher
from agentpref.types import Prompt
from agentpref_adapters._vllm_answer import Answer, finite
from agentpref_adapters._vllm_fleet import Fleet
from agentpref_adapters._vllm_member import Handling
from agentpref_adapters._vllm_server import (
    Model,
    NobodyListens,
    NotFinite,
    Piece,
    Server,
    settings_of,
)

__all__ = ["VllmBackend", "has_loaded", "open_router"]

Pieces: TypeAlias = "Generator[Piece, None, None]"

_IDENTITY = ("digest", "template_digest")
_ASKED_IN_PASSING_SECONDS = 5.0


def open_router(
    home: Home | str | Path | None,
    *urls: str,
    base: str,
    namespace: str = "default",
    follow: float | None = 1.0,
) -> Router:
    """Serve a home's live revision through vLLM servers that run already.

    Args:
        home: the home, its folder, or ``None`` for ``AGENTPREF_HOME`` or ``./.agentpref``.
        urls: the servers, e.g. ``http://127.0.0.1:8000``; all of them serve ``base``.
        base: the base model, as for ``agentpref.update``; its tokenizer is used here.
        namespace: whose revisions.
        follow: seconds between two looks at what other processes made live; ``None``: never.

    Raises:
        NotAHome: there is no home in the folder.
        ModelError: the base cannot be found.
        ServerUnreachable: no server answers.
        WrongBase: a server, or what is live, has another base.
        RevisionError: what is live is broken.
    """
    registry = Registry(home, namespace=namespace)
    with ExitStack() as on_failure:
        backend = VllmBackend(*urls, base=base)
        on_failure.callback(backend.close)
        router = Router(registry, backend)
        on_failure.pop_all()
    router.at_close(backend.close)
    if follow is not None:
        Watcher(router, follow)
    return router


def has_loaded(place: str, revision_id: str) -> bool | None:
    """Say whether the server at a place has a revision loaded; ``None`` where it does not say.

    A place is one that :meth:`VllmBackend.capabilities` gives. Where nothing listens, nothing is
    loaded.
    """
    with closing(Server(place, timeout=_ASKED_IN_PASSING_SECONDS, key=_key())) as server:
        try:
            return any(model.name == revision_id for model in server.models())
        except NobodyListens:
            return False
        except ServerUnreachable:
            return None


class VllmBackend:
    """A serving backend over one or several vLLM servers with the same base model.

    Settings that vLLM would take from the model's or its own defaults are sent with each request,
    so that greedy means the likeliest token. ``Reply.token_ids`` are all that was generated, the
    end of turn included; ``Reply.logprobs`` are the model's own, before temperature and top-p.

    Args:
        urls: the servers, e.g. ``http://127.0.0.1:8000``.
        base: the base model: ``"tiny"``, a folder, or a name on a model hub. Only its tokenizer is
            loaded, and its files are what revisions are checked against.
        adapters_at: the folder in which the servers see the home's ``adapters/``, where it is
            another one for them (a container, another machine).
        max_loras: how many adapters the servers hold at a time, their ``--max-cpu-loras``;
            ``None``: as many as they say that they run together.
        timeout: seconds that an answer, or the next piece of a stream, may take.
        patience: seconds for which a request waits while no server answers.
        key: the servers' API key; ``None``: that in ``VLLM_API_KEY``, if any, where vLLM has its.

    Raises:
        ConfigError: no server is named, or an address is none.
        ModelError: the base cannot be found, or has no chat template.
        ServerUnreachable: no server answers.
        WrongBase: a server has another base.
    """

    def __init__(
        self,
        *urls: str,
        base: str,
        adapters_at: str | None = None,
        max_loras: int | None = None,
        timeout: float = 60.0,
        patience: float = 30.0,
        key: str | None = None,
    ) -> None:
        """Read the base's tokenizer, and wait for a server to answer."""
        if not urls:
            raise ConfigError("no server is named; give its address, e.g. http://127.0.0.1:8000")
        self.base = read_base(base)
        self._tokenizer = load_tokenizer(base, self.base.path)
        self._ends = tuple(sorted(_end_tokens(self.base.path, self._tokenizer.eos_token_id)))
        self._tokenizing = threading.Lock()
        self._adapters_at = adapters_at
        self._max_loras = max_loras
        self._closed = False
        self._process = os.getpid()  # a child would answer on its parent's connections
        self._probe_prompt = self._encode(PROBE)
        servers = [Server(url, timeout=timeout, key=key or _key()) for url in urls]
        self._places = tuple(sorted({server.place for server in servers}))
        handling = Handling(self._recognise, check_published, self._path_of, self._ask_probe)
        self._fleet = Fleet(servers, handling, patience=patience)
        with ExitStack() as on_failure:
            on_failure.callback(self._fleet.close)
            self._fleet.greet()
            on_failure.pop_all()

    def capabilities(self) -> Capabilities:
        """Streaming; as many revisions as the servers were started for, where that is known."""
        return Capabilities(
            engine="vllm",
            streaming=True,
            places=self._places,
            max_loaded=self._max_loras or self._fleet.max_loras(),
        )

    def validate(self, revision: Revision) -> None:
        """Check a revision's files, digests, tensors and numbers against the base's files."""
        check_revision(revision, base=self.base.identity, layers=self.base.layers)

    def load(self, revision: Revision) -> None:
        """Load a revision into every server that answers.

        Raises:
            SwapFailed: a server refuses it, or has no room for it; others may have it by then.
            ServerUnreachable: none answers.
        """
        self._require_open()
        self._require_room(revision.revision_id)
        self._fleet.load(revision)

    def probe(self, revision_id: str) -> Reply:
        """Answer one fixed prompt on every server that answers.

        Raises:
            ProbeFailed: an answer held a log-probability that is not finite.
            ServerUnreachable: none answers.
        """
        self._require_open()
        answer = self._answer(revision_id, PROBE)
        answer.take(self._fleet.probe(revision_id))
        return answer.reply()

    def unload(self, revision_id: str, places: Sequence[str] | None = None) -> None:
        """Unload a revision from the servers at some places, or from all of them.

        Raises:
            ServingError: one does not say that it has.
        """
        self._require_open()
        self._fleet.unload(revision_id, self._places if places is None else places)

    def list_loaded(self) -> tuple[str, ...]:
        """Name the revisions that the servers have, whichever process loaded them."""
        self._require_open()
        return tuple(name for name in self._fleet.loaded() if is_revision_id(name))

    def generate(self, revision_id: str, request: GenerationRequest) -> Reply:
        """Answer a request with one revision, or ``"base"``.

        Raises:
            GenerationFailed: the revision is not loaded, the prompt does not fit, or the server
                refuses the request.
            ServerUnreachable: no server answered for as long as patience lasted.
        """
        self._require_open()
        prompt = self._encode(request)
        answer = self._answer(revision_id, request)
        answer.take(
            self._fleet.call(
                revision_id,
                lambda server, model: server.complete(
                    model.name, prompt, self._settings(request, prompt, model)
                ),
            )
        )
        return answer.reply()

    def stream(self, revision_id: str, request: GenerationRequest) -> Iterator[str | Reply]:
        """Yield pieces of text as they are certain, then the reply.

        A stream that is closed early stops the server, too. One that breaks in the middle is not
        begun again: what was said cannot be taken back.

        Raises:
            GenerationFailed: as for :meth:`generate`.
            ServerUnreachable: as for :meth:`generate`, or the server broke off.
        """
        self._require_open()
        prompt = self._encode(request)
        answer = self._answer(revision_id, request)
        first, rest = self._fleet.call(
            revision_id,
            lambda server, model: _begun(
                server.stream(model.name, prompt, self._settings(request, prompt, model))
            ),
        )
        with closing(rest):
            for piece in chain([first], rest):
                if text := answer.take(piece):
                    yield text
        if text := answer.rest():
            yield text
        yield answer.reply()

    def close(self) -> None:
        """Close the connections. The servers keep running, and keep what they have loaded."""
        self._closed = True
        self._fleet.close()

    def _require_open(self) -> None:
        if self._closed or os.getpid() != self._process:
            raise BackendClosed(
                "the backend was closed, or belongs to the process that this one was forked from; "
                "make a new one to go on serving"
            )

    def _require_room(self, name: str) -> None:
        room = self.capabilities().max_loaded
        loaded = {*self.list_loaded(), name}
        if room is not None and len(loaded) > room:
            raise SwapFailed(
                f"{name} does not fit: the servers hold {room} adapters, and have "
                f"{', '.join(sorted(loaded - {name}))}; start them with a larger --max-loras and "
                f"--max-cpu-loras, or say with max_loras how many they hold"
            )

    def _path_of(self, revision: Revision) -> str:
        if self._adapters_at is None:
            return str(revision.path)
        return str(PurePosixPath(self._adapters_at) / revision.revision_id)

    def _recognise(self, server: Server, model: Model) -> None:
        """Refuse a server of another base, as far as that can be told from here."""
        root = Path(model.root)
        if model.root == self.base.name or not root.is_dir() or root.samefile(self.base.path):
            return
        found = read_base(model.root)
        if any(found.identity[key] != self.base.identity[key] for key in _IDENTITY):
            raise WrongBase(
                f"{server.url} serves {model.root}, whose weights, tokenizer or template are not "
                f"those of {self.base.name!r}; give the base that it serves"
            )

    def _ask_probe(self, server: Server, model: Model) -> Piece:
        settings = self._settings(PROBE, self._probe_prompt, model)
        try:
            piece = server.complete(model.name, self._probe_prompt, settings)
        except NotFinite as error:
            raise ProbeFailed(f"{model.name} failed its probe on {server.url}: {error}") from error
        except GenerationFailed as error:
            raise SwapFailed(f"{model.name} could not be probed: {error}") from error
        if not piece.token_ids or not finite(piece):
            raise ProbeFailed(
                f"{model.name} answers nothing finite on {server.url}; its training diverged, or "
                f"the server's precision is too low for it"
            )
        return piece

    def _settings(
        self, request: GenerationRequest, prompt: Sequence[int], model: Model
    ) -> dict[str, object]:
        longest = model.max_length or math.inf
        room = int(min(request.max_tokens, longest - len(prompt)))
        if room < 1:
            raise GenerationFailed(
                f"the prompt has {len(prompt)} tokens, the server takes {longest}; shorten it, or "
                f"start the server with a larger --max-model-len"
            )
        return settings_of(request, room=room, ends=self._ends)

    def _encode(self, request: GenerationRequest) -> tuple[int, ...]:
        from jinja2 import TemplateError

        try:
            with self._tokenizing:
                return encode_prompt(Prompt("", request.messages, request.tools), self._tokenizer)
        except (TemplateError, TypeError) as error:
            raise GenerationFailed(
                f"the chat template of {self.base.name!r} does not render the messages "
                f"({type(error).__name__}: {error}); check their roles and contents"
            ) from error

    def _decode(self, tokens: Sequence[int]) -> str:
        with self._tokenizing:
            return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _answer(self, revision_id: str, request: GenerationRequest) -> Answer:
        text = TextStream(self._decode, request.stop)
        return Answer(revision_id, len(request.messages), text, frozenset(self._ends))


def _begun(pieces: Pieces) -> tuple[Piece, Pieces]:
    """Wait for the first piece: what fails before it can be tried again elsewhere."""
    for first in pieces:
        return first, pieces
    raise ServerUnreachable("a server ended an answer before it began; ask again")


def _end_tokens(folder: Path, tokenizers: int | None) -> frozenset[int]:
    """The tokens that end a turn: the tokenizer's, and those of the model's generation settings."""
    ends: set[int | None] = {tokenizers}
    file = folder / "generation_config.json"
    if file.is_file():
        configured = orjson.loads(file.read_bytes()).get("eos_token_id")
        ends.update(configured if isinstance(configured, list) else [configured])
    return frozenset(int(token) for token in ends if token is not None)


def _key() -> str | None:
    return os.environ.get("VLLM_API_KEY") or None
