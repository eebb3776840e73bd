"""An upstream that is another server: any that speaks OpenAI's chat completions.

Its answers are passed on as they come, piece by piece. Its key stays here, and nothing of it is
reachable but chat completions and the list of models.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson
from httpx_sse import EventSource, SSEError

from agentpref.errors import ConfigError
from agentpref_adapters._http import (
    BAD_GATEWAY,
    TOO_SLOW,
    HttpError,
)
from agentpref_adapters.gateway.asked import Asked
from agentpref_adapters.gateway.upstream import Exchange, Tokens

_CONNECT_SECONDS = 10.0
_PASSED_ON = range(400, 500)
_UNAUTHORIZED = (401, 403)
_LONGEST_MESSAGE = 500
_DONE = "[DONE]"


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
        self.url, self._model = url.rstrip("/"), model
        try:
            address = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise _no_address(url) from error
        if address.scheme not in ("http", "https") or not address.host:
            raise _no_address(url)
        self._shown = str(address.copy_with(userinfo=b""))  # a password is not shown
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    @asynccontextmanager
    async def admit(self, asked: Asked, *, streaming: bool) -> AsyncIterator[Exchange]:
        """Send the request; a refusal comes back with the server's own status and message."""
        body = {**asked.body, "stream": streaming}
        body["model"] = body.get("model") or self._model
        if not streaming:
            body.pop("stream_options", None)
        request = self._client.build_request(
            "POST",
            f"{self.url}/chat/completions",
            content=orjson.dumps({key: value for key, value in body.items() if value is not None}),
            headers={"Content-Type": "application/json"},
        )
        with _translated(self._shown):
            response = await self._client.send(request, stream=True)
        try:
            if not response.is_success:
                with _translated(self._shown):
                    await response.aread()
                raise _refusal(response, self._shown)
            yield _Proxying(response, self._shown)
        finally:
            await response.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """The server's own list."""
        with _translated(self._shown):
            response = await self._client.get(f"{self.url}/models")
        if not response.is_success:
            raise _refusal(response, self._shown)
        data = _object(response.content, self._shown).get("data")
        return [one for one in data if isinstance(one, dict)] if isinstance(data, list) else []

    async def problem(self) -> str | None:
        """Whether it can be reached at all; its status does not matter."""
        try:
            with _translated(self._shown):
                await self._client.get(f"{self.url}/models", timeout=_CONNECT_SECONDS)
        except HttpError as error:
            return error.message
        return None


def _no_address(url: str) -> ConfigError:
    return ConfigError(
        f"the upstream is {url[:200]!r}; give its address, with http:// or https:// and its /v1"
    )


class _Proxying:
    """One answer of the server."""

    revision: str | None = None

    def __init__(self, response: httpx.Response, url: str) -> None:
        self._response, self._url = response, url

    async def whole(self) -> dict[str, Any]:
        with _translated(self._url):
            content = await self._response.aread()
        found = _object(content, self._url)
        if not isinstance(found.get("choices"), list):
            raise HttpError(BAD_GATEWAY, f"{self._url} gave no choices", code="bad_upstream")
        return found

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        done = False
        with _translated(self._url):
            async for event in EventSource(self._response).aiter_sse():
                if event.data == _DONE:
                    done = True
                    break
                piece = _object(event.data, self._url)
                if isinstance(piece.get("error"), Mapping):
                    message = str(piece["error"].get("message", ""))[:_LONGEST_MESSAGE]
                    raise HttpError(BAD_GATEWAY, message, code="upstream_error")
                yield piece
        if not done:
            raise HttpError(
                BAD_GATEWAY, f"the stream of {self._url} broke off; ask again", code="broken_stream"
            )

    def tokens(self, index: int) -> Tokens | None:
        return None


class _translated:  # noqa: N801
    """Turns httpx's errors into ours; what they quote of a request is left out."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, httpx.ConnectTimeout | httpx.ConnectError):
            raise HttpError(
                BAD_GATEWAY,
                f"{self._url} cannot be reached; see that it runs",
                code="upstream_unreachable",
            ) from error
        if isinstance(error, httpx.TimeoutException):
            raise HttpError(
                TOO_SLOW, f"{self._url} did not answer in time", code="upstream_timeout"
            ) from error
        if isinstance(error, httpx.HTTPError | SSEError):
            raise HttpError(
                BAD_GATEWAY,
                f"{self._url} broke off ({type(error).__name__}); ask again",
                code="upstream_error",
            ) from error


def _refusal(response: httpx.Response, url: str) -> HttpError:
    """The server's refusal; that it does not know our key is no fault of the app's."""
    status, message = response.status_code, ""
    try:
        error = orjson.loads(response.content).get("error")
        message = str(error.get("message") if isinstance(error, dict) else error or "")
    except (ValueError, AttributeError):
        pass  # HTML, say
    message = message[:_LONGEST_MESSAGE] or f"{url} answered with status {status}"
    if status in _UNAUTHORIZED:
        message = f"{url} refuses the gateway's key (status {status}); set the upstream's key"
    headers = {k: v for k, v in response.headers.items() if k.lower() == "retry-after"}
    passed = status in _PASSED_ON and status not in _UNAUTHORIZED
    return HttpError(
        status if passed else BAD_GATEWAY, message, code="upstream_refused", headers=headers
    )


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
