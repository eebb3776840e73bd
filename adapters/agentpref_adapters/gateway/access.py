"""Who may use a gateway: apps by their keys, and pages of users by signed tokens.

Without any key a gateway serves this machine only, and one namespace. A token is for one run and
ends by itself: a page may hold it where everybody can read it.
"""

from __future__ import annotations

import base64
import ipaddress
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from itsdangerous import BadSignature, SignatureExpired, URLSafeTimedSerializer
from limits import parse as parse_rate
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from starlette.requests import Request

from agentpref_adapters._http import FORBIDDEN, TOO_MANY, UNAUTHORIZED, HttpError
from agentpref_adapters.gateway.keys import PREFIX, Keys

_SALT = "agentpref feedback"
_TOKEN = "fbt."
"""How tokens begin."""


class App(NamedTuple):
    """An app that asks: the name of its key, and the namespace that the key speaks for."""

    name: str
    namespace: str


class Judge(NamedTuple):
    """The bearer of a token: the run that it may judge, in which namespace, and as whom."""

    namespace: str
    run_id: str
    user_id: str | None


class Access:
    """Tells who asks.

    Args:
        keys: the home's keys.
        namespace: whose a request without a key is, while there are no keys.
        origins: the pages that may ask from a browser.
        token_seconds: how long a token is good.
        token_rate: how often one address may judge by tokens, such as ``"30/minute"``.
    """

    def __init__(
        self,
        keys: Keys,
        *,
        namespace: str = "default",
        origins: Sequence[str] = (),
        token_seconds: int = 3600,
        token_rate: str = "30/minute",
    ) -> None:
        self._keys, self._namespace, self._origins = keys, namespace, frozenset(origins)
        self._seconds = token_seconds
        self._had_keys = bool(keys.list())
        self._rate, self._limiter = parse_rate(token_rate), MovingWindowRateLimiter(MemoryStorage())

    def app(self, request: Request) -> App:
        """The app that asks.

        Raises:
            HttpError: 401 without a key where one is needed, or with a wrong one; 403 from a page
                that may not ask.
        """
        self._require_origin(request)
        given = _credential(request)
        key = self._keys.find(given) if given else None
        if key is not None:
            return App(key.name, key.namespace)
        # The last key that is removed opens nothing, and who is not here needs one always.
        self._had_keys = self._had_keys or bool(self._keys.list())
        if given.startswith(f"{PREFIX}-") or self._had_keys or not _is_here(request):
            raise HttpError(
                UNAUTHORIZED,
                "the API key is wrong" if given else "an API key is needed; send it as a bearer",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        _require_own_name(request)
        return App("", self._namespace)  # clients send some key even where none is needed

    async def judge(self, request: Request) -> App | Judge:
        """The app, or the bearer of a token, that judges.

        Raises:
            HttpError: as for :meth:`app`; 401 for a token that is expired or was not signed here,
                429 for too many of one address.
        """
        given = _credential(request)
        if not given.startswith(_TOKEN):
            return self.app(request)
        self._require_origin(request)
        client = request.client.host if request.client else ""
        if not await self._limiter.hit(self._rate, client):
            raise HttpError(
                TOO_MANY, "too much feedback; try again later", headers={"Retry-After": "60"}
            )
        try:
            namespace, run_id, user_id, _ = self._serializer().loads(
                given[len(_TOKEN) :], max_age=self._seconds
            )
        except SignatureExpired as error:
            raise HttpError(
                UNAUTHORIZED, "the token has expired; ask for a new one", code="token_expired"
            ) from error
        except (BadSignature, ValueError) as error:
            raise HttpError(UNAUTHORIZED, "this is no token", code="invalid_token") from error
        return Judge(namespace, run_id, user_id)

    def token(self, app: App, run_id: str, user_id: str | None = None) -> str:
        """A token with which a page may judge one run of an app."""
        payload = [app.namespace, run_id, user_id, secrets.token_hex(4)]
        return _TOKEN + str(self._serializer().dumps(payload))

    @property
    def namespace(self) -> str:
        """Whose a request without a key is."""
        return self._namespace

    @property
    def token_seconds(self) -> int:
        """How long a token is good."""
        return self._seconds

    def _serializer(self) -> URLSafeTimedSerializer:
        return URLSafeTimedSerializer(self._keys.secret(), salt=_SALT)

    def _require_origin(self, request: Request) -> None:
        """Refuse a page that was not allowed: without keys, any page could ask this machine."""
        origin = request.headers.get("origin")
        if origin is None or origin in self._origins or "*" in self._origins:
            return
        if origin.partition("://")[2] == request.headers.get("host"):
            return
        raise HttpError(
            FORBIDDEN,
            f"pages of {origin[:200]} may not ask; start the gateway with --cors for them",
            code="origin_not_allowed",
        )


def _credential(request: Request) -> str:
    """The key or token that was sent: as a bearer, as Anthropic does, or as Langfuse does."""
    scheme, _, rest = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            _, _, password = base64.b64decode(rest).decode().partition(":")
        except ValueError:
            return ""
        return password
    return request.headers.get("x-api-key", "")


def _is_here(request: Request) -> bool:
    """Whether it is this machine that asks; who comes through a socket of Unix is here, too."""
    host = request.client.host if request.client else ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def _require_own_name(request: Request) -> None:
    """Without keys, refuse names that a page elsewhere could have pointed at this machine.

    A browser takes an answer from 127.0.0.1 for that of the page's own server where the name of
    that server leads there (DNS rebinding). Addresses and ``localhost`` cannot be so.
    """
    name = request.headers.get("host", "").rpartition("@")[2].partition(":")[0].rstrip(".")
    is_address = not name or name.startswith("[") or name.replace(".", "").isdigit()
    if not is_address and name != "localhost" and not name.endswith(".localhost"):
        raise HttpError(
            FORBIDDEN,
            f"{name[:200]} is no name of this machine; make an API key, or ask 127.0.0.1",
            code="host_not_allowed",
        )
