"""Serving through vLLM servers, which run in another process, container or machine.

Prompts are rendered and tokenised here, by the code that training uses, and go to the server as
token ids; answers are decoded here, too. So serving cannot differ from training by a template or
parser of the server. An adapter's name is its revision's id and its path is the registry's folder.
Neither is ever reused, because vLLM's prefix cache is keyed by both. Every check of an adapter runs
before a server loads it.

A server that restarts is empty: the next request for a revision loads it again, checked and probed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import chain, islice
from pathlib import Path
from typing import Any

from agentpref.errors import (
    BackendClosed,
    ConfigError,
    GenerationFailed,
    ProbeFailed,
    ServerUnreachable,
    SwapFailed,
)
from agentpref.home import Home
from agentpref.models.base import find_base, load_tokenizer
from agentpref.models.base_files import read_base
from agentpref.models.decoding import Decoding
from agentpref.models.grammar import AnswerGrammars
from agentpref.models.template import ChatTemplate
from agentpref.models.text_stream import TextStream
from agentpref.serve import watch
from agentpref.serve.backend import (
    CLOSED,
    PROBE,
    Capabilities,
    FinishReason,
    GenerationRequest,
    Reply,
    Revision,
    encode_request,
    read_answer,
    write_grammar,
)
from agentpref.serve.folders import is_revision_id
from agentpref.serve.router import Router
from agentpref.serve.validate import check_revision
from agentpref_adapters._vllm_fleet import PATIENCE_SECONDS, Fleet, Member
from agentpref_adapters._vllm_server import (
    Model,
    NobodyListens,
    NotFinite,
    Piece,
    Server,
    completion_body,
)

__all__ = ["VllmBackend", "has_loaded", "open_router", "servable_template"]

_ASK_SECONDS = 5.0


def open_router(
    home: Home | str | Path | None,
    *urls: str,
    model: str,
    namespace: str = "default",
    follow: float | None = 1.0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    patience: float = PATIENCE_SECONDS,
) -> Router:
    """Serve a home's live revision through running vLLM servers.

    Closing the router closes the backend, too. ``home``, ``namespace`` and ``follow`` are those of
    :func:`agentpref.serve.watch.open_router`, which also says what is raised.

    Args:
        urls: the servers, e.g. ``http://127.0.0.1:8000``; all of them serve ``model``.
        model: the base model, as for ``agentpref.update``; its tokenizer is used here.
        chat_template_kwargs: what its chat template is always given, as in the update's settings.
        patience: seconds for which a request waits while no server answers, as while one restarts.
    """
    return watch.open_router(
        home,
        lambda: VllmBackend(
            *urls, model=model, chat_template_kwargs=chat_template_kwargs, patience=patience
        ),
        namespace=namespace,
        follow=follow,
    )


def has_loaded(place: str, revision_id: str) -> bool | None:
    """Whether the server at a place has a revision loaded; ``None`` if it does not answer.

    :meth:`VllmBackend.capabilities` lists the places. Where no server listens, the answer is
    ``False``.
    """
    with closing(Server(place, timeout=_ASK_SECONDS)) as server:
        try:
            return any(model.name == revision_id for model in server.models())
        except NobodyListens:
            return False
        except ServerUnreachable:
            return None


def servable_template(
    model: str, chat_template_kwargs: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """Load the chat template of a base model, without torch and without a server.

    Raises:
        ConfigError: it does not read one of ``chat_template_kwargs``.
        ModelError: the base cannot be found, or its template cannot be served.
    """
    tokenizer = load_tokenizer(model, find_base(model))
    template = ChatTemplate(tokenizer, chat_template_kwargs)
    template.require_arguments(template.chat_template_kwargs)
    template.require_plain_answers(model)
    return template


class VllmBackend:
    """A serving backend over one or several vLLM servers with the same base model.

    Every request sends all sampling settings, so that temperature 0 gives the likeliest token on
    any server. ``Reply.token_ids`` are all generated tokens, with the end of the turn;
    ``Reply.logprobs`` are the model's own, before temperature and top-p.

    Args:
        urls: the servers, e.g. ``http://127.0.0.1:8000``.
        model: the base model: ``"tiny"``, a folder, or a name on a model hub. Only its tokenizer is
            loaded, and its files are what revisions are checked against.
        adapters_at: the folder in which the servers see the home's ``adapters/``, if they run in a
            container or on another machine.
        max_loras: how many adapters the servers keep loaded, their ``--max-cpu-loras``; ``None``:
            the number that they report for one batch.
        timeout: seconds that an answer, or the next piece of a stream, may take.
        patience: seconds for which a request waits while no server answers, as while one restarts.
            A new backend waits 30 seconds at most.
        key: the servers' API key; ``None``: the one in ``VLLM_API_KEY``, if any.
        chat_template_kwargs: what the base's chat template is always given.

    Raises:
        ConfigError: no server is named, or an address is invalid.
        ModelError: the base cannot be found, or has no chat template.
        ServerUnreachable: no server answers.
        WrongBase: a server has another base.
    """

    def __init__(
        self,
        *urls: str,
        model: str,
        adapters_at: str | None = None,
        max_loras: int | None = None,
        timeout: float = 60.0,
        patience: float = PATIENCE_SECONDS,
        key: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not urls:
            raise ConfigError("no server is named; give its address, e.g. http://127.0.0.1:8000")
        self.base = read_base(model, chat_template_kwargs)
        self._template = servable_template(model, chat_template_kwargs)
        self._grammars = AnswerGrammars(self._template)
        self._decoding = Decoding.read(self._template, self.base.path)
        self._ends = self._decoding.end_tokens
        self._tokenizing = threading.Lock()
        self._max_loras = max_loras
        self._revisions: dict[str, Revision] = {}
        self._closed = False
        self._process = os.getpid()  # a forked child would read answers to its parent
        self._probe_prompt = self._encode(PROBE)
        servers = [Server(url, timeout=timeout, key=key) for url in urls]
        self._places = tuple(sorted({server.place for server in servers}))
        members = [Member(one, self.base, self._ask_probe, adapters_at) for one in servers]
        self._fleet = Fleet(members, patience=patience)
        with ExitStack() as on_failure:
            on_failure.callback(self._fleet.close)
            self._fleet.connect()
            on_failure.pop_all()

    def capabilities(self) -> Capabilities:
        """Streaming; as many revisions as the servers were started for, if that is known."""
        room = self._max_loras
        if not room:  # the least that a server reports, if any does
            reports, _ = self._fleet.reach(lambda member: member.server.max_loras())
            room = min((number for number in reports if number is not None), default=None)
        return Capabilities("vllm", streaming=True, places=self._places, max_loaded=room)

    def validate(self, revision: Revision) -> None:
        """Check a revision's files, digests, tensors and numbers against the base's files."""
        check_revision(revision, base=self.base.identity, layers=self.base.layers)

    def load(self, revision: Revision) -> None:
        """Load a revision into every server that answers.

        Raises:
            SwapFailed: a server refuses it, or has no room; other servers may have loaded it.
        """
        self._require_open()
        name = revision.revision_id
        room = self.capabilities().max_loaded
        others = set(self.list_loaded()) - {name}
        if room is not None and len(others) >= room:
            raise SwapFailed(
                f"{name} does not fit: the servers keep {room} adapters, and have "
                f"{', '.join(sorted(others))}; start them with a larger --max-loras and "
                f"--max-cpu-loras, or pass their number as max_loras"
            )
        self._fleet.everywhere(lambda member: member.load(revision))
        self._revisions[name] = revision

    def probe(self, revision_id: str) -> Reply:
        """Answer one fixed prompt on every server that answers.

        Raises:
            ProbeFailed: a log-probability in an answer is not finite.
        """
        self._require_open()
        revision = self._revisions[revision_id]
        pieces = self._fleet.everywhere(lambda member: member.probe(revision))
        return self._reply(revision_id, PROBE, pieces[0], len(self._probe_prompt))

    def unload(self, revision_id: str, places: Sequence[str] | None = None) -> None:
        """Unload a revision from the servers at some places, or from all of them.

        Raises:
            ServingError: a server refuses or does not answer.
        """
        self._require_open()
        self._revisions.pop(revision_id, None)
        self._fleet.unload(revision_id, self._places if places is None else places)

    def list_loaded(self) -> tuple[str, ...]:
        """Name the revisions that the servers have loaded, for this or another process."""
        self._require_open()
        found, _ = self._fleet.reach(lambda member: member.server.models())
        names = [model.name for models in found for model in models if model.parent is not None]
        return tuple(dict.fromkeys(filter(is_revision_id, names)))

    def generate(self, revision_id: str, request: GenerationRequest) -> Reply:
        """Answer a request with one revision, or ``"base"``.

        Raises:
            ConfigError: no answer fulfils the schemas that it is to be held to.
            GenerationFailed: the revision is not loaded, the prompt does not fit, the model cannot
                call tools, or the server refuses the request.
            ServerUnreachable: no server answered within ``patience``.
        """
        prompt, body = self._bodies(revision_id, request)
        piece = self._fleet.call(lambda member: member.server.complete(body(member)))
        return self._reply(revision_id, request, piece, len(prompt))

    def stream(self, revision_id: str, request: GenerationRequest) -> Iterator[str | Reply]:
        """Yield pieces of text as they come, then the reply; raises as :meth:`generate` does.

        Closing the stream early stops the server, too. A stream that breaks in the middle is not
        repeated, because its first pieces are already out.
        """
        prompt, body = self._bodies(revision_id, request)

        def begin(member: Member) -> tuple[list[Piece], Generator[Piece, None, None]]:
            """Wait for the first piece: a failure before it can be repeated elsewhere."""
            pieces = member.server.stream(body(member))
            return list(islice(pieces, 1)), pieces

        first, rest = self._fleet.call(begin)
        with closing(rest):
            yield from self._read(revision_id, request, chain(first, rest), len(prompt))

    def close(self) -> None:
        """Close the connections; the servers keep running and keep their adapters."""
        self._closed = True
        self._fleet.close()

    def _require_open(self) -> None:
        if self._closed or os.getpid() != self._process:
            raise BackendClosed(CLOSED)

    def _ask_probe(self, server: Server, model: Model) -> Piece:
        try:
            piece = server.complete(completion_body(PROBE, model, self._probe_prompt, self._ends))
        except NotFinite as error:
            raise ProbeFailed(f"{model.name} failed its probe on {server.url}: {error}") from error
        except GenerationFailed as error:
            raise SwapFailed(f"{model.name} could not be probed: {error}") from error
        if not piece.token_ids or not piece.is_finite:
            raise ProbeFailed(
                f"the logprobs of {model.name} on {server.url} are not finite; its training "
                f"diverged, or the server's precision is too low for it"
            )
        return piece

    def _bodies(
        self, revision_id: str, request: GenerationRequest
    ) -> tuple[tuple[int, ...], Callable[[Member], dict[str, object]]]:
        """A prompt, and what makes a revision ready on a server and gives the body of a request."""
        self._require_open()
        revision = self._revisions.get(revision_id)
        prompt = self._encode(request, "" if revision is None else revision.instructions)
        with self._tokenizing:
            grammar = write_grammar(request, self._grammars, self.base.name)
        return prompt, lambda member: completion_body(
            request, member.serving(revision_id, revision), prompt, self._ends, grammar
        )

    def _encode(self, request: GenerationRequest, instructions: str = "") -> tuple[int, ...]:
        with self._tokenizing:
            return encode_request(request, self._template, self.base.name, instructions)

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids as text, without special tokens."""
        with self._tokenizing:
            return self._decoding.decode(tokens)

    def _reply(
        self, revision_id: str, request: GenerationRequest, piece: Piece, prompt_tokens: int
    ) -> Reply:
        items = self._read(revision_id, request, [piece], prompt_tokens)
        return next(item for item in items if isinstance(item, Reply))

    def _read(
        self,
        revision_id: str,
        request: GenerationRequest,
        pieces: Iterable[Piece],
        prompt_tokens: int,
    ) -> Iterator[str | Reply]:
        """Turn the pieces of an answer into text that can no longer change, then the reply."""
        text = TextStream(self.decode, request.stop)
        tokens: list[int] = []
        logprobs: list[float] = []
        reason: FinishReason | None = None
        for piece in pieces:
            if not piece.is_finite:
                raise GenerationFailed(
                    f"{revision_id} gave logprobs of {list(piece.logprobs)}; roll it back"
                )
            tokens += piece.token_ids
            logprobs += [value for value in piece.logprobs if value is not None]
            reason = piece.finish_reason
            if fresh := text.push(*(token for token in piece.token_ids if token not in self._ends)):
                yield fresh
        if rest := text.finish():
            yield rest
        if reason is None:
            raise ServerUnreachable(f"the answer of {revision_id} broke off; ask again")
        message = read_answer(request, text.text)
        yield Reply(revision_id, message, tuple(tokens), tuple(logprobs), reason, prompt_tokens)
