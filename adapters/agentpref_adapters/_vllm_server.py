"""One vLLM server over HTTP: list, load and unload adapters, and continue token ids.

This module holds all of vLLM's wire format: paths, fields, and how its failures are told apart. An
unknown adapter, runtime updating that is turned off, and a server that is gone look alike at first
and need different cures.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from agentpref.errors import (
    BackendClosed,
    ConfigError,
    GenerationFailed,
    MissingDependency,
    ServerUnreachable,
    ServingError,
    SwapFailed,
)
from agentpref.serve.backend import FinishReason, GenerationRequest

try:
    import httpx
    from httpx_sse import SSEError, connect_sse
except ImportError as error:
    raise MissingDependency(
        f"serving through vLLM needs {error.name}; install it with: pip install 'agentpref[vllm]'"
    ) from error

# uvicorn drops a connection that was idle for five seconds: one that is about to go is not reused.
_IDLE_SECONDS = 4.0
_CONNECT_SECONDS = 5.0
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_NOT_FOUND = 404
_REFUSALS = range(400, 500)
_BROKEN = 500
# The message of vLLM's status 400 for a log-probability that is NaN, which JSON cannot hold.
_NOT_A_NUMBER = "Out of range float values"
_MAX_LORAS = re.compile(r'^vllm:lora_requests_info.*\bmax_lora="(\d+)"', re.MULTILINE)
_UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"


class NotLoaded(ServingError):
    """The server has no adapter of that name: it was never loaded, or the server restarted."""


class NobodyListens(ServerUnreachable):
    """The machine refuses the connection: no server listens at the address."""


class Misaddressed(ServerUnreachable):
    """Another kind of server answers, or the API key is wrong: waiting does not help."""


class Failing(ServerUnreachable):
    """The server answers 500: it is about to die, or the request breaks it."""


class TooSlow(ServerUnreachable):
    """The server exceeded the timeout; it may still carry out the request."""


class NotFinite(GenerationFailed):
    """The adapter makes the model write infinite or NaN log-probabilities."""


class Model(NamedTuple):
    """A line of ``/v1/models``: the base model, or an adapter, which has a ``parent``."""

    name: str
    root: str
    parent: str | None
    max_length: int | None


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: tokens, their log-probabilities, and why the answer ended, if it did."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    finish_reason: FinishReason | None

    @property
    def is_finite(self) -> bool:
        """Whether each token has a log-probability that is finite."""
        return len(self.logprobs) == len(self.token_ids) and all(
            value is not None and math.isfinite(value) for value in self.logprobs
        )


class Server:
    """A client of one server, for any thread. Without an answer it raises ``ServerUnreachable``.

    A ``/v1`` at the end of ``url`` is ignored. ``timeout`` is the seconds that a call, or the next
    piece of a stream, may take. ``key`` is the server's API key; ``None``: that in
    ``VLLM_API_KEY``, if any.
    """

    def __init__(self, url: str, *, timeout: float, key: str | None = None) -> None:
        self.url, self.place = _address(url)
        self.busy = 0  # how many answers this client waits for
        key = _key(key or os.environ.get("VLLM_API_KEY") or "")
        self._counting = threading.Lock()
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS), pool=None),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_SECONDS),
            trust_env=False,  # a proxy meant for the internet must not see prompts on loopback
        )

    def is_ready(self) -> bool:
        """Whether the server answers requests."""
        try:
            return self._asked("GET", "/health").is_success
        except ServerUnreachable:
            return False

    def models(self) -> tuple[Model, ...]:
        """The base model, then the adapters in the order they were loaded."""
        answer = self._asked("GET", "/v1/models")
        if answer.is_server_error:
            raise self._failing(answer)
        if answer.is_error:
            raise Misaddressed(
                f"{self.url}/v1/models answered {_quoted(answer)}; check that the address is that "
                f"of a vLLM server, and its API key"
            )
        try:
            return tuple(
                Model(line["id"], line["root"], line.get("parent"), line.get("max_model_len"))
                for line in answer.json()["data"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Misaddressed(
                f"{self.url} is no vLLM server: /v1/models answered {answer.text[:80]!r}; check "
                f"the address"
            ) from error

    def max_loras(self) -> int | None:
        """How many adapters fit into one batch, if the server's metrics say so already."""
        answer = self._asked("GET", "/metrics")
        found = None if answer.is_error else _MAX_LORAS.search(answer.text)
        return int(found[1]) if found else None

    def load(self, name: str, path: str) -> None:
        """Load an adapter, unless it is loaded from the same path; ``SwapFailed`` if refused."""
        body = {"lora_name": name, "lora_path": path}
        answer = self._asked("POST", "/v1/load_lora_adapter", json=body)
        if answer.is_success or any(m.name == name and m.root == path for m in self.models()):
            return
        if answer.status_code == _NOT_FOUND and not _error(answer):
            raise SwapFailed(
                f"{self.url} does not load adapters at runtime; start it with --enable-lora and "
                f"with {_UPDATING} in its environment"
            )
        raise SwapFailed(
            f"{self.url} refused to load {name} from {path}: {_quoted(answer)}; check that the "
            f"server can read that folder, and that its --max-lora-rank is at least the adapter's "
            f"rank"
        )

    def unload(self, name: str) -> None:
        """Unload an adapter, unless it is not loaded; ``ServingError`` if the server refuses."""
        answer = self._asked("POST", "/v1/unload_lora_adapter", json={"lora_name": name})
        if answer.is_error and any(model.name == name for model in self.models()):
            raise ServingError(
                f"{self.url} did not unload {name}: {_quoted(answer)}; check that it was started "
                f"with {_UPDATING}"
            )

    def complete(self, body: Mapping[str, Any]) -> Piece:
        """Send a :func:`completion_body`; ``NotLoaded`` or ``GenerationFailed`` if refused."""
        with self._counted():
            answer = self._asked("POST", "/v1/completions", json=body)
        self._check(body["model"], answer)
        return self._piece(_object(answer.text))

    def stream(self, body: Mapping[str, Any]) -> Generator[Piece, None, None]:
        """As :meth:`complete`, piece by piece; closing the iterator stops the server, too."""
        body = {**body, "stream": True}
        with (
            self._counted(),
            self._translated(),
            connect_sse(self._client, "POST", "/v1/completions", json=body) as source,
        ):
            if source.response.is_error:
                source.response.read()
                self._check(body["model"], source.response)
            for event in source.iter_sse():
                if event.data == "[DONE]":
                    return
                yield self._piece(_object(event.data))
            raise ServerUnreachable(f"{self.url} broke off in the middle of an answer; ask again")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _piece(self, value: Mapping[str, Any]) -> Piece:
        try:
            choice = value["choices"][0]
            logprobs = (choice["logprobs"] or {}).get("token_logprobs") or ()
            tokens = tuple(choice["token_ids"] or ())
            piece = Piece(tokens, tuple(logprobs), choice["finish_reason"])
        except (KeyError, IndexError, TypeError) as error:
            said = value.get("error")
            if isinstance(said, dict):
                kind = GenerationFailed if said.get("code") in _REFUSALS else ServerUnreachable
                raise kind(f"{self.url} broke off: {said.get('message')}; see its log") from error
            raise GenerationFailed(
                f"{self.url} sent no token ids but {sorted(value)[:9]}; use vLLM 0.11 or newer, "
                f"whose completions take return_token_ids"
            ) from error
        if piece.finish_reason not in (None, "stop", "length"):  # "abort", when it shuts down
            raise ServerUnreachable(
                f"{self.url} ended an answer with {piece.finish_reason!r}; ask again"
            )
        return piece

    def _check(self, model: str, answer: httpx.Response) -> None:
        if answer.is_success:
            return
        if answer.status_code == _NOT_FOUND and _error(answer).get("param") == "model":
            raise NotLoaded(f"{self.url} does not have {model}; load it first")
        if answer.is_server_error:
            raise self._failing(answer)
        if _NOT_A_NUMBER in answer.text:
            raise NotFinite(f"{model} gave a logprob that is not finite; roll it back")
        raise GenerationFailed(f"{self.url} refused the request: {_quoted(answer)}")

    def _failing(self, answer: httpx.Response) -> ServerUnreachable:
        # With 502 and the like, a proxy says that the server is gone.
        kind = Failing if answer.status_code == _BROKEN else ServerUnreachable
        return kind(f"{self.url} answered {_quoted(answer)}; see the server's log")

    def _asked(self, method: str, path: str, **what: Any) -> httpx.Response:
        with self._translated():
            return self._client.request(method, path, **what)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._counting:
            self.busy += 1
        try:
            yield
        finally:
            with self._counting:
                self.busy -= 1

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.ReadTimeout as error:
            seconds = self._client.timeout.read
            raise TooSlow(
                f"{self.url} gave no answer in {seconds:g} seconds; ask for fewer tokens, or give "
                f"a longer timeout"
            ) from error
        except RuntimeError as error:
            if self._client.is_closed:
                raise BackendClosed(
                    f"the connection to {self.url} was closed; make a new backend"
                ) from error
            raise
        except (httpx.TransportError, SSEError) as error:
            what = str(error) or type(error).__name__
            kind = NobodyListens if _refused(error) else ServerUnreachable
            raise kind(
                f"{self.url} does not answer ({what}); check that vLLM runs there"
            ) from error


def completion_body(
    request: GenerationRequest,
    model: Model,
    prompt: Sequence[int],
    ends: Collection[int],
    grammar: str | None = None,
) -> dict[str, Any]:
    """The body of a completion request; ``GenerationFailed`` if the prompt does not fit.

    It sets everything that the server would take from its own or the model's defaults, so that
    temperature 0 gives the likeliest token on any server. The server's own end tokens are among
    ``ends``; a stop string is searched in the text that is read here, without special tokens.
    """
    longest = model.max_length or math.inf
    room = int(min(request.max_tokens, longest - len(prompt)))
    if room < 1:
        raise GenerationFailed(
            f"the prompt has {len(prompt)} tokens, the server takes {longest}; shorten it, or "
            f"start the server with a larger --max-model-len"
        )
    held = {} if grammar is None else {"structured_outputs": {"grammar": grammar}}
    return held | {
        "model": model.name,
        "prompt": list(prompt),
        "add_special_tokens": False,
        "logprobs": 0,  # of the tokens written only
        "return_token_ids": True,
        "max_tokens": room,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": request.seed,
        "stop": list(request.stop),
        "stop_token_ids": sorted(ends),
        "ignore_eos": False,
        "min_tokens": 0,
        "skip_special_tokens": True,
    }


def _refused(error: BaseException | None) -> bool:
    """Whether the system refused the connection; httpx wraps that error several times."""
    while error is not None and not isinstance(error, ConnectionRefusedError):
        error = error.__cause__ or error.__context__
    return error is not None


def _address(url: str) -> tuple[str, str]:
    """A server's address, and its place: the address with one name for this machine."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL("")
    if parts.scheme not in ("http", "https") or not parts.host or parts.userinfo or parts.query:
        raise ConfigError(
            f"{_without_secrets(url)!r} is not the address of a server; give one like "
            "http://127.0.0.1:8000, and an API key in VLLM_API_KEY"
        )
    parts = parts.copy_with(path=parts.path.rstrip("/").removesuffix("/v1"))
    place = parts.copy_with(host="localhost") if parts.host in LOOPBACK else parts
    return str(parts).rstrip("/"), str(place).rstrip("/")


def _without_secrets(url: str) -> str:
    """An address as a message may show it: what stands before an ``@`` is a password, or may be."""
    scheme, mark, rest = url.rpartition("://")
    _, at, host = rest.rpartition("@")
    return f"{scheme}{mark}[…]@{host}" if at else url


def _key(key: str) -> str:
    """An API key as a header takes it, without the line's end that a file of secrets has."""
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"the API key (of {len(key)} characters) has some that no HTTP header holds; check the "
            "argument key, or VLLM_API_KEY"
        )
    return key


def _object(text: str) -> Mapping[str, Any]:
    """Read a JSON object; anything else gives an empty one."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    return value if isinstance(value, dict) else {}


def _error(answer: httpx.Response) -> Mapping[str, Any]:
    """The error object of an answer of vLLM; answers of its web server have none."""
    error = _object(answer.text).get("error")
    return error if isinstance(error, dict) else {}


def _quoted(answer: httpx.Response) -> str:
    said = _error(answer).get("message") or answer.text
    return f"{answer.status_code} ({str(said).strip()[:300]})"
