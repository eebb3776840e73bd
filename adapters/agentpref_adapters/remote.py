"""A log whose home is on another machine: it has ``Log``'s face, and sends to a collector.

    from agentpref_adapters.remote import RemoteLog

    log = RemoteLog("https://collector.example.com", "ap-…")

What is recorded goes to an outbox on this machine's disk, and from there to the collector (a
gateway), which writes it to its home under the namespace that the key stands for. ``record`` costs
its caller what that of a ``Log`` costs, and a judgement is on this disk when its call returns. When
the collector is down, everything waits; each row is kept once, whatever restarts.
"""

from __future__ import annotations

import os
import ssl
import weakref
from collections import Counter
from pathlib import Path
from typing import NoReturn

from agentpref.errors import ConfigError, MissingDependency
from agentpref.home import Home, StrPath
from agentpref.record.forks import EXIT_SECONDS
from agentpref.record.ingest.redaction import Redact
from agentpref.record.integrity import Problem
from agentpref.record.log import CLOSE_SECONDS, Log
from agentpref.record.writer import Writer

try:
    import httpx

    from agentpref_adapters._remote_outbox import Delivery, Lines, Outbox
    from agentpref_adapters._remote_sender import TIMEOUT, Sender
except ModuleNotFoundError as error:
    if error.name not in ("httpx", "tenacity"):
        raise
    raise MissingDependency(
        f"a remote log needs {error.name}, which is not installed; run `pip install "
        "'agentpref[remote]'`"
    ) from error

__all__ = ["RemoteLog"]

KEY = "AGENTPREF_KEY"
OUTBOX = ".agentpref-outbox"


class RemoteLog(Log):
    """The log of a namespace whose home is elsewhere; a context manager that closes itself.

    It is used as a :class:`agentpref.Log`. These differ:

    - A judgement returns when it is on this machine's disk. The collector finds its run: one that
      it does not know waits for a day, since the run may come from another host; then it is
      counted in ``dropped`` and kept in ``refused.jsonl`` of the outbox, as all that the collector
      refuses.
    - ``flush`` waits until the collector has everything.
    - ``declare``, ``undeclare`` and ``forget`` change the home, so they are commands there.
    - What looks runs up, such as Open WebUI's ``receiver``, refuses it.

    >>> with RemoteLog("https://collector.example.com", "ap-…") as log:  # doctest: +SKIP
    ...     run = log.record([{"role": "user", "content": "2 + 2?"}], "4")
    ...     log.thumbs(run, up=True)
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        outbox: StrPath | None = None,
        queue_size: int = 10_000,
        queue_bytes: int = 64 * 1024 * 1024,
        outbox_bytes: int = 4 * 1024**3,
        redact: Redact | None = None,
        strict: bool = False,
        verify_tls: bool | str = True,
    ) -> None:
        """Open an outbox, or make one. The collector is asked nothing yet: it may be down.

        Args:
            url: where the collector is, such as ``https://collector.example.com``.
            key: the API key, which stands for a namespace there; else ``$AGENTPREF_KEY``.
            outbox: the folder of what waits; else ``./.agentpref-outbox``. Processes with one key
                may share it.
            queue_size: how many runs may wait for the disk before further ones are dropped.
            queue_bytes: how many bytes of JSON they may take.
            outbox_bytes: from how many bytes in the outbox on runs are dropped; judgements are not.
                What the collector refused counts, and takes about a quarter of it, or 32 MiB, at
                most.
            redact: takes each text and returns the text to store; it is called before anything is
                written here.
            strict: let ``record`` return when the run is on this disk, change no value, and raise.
            verify_tls: False, or the path of a file of certificates, for a collector whose
                certificate no public authority has signed.

        Raises:
            ConfigError: the url or the key is none, or the certificates cannot be read; or rows for
                another key wait in the outbox, or a log with another one has it open.
            NotKept: the outbox cannot be made or written.
        """
        self._url = _checked(url)
        key = os.environ.get(KEY, "") if key is None else key
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            what = "not printable ASCII" if key else "empty"
            raise ConfigError(
                f"key is {what}; pass the API key that the collector's operator made, or set {KEY}"
            )
        limits = {"queue_size": queue_size, "queue_bytes": queue_bytes}
        for name, value in (limits | {"outbox_bytes": outbox_bytes}).items():
            if value < 1:
                raise ConfigError(f"{name} is {value!r}, but must be 1 or more")
        folder = Path(os.path.abspath(os.path.expanduser(OUTBOX if outbox is None else outbox)))
        self.home = Home(folder)
        self.namespace = ""  # the collector's to say; a trace is looked up in it there
        self.strict = strict
        # Without TLS none are made: in a fork, OpenSSL may wait for a thread that is gone.
        needed = url.lower().startswith("https:") or verify_tls is not True
        certificates = _certificates(verify_tls) if needed else False
        headers = {"authorization": f"Bearer {key}"}
        self._outbox = Outbox(folder, f"{self._url}\n{key}", outbox_bytes)
        self._sender = Sender(
            self._outbox,
            self._url,
            lambda: httpx.Client(headers=headers, timeout=TIMEOUT, verify=certificates),
        )
        self._writer = Writer(
            self.home,
            Lines(redact),
            limit=queue_size,
            limit_bytes=queue_bytes,
            durable=Delivery(self._outbox, self._sender.wake),
        )
        self._take = self._writer.commit if strict else self._writer.offer
        if self._outbox.waits():
            self._sender.wake()
        self._ending = weakref.finalize(self, _end, self._writer, self._sender, EXIT_SECONDS)

    @property
    def dropped(self) -> dict[str, int]:
        """How many rows could not be kept here, or were refused by the collector, by reason.

        What other processes that share the outbox have sent is counted by them.
        """
        return dict(Counter(self._writer.dropped) + Counter(self._sender.refused))

    @property
    def trouble(self) -> str | None:
        """Why the collector does not take rows at present; None if nothing is wrong."""
        return self._sender.trouble

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until the collector has everything recorded until now.

        Returns:
            Whether it has. False after ``timeout`` seconds; without one, when the collector does
            not take it now. What was recorded then waits in the outbox. Judgements that wait for
            their run are not waited for.
        """
        return self._writer.flush(timeout) and self._sender.flush(timeout)

    def verify(self, *, sample: int | None = None) -> list[Problem]:
        """Check the rows that wait in the outbox; the home is verified where it is.

        Args:
            sample: without effect: an outbox is small.
        """
        self._writer.flush(None)
        what = "it is not as it was written"
        return [Problem(path.name, f"line {at}", what) for path, at in self._outbox.problems()]

    def declare(self, key: str, *, low: float = 0, high: float = 1, replace: bool = False) -> None:
        """Raise ``ConfigError``: keys are declared where the home is."""
        self._refer(f"agentpref keys declare {key} --low {low:g} --high {high:g}")

    def undeclare(self, key: str) -> bool:
        """Raise ``ConfigError``: keys are declared where the home is."""
        self._refer(f"agentpref keys undeclare {key}")

    def forget(self, user_id: str) -> NoReturn:
        """Raise ``ConfigError``: users are forgotten where the home is.

        What they said before and still waits here is then refused by the collector, and dropped.
        What it refused for another reason stays, with its texts, in ``refused.jsonl`` and
        ``refused-older.jsonl`` of each outbox: delete both when a user is forgotten.
        """
        self._refer("agentpref forget --user-id ID")

    def _refer(self, command: str) -> NoReturn:
        raise ConfigError(f"the home is at {self._url}, and not here; run there: `{command}`")

    def close(self) -> None:
        """Write what was recorded, send what the collector takes at once, and stop."""
        self._ending.detach()
        _end(self._writer, self._sender, CLOSE_SECONDS)

    def __enter__(self) -> RemoteLog:
        return self

    def __repr__(self) -> str:
        return f"RemoteLog({self._url!r}, outbox={str(self.home.path)!r})"


def _end(writer: Writer, sender: Sender, seconds: float) -> None:
    writer.close(seconds)
    sender.close(EXIT_SECONDS)


def _certificates(verify_tls: bool | str) -> ssl.SSLContext:
    """Whom to trust; raise ``ConfigError`` for a file that has no certificates."""
    try:
        if isinstance(verify_tls, bool):
            return httpx.create_ssl_context(verify=verify_tls)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # the default one trusts others too
        context.load_verify_locations(verify_tls)
    except (OSError, ValueError, TypeError) as error:
        from_environment = os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")
        path = from_environment if verify_tls is True else verify_tls
        raise ConfigError(
            f"{path!r} cannot be read as certificates ({error}); pass the path of a PEM file as "
            "verify_tls=, or set SSL_CERT_FILE to one"
        ) from error
    return context


def _checked(url: str) -> str:
    """The collector's route; raise ``ConfigError`` for what is no address."""
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(f"url is {url!r}, which is no address ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ConfigError(f"url is {url!r}; pass one such as 'https://collector.example.com'")
    if parts.userinfo:
        raise ConfigError("url holds a password, which logs would show; pass the key as key=")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return str(parts.copy_with(path=f"{path}/v1/log", query=None, fragment=None))
