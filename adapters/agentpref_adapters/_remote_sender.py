"""Brings an outbox to the collector: one thread, which tries until the collector has every row.

A request may be cut off after the collector has written its rows, so each batch is sent again until
it is answered; the rows keep their ids, and the collector keeps each once. While the collector is
down, slow, or refuses the key, everything waits on disk and the pauses grow to ten seconds.
Judgements of runs that the collector does not know wait for them for a day: their run may be in the
outbox of a host that is down.
"""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import orjson
import tenacity

from agentpref.errors import AgentprefError
from agentpref.record.database import warn
from agentpref.record.forks import guard, let_go
from agentpref.record.handover import Signal, Tally
from agentpref_adapters._remote_outbox import Outbox

POLL_SECONDS = 1.0
"""How often a process looks whether it is the one to send."""

LONGEST_PAUSE_SECONDS = 10.0

RETRY_SECONDS = 0.5
"""How often it is tried while somebody waits in ``flush``."""

_FLUSH_SECONDS = 60.0

LATER_SECONDS = (1.0, 60.0)
"""The first and the longest pause between two tries of judgements whose run is not known."""

PATIENCE_SECONDS = 86_400.0
"""How long after it was made a judgement waits for its run."""

TIMEOUT = httpx.Timeout(60.0, connect=10.0)
_GZIP_BYTES = 1_024
_SHOWN = 200
_FORGOTTEN = ("ForgottenUser", "ForgottenRun")

NewClient = Callable[[], httpx.Client]


class Trouble(Exception):
    """Why a batch has no answer; it is sent again."""


class TooLarge(Exception):
    """The collector, or a proxy before it, takes no body of this size."""


class Sender:
    """Sends what is in an outbox, if no other process does."""

    def __init__(self, outbox: Outbox, url: str, client: NewClient) -> None:
        """``url`` is the collector's route; ``client`` makes a client that has the key."""
        self._outbox, self._url, self._client = outbox, url, client
        self._files = threading.RLock()  # held while files change, and around a fork
        self._later_at, self._later_pause = 0.0, LATER_SECONDS[0]
        self._refused = Tally("%d row(s) refused by the collector (%s): %s")
        self._begin()
        guard(self)

    def _begin(self) -> None:
        self._thread: threading.Thread | None = None
        self._is_started = self._closing = False
        self._role = threading.Lock()  # held by the thread that sends
        self._wake, self._urgent, self._ended = Signal(), Signal(), Signal()
        self.trouble: str | None = None
        self.failures = 0

    @property
    def refused(self) -> dict[str, int]:
        """How many rows the collector refused for good, by the name of the error."""
        return self._refused.counts()

    def wake(self) -> None:
        """Say that there is something to send; starts the thread at the first call."""
        if self._thread is None:
            self._is_started = True
            threading.Thread(target=self._main, name="agentpref-send", daemon=True).start()
        self._wake.set()

    def flush(self, timeout: float | None) -> bool:
        """Send what is in the outbox; False after ``timeout`` seconds.

        Without a time, False at the first failure, and after a minute if another process sends.
        """
        with self._files:
            files = self._outbox.seal()
        now, failures = time.monotonic(), self.failures
        end, again = now + (_FLUSH_SECONDS if timeout is None else timeout), now
        self.wake()
        while any(path.exists() for path in files):
            now = time.monotonic()
            if now > end or (timeout is None and self.failures > failures):
                return False
            if now >= again:
                self._urgent.set()  # try now, and not after the pause
                again = now + RETRY_SECONDS
            time.sleep(0.01)
        return True

    def close(self, timeout: float) -> None:
        """Send what can be sent at once, and stop; the rest waits for the next process."""
        self._closing = True
        if self._is_started:
            self._wake.set()
            self._urgent.set()
            self._ended.wait(timeout)
            self._ended.set()  # others may close it too
        with self._files:
            if self._thread is None:  # else it still sends, with this key, and leaves by itself
                self._outbox.leave()

    def before_fork(self) -> None:
        """Wait until no file is being changed."""
        self._files.acquire()

    def after_fork_in_parent(self) -> None:
        """Continue."""
        let_go(self._files)

    def after_fork_in_child(self) -> None:
        """Start with no thread, and without the parent's claim to send."""
        let_go(self._files)
        self._outbox.disinherit()
        self._begin()

    # For the thread

    def _main(self) -> None:
        if not self._role.acquire(blocking=False):
            return  # two calls started a thread at once
        self._thread = threading.current_thread()
        try:
            is_over = False
            while not is_over:
                is_over = self._closing
                try:
                    self._work()
                    is_over = True
                except Exception as error:  # any other: without this thread, nothing is ever sent
                    self._failed(f"{self._url}: {type(error).__name__} ({error})")
                    if not is_over:
                        self._pause(LONGEST_PAUSE_SECONDS)
        finally:
            self._thread = None
            with self._files:
                self._outbox.release()
                if self._closing:
                    self._outbox.leave()
            self._role.release()
            self._ended.set()

    def _work(self) -> None:
        """Send until the log is closed."""
        with self._client() as client:
            closing = False
            while not closing:
                closing = self._closing  # read first: what comes later waits on disk
                if self._claimed():
                    self._send_all(client)
                if not closing:
                    self._wake.wait(POLL_SECONDS)

    def _claimed(self) -> bool:
        try:
            with self._files:
                return self._outbox.claim()
        except (AgentprefError, OSError) as error:
            self._failed(str(error))
            return False

    def _send_all(self, client: httpx.Client) -> None:
        """Send until nothing is left, or, while closing, until something fails."""
        try:
            is_time = time.monotonic() >= self._later_at
            with self._files:
                files = self._outbox.ready(later=is_time)
            for path in files:
                self._send_file(client, path)
        except Trouble:
            pass  # said already
        except (AgentprefError, OSError) as error:  # this disk: full, or the file was removed
            self._failed(f"{error}")
            self._urgent.wait(POLL_SECONDS)

    def _send_file(self, client: httpx.Client, path: Path) -> None:
        for batch in self._outbox.batches(path):
            self._deliver(client, batch)
        with self._files:
            torn = self._outbox.torn(path)
            self._outbox.refuse((line, "a crash cut it off, or it was edited") for line in torn)
            self._outbox.done(path)
        if torn:
            self._refused.add("torn", len(torn), f"lines of {path} are not as they were written")

    def _deliver(self, client: httpx.Client, batch: Sequence[bytes]) -> None:
        try:
            answer = self._until_answered(client, batch)
        except TooLarge:
            if len(batch) > 1:
                half = len(batch) // 2
                self._deliver(client, batch[:half])
                self._deliver(client, batch[half:])
                return
            answer = {0: ("TooLarge", "it is larger than the collector takes")}
        if answer:
            self._sort(batch, answer)

    def _until_answered(
        self, client: httpx.Client, batch: Sequence[bytes]
    ) -> dict[int, tuple[str, str]]:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Trouble),
            wait=tenacity.wait_random_exponential(multiplier=0.25, max=LONGEST_PAUSE_SECONDS),
            sleep=self._pause,
            stop=lambda state: self._closing,
            after=lambda state: self._failed(str(state.outcome and state.outcome.exception())),
            reraise=True,
        )
        answer = retrying(self._post, client, batch)
        if self.trouble is not None:
            warn("%s takes runs and feedback again", self._url)
            self.trouble = None
        return answer

    def _pause(self, seconds: float) -> None:
        self._urgent.wait(seconds)

    def _post(self, client: httpx.Client, batch: Sequence[bytes]) -> dict[int, tuple[str, str]]:
        """Send a batch; return the rows that are refused, by their place, with name and reason."""
        body = b'{"sent_at":%.6f,"rows":[%s]}' % (time.time(), b",".join(batch))
        headers = {"content-type": "application/json"}
        if len(body) > _GZIP_BYTES:
            body = gzip.compress(body, 1)
            headers["content-encoding"] = "gzip"
        try:
            response = client.post(self._url, content=body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Trouble(f"{self._url}: {type(error).__name__} ({error})") from error
        if response.status_code == 413:
            raise TooLarge
        if response.status_code in (401, 403):
            raise Trouble(f"{self._url} refuses the key ({response.status_code}); give a valid one")
        if response.status_code != 200:
            said = response.text[:_SHOWN] if response.is_error else "is it the collector's address?"
            raise Trouble(f"{self._url} answers {response.status_code}: {said}")
        try:
            answer = orjson.loads(response.content)
            refused = {int(one["row"]): (str(one["error"]), str(one["message"]))
                       for one in answer["refused"]}  # fmt: skip
            complete = len(answer["kept"]) + len(refused) == len(batch)
        except (ValueError, TypeError, KeyError) as error:
            raise Trouble(f"{self._url} is no collector: its answer is not one's") from error
        if not complete or not refused.keys() <= {*range(len(batch))}:
            raise Trouble(f"{self._url} does not say of each row whether it is on disk")
        return refused

    def _sort(self, batch: Sequence[bytes], refused: dict[int, tuple[str, str]]) -> None:
        """Keep what was refused: for its run, or for the operator. The forgotten are dropped."""
        oldest = time.time() - PATIENCE_SECONDS
        later, lost = [], []
        for place, (name, why) in refused.items():
            row = batch[place]
            if name in _FORGOTTEN:
                continue
            if name == "UnknownRun" and orjson.loads(row)["created_at"] > oldest:
                later.append(row)
            else:
                lost.append((row, f"{name}: {why}"))
                self._refused.add(name, 1, f"{why} (the rows are in {self._outbox.refused})")
        with self._files:
            self._outbox.postpone(later)
            self._outbox.refuse(lost)
        if later:
            self._later_at = time.monotonic() + self._later_pause
            self._later_pause = min(2 * self._later_pause, LATER_SECONDS[1])

    def _failed(self, why: str) -> None:
        if self.trouble is None:
            warn("%s; until it is over, runs and feedback wait in %s", why, self._outbox.folder)
        self.trouble = why
        self.failures += 1
