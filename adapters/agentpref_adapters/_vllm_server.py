"""One vLLM server, over HTTP: what it holds, loading, unloading, and continuing token ids.

All of vLLM's wire format is here: paths, fields, and how its failures are told apart. An adapter
that is unknown, runtime updating that is turned off, and a server that is gone all look alike at
first sight, and ask for different cures. Knows nothing of which revision ought to be loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import orjson
from httpx_sse import EventSource, SSEError, connect_sse

from agentpref.errors import (
    BackendClosed,
    ConfigError,
    GenerationFailed,
    ServerUnreachable,
    ServingError,
    SwapFailed,
)
from agentpref.serve.backend import FinishReason, GenerationRequest

# uvicorn drops a connection that was idle for five seconds: one that is about to go is not reused.
_IDLE_SECONDS = 4.0
_CONNECT_SECONDS = 5.0
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_NOT_FOUND = 404
_REFUSALS = range(400, 500)
_BROKEN = 500
# What vLLM answers, with status 400, where a log-probability is NaN: it fails to write it as JSON.
_NOT_A_NUMBER = "Out of range float values"
_MAX_LORAS = "vllm:lora_requests_info"
_UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"


class NotLoaded(ServingError):
    """The server knows no adapter of that name: it was never loaded, or the server restarted."""


class NobodyListens(ServerUnreachable):
    """The machine answers and says that there is no server at the address."""


class Misaddressed(ServerUnreachable):
    """Something answers that is no vLLM server, or does not let us in: waiting changes nothing."""


class Failing(ServerUnreachable):
    """The server answers 500: it is about to die, or the request is what breaks it."""


class TooSlow(ServerUnreachable):
    """The server took longer than it may. It may yet do what it was told."""


class NotFinite(GenerationFailed):
    """The adapter makes the model write numbers that are none."""


class Model(NamedTuple):
    """A line of ``/v1/models``: the base model, or an adapter, which has a ``parent``."""

    name: str
    root: str
    parent: str | None
    max_length: int | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens as they came, their log-probabilities, and why the answer ended, once it has."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    finish_reason: FinishReason | None


class Server:
    """A client of one server; its methods may be called from any thread.

    Args:
        url: e.g. ``http://127.0.0.1:8000``; a ``/v1`` at its end does no harm.
        timeout: seconds that a call, or the next piece of a stream, may take.
        key: the API key, if the server asks for one.

    Raises:
        ConfigError: the URL is none of a server.
    """

    def __init__(self, url: str, *, timeout: float, key: str | None = None) -> None:
        """Prepare a pool of connections; nothing is asked yet."""
        self.url, self.place = _address(url)
        self._busy = 0
        self._counting = threading.Lock()
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS), pool=None),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_SECONDS),
            trust_env=False,  # a proxy meant for the internet must not see prompts on loopback
        )

    @property
    def busy(self) -> int:
        """How many answers are being written for us."""
        return self._busy

    def models(self) -> tuple[Model, ...]:
        """What the server offers: the base model first, then the adapters as they were loaded.

        Raises:
            ServerUnreachable: it does not answer, or is no server of models.
        """
        answer = self._asked("GET", "/v1/models")
        if answer.is_server_error:
            raise self._failing(answer)
        if answer.is_error:
            raise Misaddressed(
                f"{self.url}/v1/models answered {_words(answer)}; check that the address is that "
                f"of a vLLM server, and its API key"
            )
        try:
            return tuple(map(_model, answer.json()["data"]))
        except (KeyError, TypeError, ValueError) as error:
            raise Misaddressed(
                f"{self.url} is no vLLM server: /v1/models answered {answer.text[:80]!r}; check "
                f"the address"
            ) from error

    def max_loras(self) -> int | None:
        """How many adapters fit into one batch, where the server's metrics say so by now."""
        answer = self._asked("GET", "/metrics")
        if answer.is_error:
            return None
        lines = (line for line in answer.text.splitlines() if line.startswith(_MAX_LORAS))
        found = [line.partition('max_lora="')[2].partition('"')[0] for line in lines]
        return next((int(number) for number in found if number.isdigit()), None)

    def load(self, name: str, path: str) -> None:
        """Load an adapter; one that is loaded from the same path stays as it is.

        Raises:
            SwapFailed: the server refuses it; the message says why.
            ServerUnreachable: the server does not answer.
        """
        answer = self._asked(
            "POST", "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path}
        )
        if answer.is_success or self._has(name, path):
            return
        if answer.status_code == _NOT_FOUND and not _error(answer):
            raise SwapFailed(
                f"{self.url} does not load adapters at runtime; start it with --enable-lora and "
                f"with {_UPDATING} in its environment"
            )
        raise SwapFailed(
            f"{self.url} refused to load {name} from {path}: {_words(answer)}; see that the server "
            f"reads that folder, and that its --max-lora-rank is not below the adapter's rank"
        )

    def unload(self, name: str) -> None:
        """Unload an adapter; one that is not loaded is as good as unloaded.

        Raises:
            ServingError: the server refuses to.
            ServerUnreachable: the server does not answer.
        """
        answer = self._asked("POST", "/v1/unload_lora_adapter", json={"lora_name": name})
        if answer.is_error and any(model.name == name for model in self.models()):
            raise ServingError(
                f"{self.url} did not unload {name}: {_words(answer)}; check that it was started "
                f"with {_UPDATING}"
            )

    def complete(self, model: str, prompt: Sequence[int], settings: Mapping[str, Any]) -> Piece:
        """Continue token ids to the end.

        Raises:
            NotLoaded: the server knows no such model.
            GenerationFailed: it refuses the request.
            ServerUnreachable: it is gone, fails, or takes too long.
        """
        body = _body(model, prompt, settings)
        with self._counted():
            answer = self._asked("POST", "/v1/completions", json=body)
        self._check(model, answer)
        return self._piece(_json(answer))

    def stream(
        self, model: str, prompt: Sequence[int], settings: Mapping[str, Any]
    ) -> Generator[Piece, None, None]:
        """Continue token ids, piece by piece; closing the iterator ends it on the server, too.

        Raises:
            NotLoaded: the server knows no such model.
            GenerationFailed: it refuses the request.
            ServerUnreachable: it is gone, fails, or takes too long, be it in the middle.
        """
        body = _body(model, prompt, settings) | {"stream": True}
        with (
            self._counted(),
            self._translated(),
            connect_sse(self._client, "POST", "/v1/completions", json=body) as source,
        ):
            if source.response.is_error:
                source.response.read()
                self._check(model, source.response)
            yield from self._pieces(source)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _pieces(self, source: EventSource) -> Iterator[Piece]:
        for event in source.iter_sse():
            if event.data == "[DONE]":
                return
            yield self._piece(_object(event.data))
        raise ServerUnreachable(f"{self.url} broke off in the middle of an answer; ask again")

    def _piece(self, value: Mapping[str, Any]) -> Piece:
        try:
            choice = value["choices"][0]
            logprobs = (choice["logprobs"] or {}).get("token_logprobs") or ()
            piece = Piece(
                tuple(choice["token_ids"] or ()), tuple(logprobs), choice["finish_reason"]
            )
        except (KeyError, IndexError, TypeError) as error:
            raise self._no_tokens(value) from error
        if piece.finish_reason not in (None, "stop", "length"):  # "abort", when it shuts down
            raise ServerUnreachable(
                f"{self.url} ended an answer with {piece.finish_reason!r}; ask again"
            )
        return piece

    def _no_tokens(self, value: Mapping[str, Any]) -> ServingError:
        """What a piece without tokens means: an error in the middle, or another kind of server."""
        error = value.get("error")
        if isinstance(error, dict):
            kind = GenerationFailed if error.get("code") in _REFUSALS else ServerUnreachable
            return kind(f"{self.url} broke off: {error.get('message')}; look into its log")
        return GenerationFailed(
            f"{self.url} gave no token ids but {str(value)[:80]!r}; use a vLLM whose completions "
            f"take return_token_ids (0.11 or newer)"
        )

    def _has(self, name: str, path: str) -> bool:
        return any(model.name == name and model.root == path for model in self.models())

    def _check(self, model: str, answer: httpx.Response) -> None:
        if answer.is_success:
            return
        if answer.status_code == _NOT_FOUND and _error(answer).get("param") == "model":
            raise NotLoaded(f"{self.url} does not know {model}; load it first")
        if answer.is_server_error:
            raise self._failing(answer)
        if _NOT_A_NUMBER in answer.text:
            raise NotFinite(f"{model} gave a logprob that is not finite; roll it back")
        raise GenerationFailed(f"{self.url} refused the request: {_words(answer)}")

    def _failing(self, answer: httpx.Response) -> ServerUnreachable:
        # 502 and its like are a proxy's words for a server that is gone.
        kind = Failing if answer.status_code == _BROKEN else ServerUnreachable
        return kind(f"{self.url} answered {_words(answer)}; look into the server's log")

    def _asked(self, method: str, path: str, **what: Any) -> httpx.Response:
        with self._translated():
            return self._client.request(method, path, **what)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._counting:
            self._busy += 1
        try:
            yield
        finally:
            with self._counting:
                self._busy -= 1

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
                    f"the connection to {self.url} was closed meanwhile; make a new backend"
                ) from error
            raise
        except (httpx.TransportError, SSEError) as error:
            what = str(error) or type(error).__name__
            kind = NobodyListens if _refused(error) else ServerUnreachable
            raise kind(
                f"{self.url} does not answer ({what}); check that vLLM runs there"
            ) from error


def settings_of(request: GenerationRequest, *, room: int, ends: Sequence[int]) -> dict[str, Any]:
    """A request's settings in vLLM's words.

    All that the server would otherwise take from its own or from the model's defaults is set, so
    that greedy means the likeliest token on any server.
    """
    return {
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
        "stop_token_ids": list(ends),
    }


def _body(model: str, prompt: Sequence[int], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt),
        "logprobs": 0,  # of the tokens written, and of no others
        "return_token_ids": True,
        "add_special_tokens": False,
        **settings,
    }


def _model(line: Mapping[str, Any]) -> Model:
    return Model(line["id"], line["root"], line.get("parent"), line.get("max_model_len"))


def _refused(error: BaseException | None) -> bool:
    """Whether the system refused the connection; httpx wraps that several times over."""
    while error is not None and not isinstance(error, ConnectionRefusedError):
        error = error.__cause__ or error.__context__
    return error is not None


def _address(url: str) -> tuple[str, str]:
    """A server's address, and the name of the place: the same for all names of this machine."""
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.query:
        raise ConfigError(
            f"{url!r} is no server's address; give one like http://127.0.0.1:8000, and the key, "
            f"if there is one, in VLLM_API_KEY"
        )
    begin, end = f"{parts.scheme}://", parts.path.rstrip("/").removesuffix("/v1")
    end = f":{port}{end}" if port else end
    named = f"[{host}]" if ":" in host else host
    return f"{begin}{named}{end}", f"{begin}{'localhost' if host in _LOOPBACK else named}{end}"


def _json(answer: httpx.Response) -> Mapping[str, Any]:
    return _object(answer.text)


def _object(text: str) -> Mapping[str, Any]:
    """A JSON object, or an empty one in the place of what is none."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    return value if isinstance(value, dict) else {}


def _error(answer: httpx.Response) -> Mapping[str, Any]:
    """The error object of vLLM's own answers; what its web server says of itself has none."""
    error = _json(answer).get("error")
    return error if isinstance(error, dict) else {}


def _words(answer: httpx.Response) -> str:
    said = _error(answer).get("message") or answer.text
    return f"{answer.status_code} ({str(said).strip()[:300]})"
