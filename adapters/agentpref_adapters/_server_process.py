"""A server in a process of its own: started, waited for, started again when it dies, ended.

It runs below a guard (``_process_guard``), which ends it when this process is killed, and in a
process group of its own, so that the helpers it starts end with it. What it writes goes to a log
file. One that dies is started again after growing waits; one that dies quickly several times in a
row is given up. Knows nothing of what the server is, but that ``/health`` answers 200.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, NamedTuple
from urllib.parse import urlsplit

from agentpref.errors import EngineFailed
from agentpref_adapters import _process_guard

_POLL_SECONDS = 0.2
_PROBE_SECONDS = 5.0
_TIDY_SECONDS = 2.0
_TAIL_BYTES = 64 << 10
_QUOTED_LINES = 3
_TELLING = re.compile(r"\w(Error|Exception): |\berror: |No module named|out of memory", re.I)
_WARNING = re.compile(r"\bwarn(ing)?\b", re.I)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for, in seconds.

    ``start`` is from its start to its first answer, ``grace`` from a request to end to its end. One
    that dies within ``lasting`` of its first answer died quickly; ``deaths`` of these in a row are
    too many. ``pause`` is the wait before the second start; it doubles, up to ``longest_pause``.
    """

    start: float = 600.0
    grace: float = 15.0
    lasting: float = 60.0
    deaths: int = 5
    pause: float = 1.0
    longest_pause: float = 60.0


class ServerEvent(NamedTuple):
    """What happened to a server: it answers, it died and is started again, or was given up."""

    what: Literal["ready", "died", "gave_up"]
    words: str


def ignore(event: ServerEvent) -> None:
    """Tell nobody."""


class ServerProcess:
    """A supervised server; a context manager that starts it and ends it.

    Args:
        command: the program and its arguments. It should not go to the background.
        environment: the whole environment it gets.
        url: where it answers; ``/health`` below it says whether it does.
        log: the file for what it writes; what a run before wrote is kept as ``….1``.
        name: what it is called in messages.
        patience: how long it is waited for.
        tell: called with each event, on a thread of the supervisor's; it should be quick.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        url: str,
        log: Path,
        name: str = "the server",
        patience: Patience | None = None,
        tell: Callable[[ServerEvent], None] = ignore,
    ) -> None:
        """Start nothing yet."""
        self.url = url
        self.log = log
        self.name = name
        self.starts = 0
        self._command = tuple(command)
        self._environment = dict(environment)
        self._patience = patience or Patience()
        self._tell = tell
        self._failure: EngineFailed | None = None
        self._settled = threading.Event()  # it has answered once, or never will
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="agentpref-server", daemon=True)

    @property
    def failure(self) -> EngineFailed | None:
        """Why it was given up, or ``None`` while it was not."""
        return self._failure

    def start(self) -> None:
        """Start the server, and return when it answers.

        Raises:
            EngineFailed: something else listens there, or it died or did not answer in time; the
                message quotes its log. Nothing is left running.
        """
        require_free(self.url)
        with ExitStack() as on_failure:
            on_failure.callback(self.stop)
            self._keeper.start()
            self._settled.wait()
            if self._failure is not None:
                raise self._failure
            on_failure.pop_all()

    def stop(self) -> None:
        """End the server and all that it started; a second call does nothing."""
        self._stopping.set()
        if self._keeper.is_alive():
            self._keeper.join()

    def __enter__(self) -> ServerProcess:
        """Start it."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""
        self.stop()

    def _keep(self) -> None:
        try:
            deaths = 0
            while not self._stopping.is_set():
                lasted, words = self._run_once()
                if self._stopping.is_set():
                    return
                deaths = 1 if lasted > self._patience.lasting else deaths + 1
                if not self._settled.is_set() or deaths >= self._patience.deaths:
                    self._give_up(words, deaths)
                    return
                pause = min(self._patience.pause * 2 ** (deaths - 1), self._patience.longest_pause)
                self._tell(ServerEvent("died", f"{words}; starting it again in {pause:.0f} s"))
                self._stopping.wait(pause)
        finally:
            self._settled.set()

    def _give_up(self, words: str, deaths: int) -> None:
        often = f" ({deaths} times in a row)" if deaths > 1 else ""
        cure = f"read {self.log}, repair that, and start it again"
        self._failure = EngineFailed(f"{words}{often}; {cure}")
        self._tell(ServerEvent("gave_up", str(self._failure)))

    def _run_once(self) -> tuple[float, str]:
        """Start it, see it through to its end; say for how long it answered, and why it ended."""
        self.starts += 1
        try:
            require_free(self.url)  # between two starts somebody may have taken it
            process = self._spawn()
        except (OSError, EngineFailed) as error:
            return 0.0, f"{self.name} could not be started: {error}"
        try:
            return self._attend(process)
        finally:
            self._end(process)

    def _spawn(self) -> subprocess.Popen[bytes]:
        guarded = [sys.executable, "-I", "-S", _process_guard.__file__]
        guarded += [str(os.getpid()), str(self._patience.grace), *self._command]
        with _fresh(self.log) as output:
            return subprocess.Popen(
                guarded,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its group is its own, and Ctrl-C is for us alone
            )

    def _attend(self, process: subprocess.Popen[bytes]) -> tuple[float, str]:
        limit = time.monotonic() + self._patience.start
        while not answers(self.url):
            if process.poll() is not None:
                return 0.0, f"{self.name} ended with exit code {process.returncode}{self._quote()}"
            if time.monotonic() > limit:
                late = f"did not answer at {self.url} within {self._patience.start:.0f} s"
                return 0.0, f"{self.name} {late}{self._quote()}"
            if self._stopping.wait(_POLL_SECONDS):
                return 0.0, ""
        since = time.monotonic()
        self._tell(ServerEvent("ready", f"{self.name} answers at {self.url}"))
        self._settled.set()
        while process.poll() is None:
            if self._stopping.wait(_POLL_SECONDS):
                return 0.0, ""
        died = f"{self.name} died (exit code {process.returncode}){self._quote()}"
        return time.monotonic() - since, died

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Ask the guard to end the server, then see to it that nothing of the group is left."""
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(self._patience.grace + _TIDY_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        _sweep(process.pid)
        process.wait()

    def _quote(self) -> str:
        lines = telling_lines(self.log)
        return ": " + " | ".join(lines) if lines else ""


def answers(url: str) -> bool:
    """Whether ``/health`` below a URL answers 200."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(
        parts.hostname or "", parts.port, timeout=_PROBE_SECONDS
    )
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def free_port(host: str) -> int:
    """Choose a port of a host that nothing listens on at the moment."""
    with socket.create_server((host, 0), family=_family(host)) as listener:
        return int(listener.getsockname()[1])


def require_free(url: str) -> None:
    """Refuse a URL whose port is taken, since whoever has it would be mistaken for the server.

    Raises:
        EngineFailed: it is taken, or the host is none of this machine's.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 0
    try:
        socket.create_server((host, port), family=_family(host)).close()
    except OSError as error:
        raise EngineFailed(
            f"cannot listen on port {port} of {host} ({error.strerror or error}); end what "
            f"listens there, or choose another port (0 takes a free one)"
        ) from error


def telling_lines(log: Path) -> list[str]:
    """The lines of a log that tell why its writer failed: those that name errors, else the last.

    The first of several is kept, since programs of several processes write the cause first and what
    followed from it last.
    """
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    named = [line for line in lines if _TELLING.search(line) and not _WARNING.search(line)]
    if len(named) > _QUOTED_LINES:
        named = [named[0], *named[1 - _QUOTED_LINES :]]
    return named or lines[-_QUOTED_LINES:]


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _fresh(log: Path) -> IO[bytes]:
    """Open an empty log that its owner alone may read, and keep the one before."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_name(log.name + ".1"))
    return open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), "wb")


def _sweep(group: int) -> None:
    """Give what is left of a process group a moment, kill it, and wait for its end."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        _signal(group, signum)
        limit = time.monotonic() + _TIDY_SECONDS
        while _signal(group, 0) and time.monotonic() < limit:
            time.sleep(_POLL_SECONDS / 4)


def _signal(group: int, signum: int) -> bool:
    """Send a signal to a group; say whether there was anybody to get it."""
    try:
        os.killpg(group, signum)
    except (ProcessLookupError, PermissionError):  # macOS says the latter where all have ended
        return False
    return True
