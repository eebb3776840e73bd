"""What `agentpref serve` does while it runs: say what serves, and keep it loaded.

Knows nothing of which engine it is: that is a supervised server, and what makes a backend of it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any

from agentpref_cli.terminal import BAD, GOOD, WARN, say

if TYPE_CHECKING:
    from agentpref.home import Home
    from agentpref.serve.backend import ServingBackend
    from agentpref.serve.registry import ServingState
    from agentpref.serve.router import Router
    from agentpref_adapters._server_process import ServerProcess

FOLLOW_SECONDS = 1.0
LOOK_SECONDS = 0.2
LOADED_SECONDS = 1.0
STYLES = {"ready": GOOD, "serving": GOOD, "died": WARN, "warning": WARN, "gave_up": BAD}


class Speaker:
    """Says what happens, a line each: in words, or as JSON. Also hears what other threads tell."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._heard: SimpleQueue[tuple[str, str]] = SimpleQueue()

    def __call__(self, event: str, words: str, **facts: Any) -> None:
        """Print one line, at once."""
        if not self._as_json:
            say(words, STYLES.get(event, ""))
            sys.stdout.flush()  # a supervisor that reads a pipe wants each line when it is said
            return
        import orjson

        line = orjson.dumps({"event": event, "words": words, **facts}, default=str)
        print(line.decode(), flush=True)

    def hear(self, heard: tuple[str, str]) -> None:
        """Take an event and its words from another thread, so that no two speak at a time."""
        self._heard.put(heard)

    def next(self, seconds: float) -> str | None:
        """Say the next event that was heard and name it; ``None`` if there is none soon."""
        try:
            event, words = self._heard.get(timeout=seconds)
        except Empty:
            return None
        self(event, words)
        return event


def run(
    server: ServerProcess,
    make_backend: Callable[[], ServingBackend],
    home: Home,
    namespaces: Sequence[str],
    speaker: Speaker,
) -> None:
    """Start the server and serve what is live, until the server is given up or a signal comes.

    Raises:
        EngineFailed: the server did not start, or died too often.
        AgentprefError: what is live cannot be served.
        KeyboardInterrupt: a signal came; the server has ended.
    """
    speaker(
        "starting", f"starting {server.name}; its log is {server.log}", url=server.url,
        log=server.log,
    )  # fmt: skip
    with ExitStack() as opened:
        opened.enter_context(server)
        opened.enter_context(_warnings_said(speaker))
        speaker.next(LOOK_SECONDS)
        backend = opened.enter_context(closing(make_backend()))
        routers = [opened.enter_context(_router(home, name, backend)) for name in namespaces]
        _attend(server, routers, speaker)


def _attend(server: ServerProcess, routers: Sequence[Router], speaker: Speaker) -> None:
    from agentpref_adapters._server_process import answers

    watched, up = [_Watched(router, speaker) for router in routers], True
    while server.failure is None:
        for one in watched:
            if up and one.is_due() and answers(server.url):  # else a look would wait for it
                one.look()
        up = {"died": False, "ready": True}.get(speaker.next(LOOK_SECONDS) or "", up)
    while speaker.next(0):
        pass  # what was heard before the end
    raise server.failure


class _Watched:
    """A router whose revisions are seen to be loaded, and which is then said to serve them.

    An engine that was started again is empty. A request has its own revision loaded again, but
    nobody asks for what was live before, on which a rollback counts.
    """

    def __init__(self, router: Router, speaker: Speaker) -> None:
        self._router = router
        self._speaker = speaker
        self._said: ServingState | None = None
        self._before: str | None = None  # what was live before, which the router keeps loaded
        self._seen: ServingState | None = None
        self._next_look = 0.0
        self._failures: dict[str, str] = {}

    def is_due(self) -> bool:
        """Whether something else serves than when it was looked at, or that is a while ago."""
        return self._router.serving != self._seen or monotonic() >= self._next_look

    def look(self) -> None:
        """Have what is wanted loaded where it is not, and say what serves if it has changed."""
        self._seen = state = self._router.serving
        self._next_look = monotonic() + LOADED_SECONDS
        if self._said is not None and self._said.live != state.live:
            self._before = self._said.live
        loaded = self._router.backend.list_loaded()
        wanted = dict.fromkeys((state.live, state.canary, self._before))
        lacking = [name for name in wanted if name is not None and name not in loaded]
        failed = [name for name in lacking if not self._load_again(name)]
        if state != self._said and not {state.live, state.canary}.intersection(failed):
            self._said = state
            _say_state(state, self._speaker)

    def _load_again(self, name: str) -> bool:
        """Ask the revision something, which has it loaded; say a failure once, not each time."""
        from agentpref.errors import ServingError
        from agentpref.serve.backend import PROBE

        where = self._router.registry.namespace
        try:
            self._router.backend.generate(name, PROBE)
        except ServingError as error:
            if self._failures.get(name) != str(error):
                self._failures[name] = str(error)
                self._speaker("warning", f"{where}: {name} is not loaded again yet: {error}")
            return False
        self._failures.pop(name, None)
        self._speaker("loaded", f"{where}: {name} is loaded again", revision=name)
        return True


@contextmanager
def _router(home: Home, namespace: str, backend: ServingBackend) -> Iterator[Router]:
    from agentpref.serve.registry import Registry
    from agentpref.serve.router import Router
    from agentpref.serve.watch import Watcher

    with Router(Registry(home, namespace=namespace), backend) as router:
        Watcher(router, FOLLOW_SECONDS)
        yield router


def _say_state(state: ServingState, speaker: Speaker) -> None:
    from agentpref.types import BASE

    live = state.live or BASE
    words = f"{state.namespace}: {live} serves (generation {state.generation})"
    if state.canary is not None:
        words += f"; {state.canary} is canary for {state.weight:.0%} of the threads"
    speaker("serving", words, **(state._asdict() | {"live": live}))


@contextmanager
def _warnings_said(speaker: Speaker) -> Iterator[None]:
    """Say what the core warns of, such as a swap that failed, as lines among the others."""
    handler = _Said(speaker)
    loggers = [logging.getLogger(name) for name in ("agentpref", "agentpref_adapters")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _Said(logging.Handler):
    def __init__(self, speaker: Speaker) -> None:
        super().__init__(logging.WARNING)
        self._speaker = speaker

    def emit(self, record: logging.LogRecord) -> None:
        self._speaker.hear(("warning", record.getMessage()))
