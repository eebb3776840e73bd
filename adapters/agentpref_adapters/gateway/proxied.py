"""An upstream that is another server: any that speaks OpenAI's chat completions.

Its answers are passed on as they come, piece by piece. Its key stays here, and nothing of it is
reachable but chat completions and the list of models.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
from aiohttp.http_exceptions import LineTooLong
from yarl import URL

from agentpref.errors import ConfigError
from agentpref_adapters._http import (
    BAD_GATEWAY,
    TOO_SLOW,
    HttpError,
)
from agentpref_adapters.gateway.asked import Asked
from agentpref_adapters.gateway.upstream import Exchange, Tokens

_CONNECT_SECONDS = 10.0
_UNAUTHORIZED, _UNAVAILABLE = 401, 503
_PASSED_ON = frozenset({*range(400, 500), _UNAVAILABLE}) - {_UNAUTHORIZED, 403}
_REDIRECTS = range(300, 400)
_LONGEST_MESSAGE = 500
_EVENTS = "text/event-stream"
_DONE = b"[DONE]"
_LONGEST_LINE = 4 << 20
"""The most bytes of a piece of a stream: some servers send a whole tool call as one."""


class Proxied:
    """Asks an OpenAI-compatible server.

    Args:
        url: its base, with the ``/v1`` if it has one.
        key: its API key, if it wants one.
        timeout: seconds that an answer, or the next piece of a stream, may take.
        model: what to ask for where the app names no model.
        connections: how many calls it may have at once.

    Raises:
        ConfigError: ``url`` is no address of a server.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout: float = 120.0,
        model: str | None = None,
        connections: int = 256,
    ) -> None:
        self._model, self._timeout, self._connections = model, timeout, connections
        try:
            self.url = URL(url.rstrip("/"))
        except ValueError as error:
            raise _no_address(url) from error
        if self.url.scheme not in ("http", "https") or not self.url.host:
            raise _no_address(url)
        self._shown = str(self.url.with_user(None))  # a password is not shown
        if key is not None:
            self.url = self.url.with_user(None)
        self._key = key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._opened: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        """Close the connections."""
        if self._opened is not None:
            await self._opened.close()

    @asynccontextmanager
    async def admit(self, asked: Asked, *, streaming: bool) -> AsyncIterator[Exchange]:
        """Send the request; a refusal comes back with the server's own status and message."""
        body = {**asked.body, "stream": streaming}
        body["model"] = body.get("model") or self._model
        if not streaming:
            body.pop("stream_options", None)
        with _translated(self._shown):
            response = await self._session().post(
                self.url / "chat/completions",
                data=orjson.dumps({key: value for key, value in body.items() if value is not None}),
                headers={"Content-Type": "application/json"},
                allow_redirects=False,
            )
        try:
            if not _succeeded(response):
                with _translated(self._shown):
                    content = await response.read()
                raise self._refusal(response, content)
            if streaming and response.content_type != _EVENTS:
                raise HttpError(
                    BAD_GATEWAY,
                    f"{self._shown} answered with {response.content_type}, which is no stream; "
                    "check its address",
                    code="bad_upstream",
                )
            yield _Proxying(response, self._shown)
        finally:
            if not response.content.at_eof():
                response.close()  # which ends the work behind
            response.release()

    async def models(self) -> list[dict[str, Any]]:
        """The server's own list."""
        response, content = await self._get_models(self._timeout)
        if not _succeeded(response):
            raise self._refusal(response, content)
        data = _object(content, self._shown).get("data")
        return [one for one in data if isinstance(one, dict)] if isinstance(data, list) else []

    async def problem(self) -> str | None:
        """Whether it can be reached at all; its status does not matter."""
        try:
            await self._get_models(_CONNECT_SECONDS)
        except HttpError as error:
            return error.message
        return None

    async def _get_models(self, seconds: float) -> tuple[aiohttp.ClientResponse, bytes]:
        limit = aiohttp.ClientTimeout(total=seconds)
        with _translated(self._shown):
            async with self._session().get(
                self.url / "models", timeout=limit, allow_redirects=False
            ) as response:
                return response, await response.read()

    def _refusal(self, response: aiohttp.ClientResponse, content: bytes) -> HttpError:
        """The server's refusal; that it does not know our key is no fault of the app's."""
        status, error = response.status, _error(content)
        message = str(error.get("message") or "")[:_LONGEST_MESSAGE]
        if self._key:
            message = message.replace(self._key, "…")
        if status == _UNAUTHORIZED:
            message = "refuses the gateway's key (status 401); set AGENTPREF_UPSTREAM_KEY"
        elif status in _REDIRECTS:
            where = response.headers.get("location", "another address")[:_LONGEST_MESSAGE]
            message = f"redirects to {where}; start the gateway with that --upstream"
        elif not message or status not in _PASSED_ON:
            message = f"answered with status {status}" + (f": {message}" if message else "")
        is_passed = status in _PASSED_ON
        code, param = error.get("code"), error.get("param")
        return HttpError(
            status if is_passed else BAD_GATEWAY,
            message if is_passed else f"{self._shown} {message}",
            param=param if isinstance(param, str) else None,
            code=code if isinstance(code, str) and is_passed else "upstream_refused",
            headers={k: v for k, v in response.headers.items() if k.lower() == "retry-after"},
        )

    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:  # it belongs to the loop that is running now
            self._opened = aiohttp.ClientSession(
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=_CONNECT_SECONDS, sock_read=self._timeout
                ),
                connector=aiohttp.TCPConnector(limit=self._connections),
                cookie_jar=aiohttp.DummyCookieJar(),  # callers share nothing
                read_bufsize=_LONGEST_LINE // 2,
                trust_env=True,
            )
        return self._opened


def _no_address(url: str) -> ConfigError:
    return ConfigError(
        f"the upstream is {url[:200]!r}; give its address, with http:// or https:// and its /v1"
    )


class _Proxying:
    """One answer of the server."""

    revision: str | None = None

    def __init__(self, response: aiohttp.ClientResponse, url: str) -> None:
        self._response, self._url = response, url

    async def whole(self) -> dict[str, Any]:
        with _translated(self._url):
            content = await self._response.read()
        found = _object(content, self._url)
        if not isinstance(found.get("choices"), list):
            raise HttpError(BAD_GATEWAY, f"{self._url} gave no choices", code="bad_upstream")
        return found

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        has_ended = False
        with _translated(self._url):
            async for data in _events(self._response):
                if data == _DONE:
                    return
                piece = _object(data, self._url)
                if isinstance(piece.get("error"), Mapping):
                    message = str(piece["error"].get("message", ""))[:_LONGEST_MESSAGE]
                    raise HttpError(BAD_GATEWAY, message, code="upstream_error")
                has_ended = has_ended or _ends(piece)
                yield piece
        if not has_ended:  # some servers close the connection instead of saying [DONE]
            raise HttpError(
                BAD_GATEWAY, f"the stream of {self._url} broke off; ask again", code="broken_stream"
            )

    def tokens(self, index: int) -> Tokens | None:
        return None


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of server-sent events (WHATWG HTML, section 9.2), whose other fields say nothing.

    Raises:
        HttpError: a line is too long to keep.
    """
    data: list[bytes] = []
    try:
        async for line in response.content:
            said = line.rstrip(b"\r\n")
            if said.startswith(b"data:"):
                data.append(said.removeprefix(b"data:").removeprefix(b" "))
            elif not said and data:
                yield b"\n".join(data)
                data = []
    except (LineTooLong, ValueError) as error:  # the second before aiohttp 3.14
        raise HttpError(
            BAD_GATEWAY, f"a piece has more than {_LONGEST_LINE:,} bytes", code="bad_upstream"
        ) from error
    if data:  # some servers leave out the last empty line
        yield b"\n".join(data)


def _succeeded(response: aiohttp.ClientResponse) -> bool:
    return 200 <= response.status < 300


class _translated:  # noqa: N801
    """Turns aiohttp's errors into ours; what they quote of a request is left out."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            raise HttpError(
                BAD_GATEWAY,
                f"{self._url} cannot be reached; see that it runs",
                code="upstream_unreachable",
            ) from error
        if isinstance(error, asyncio.TimeoutError | TimeoutError):
            raise HttpError(
                TOO_SLOW, f"{self._url} did not answer in time", code="upstream_timeout"
            ) from error
        if isinstance(error, aiohttp.ClientError):
            raise HttpError(
                BAD_GATEWAY,
                f"{self._url} broke off ({type(error).__name__}); ask again",
                code="upstream_error",
            ) from error


def _ends(piece: Mapping[str, Any]) -> bool:
    choices = piece.get("choices")
    found = choices if isinstance(choices, list) else []
    return any(isinstance(one, Mapping) and one.get("finish_reason") for one in found)


def _error(content: bytes) -> Mapping[str, Any]:
    """What a refusal says, in OpenAI's shape, or as much of it as there is."""
    try:
        found = orjson.loads(content)
    except ValueError:
        return {}  # HTML, say
    error = found.get("error") if isinstance(found, dict) else None
    return error if isinstance(error, dict) else {"message": error or ""}


def _object(content: bytes | str, url: str) -> dict[str, Any]:
    try:
        found = orjson.loads(content)
    except ValueError as error:
        raise HttpError(
            BAD_GATEWAY, f"{url} answered with no JSON; check its address", code="bad_upstream"
        ) from error
    if not isinstance(found, dict):
        raise HttpError(BAD_GATEWAY, f"{url} answered with no JSON object", code="bad_upstream")
    return found
