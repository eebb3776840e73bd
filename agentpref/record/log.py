"""The log that a host embeds: runs, and what is thought of them, into one home folder.

Recording costs its caller a check and one JSON dump; a thread of our own writes. Feedback is on
disk before the call returns. One log may be used from many threads, and many processes may log to
one home. Knows nothing of pairs, training or serving.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from agentpref.errors import ConfigError, InvalidMessage
from agentpref.record.database import connect, translated
from agentpref.record.forks import EXIT_SECONDS
from agentpref.record.home import Home, StrPath
from agentpref.record.ids import new_id
from agentpref.record.judgement import as_output, comparison_of, correction_of, feedback_of
from agentpref.record.snapshot import Snapshot, freeze
from agentpref.record.store import Store
from agentpref.record.verify import Problem
from agentpref.record.writer import Writer
from agentpref.types import Message, Source, Tool, Winner

CLOSE_SECONDS = 60.0
"""How long ``close`` waits for the queue: longer than SQLite waits for a lock."""


class Log:
    """The log of one namespace of a home; a context manager that closes itself.

    A run that cannot be stored (full queue, locked or full disk) never raises from ``record``: it
    is counted in ``dropped`` and warned about once by the logger ``agentpref``. With ``strict``,
    ``record`` waits until the run is on disk and raises ``NotKept`` if it cannot be. What cannot be
    a run at all, such as an empty list of messages, raises ``InvalidMessage`` either way.
    """

    def __init__(
        self,
        home: StrPath | None = None,
        *,
        namespace: str = "default",
        queue_size: int = 10_000,
        strict: bool = False,
    ) -> None:
        """Open a home, making it where the folder is missing or empty.

        Args:
            home: the folder; else ``$AGENTPREF_HOME``, else ``./.agentpref``.
            namespace: the agent or tenant whose runs, pairs and live revision are kept apart.
            queue_size: how many runs may wait for the disk before further ones are dropped.
            strict: make ``record`` durable, and let it raise.

        Raises:
            NotAHome: the path is a file, or a folder of something else.
            CorruptHome: the database cannot be read.
            NewerHome: the database was written by a later agentpref.
            ConfigError: the namespace is no printable text, or the queue has no room.
        """
        if not isinstance(namespace, str) or not namespace or not namespace.isprintable():
            raise ConfigError(f"namespace is {namespace!r}, but must be printable text")
        if queue_size < 1:
            raise ConfigError(f"queue_size is {queue_size!r}, but must be 1 or more")
        self.home = Home.create(home)
        self.namespace = namespace
        self.strict = strict
        self._writer = Writer(self.home, limit=queue_size)
        self._finalizer = weakref.finalize(self, self._writer.close, EXIT_SECONDS)

    def record(
        self,
        messages: Sequence[Message],
        output: str | Message,
        *,
        run_id: str | None = None,
        model: str | None = None,
        revision: str | None = None,
        thread_id: str | None = None,
        trace_id: str | None = None,
        user_id: str | None = None,
        tools: Sequence[Tool] = (),
        params: Mapping[str, Any] | None = None,
        token_ids: Sequence[int] | None = None,
        logprobs: Sequence[float] | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> str:
        """Record one model call, as it is now; later changes by the host do not reach it.

        Args:
            messages: what the model was asked, in OpenAI's shape.
            output: what it answered: plain text or an assistant's message.
            run_id: the host's own id; recording the same id again changes nothing.
            model: name of the base model.
            revision: the adapter that answered, as the router's lease names it.
            thread_id: the conversation.
            trace_id: the task of an agent, of which this call is a part.
            user_id: who asked.
            tools: what the model was offered, in OpenAI's shape.
            params: how it was sampled.
            token_ids: the answer's tokens, as the engine wrote them.
            logprobs: one natural log-probability for each of them.
            tags: domains; the first is the one the run's pairs are filed under.
            metadata: anything else; what JSON cannot hold is kept by its ``repr``.

        Returns:
            The run's id, to name it by in ``feedback``, ``correct`` and ``compare``.

        Raises:
            InvalidMessage: a message or another argument cannot be stored; it is named.
            NotKept: with ``strict`` only, the run could not be written.
            LogClosed: the log was closed.
        """
        details = {
            "model": model,
            "revision": revision,
            "thread_id": thread_id,
            "trace_id": trace_id,
            "user_id": user_id,
            "params": params,
            "token_ids": token_ids,
            "logprobs": logprobs,
            "tags": tags,
            "metadata": metadata,
        }
        body = freeze(messages, as_output(output), tools, details)
        name = new_id() if run_id is None else _checked(run_id)
        snapshot = Snapshot(name, self.namespace, time.time(), body)
        if self.strict:
            self._writer.commit(snapshot)
        else:
            self._writer.offer(snapshot)
        return name

    def feedback(
        self,
        run: str,
        *,
        key: str,
        score: float | None = None,
        value: Any = None,
        comment: str | None = None,
        source: Source = "human",
        user_id: str | None = None,
    ) -> str:
        """Say something about a run; it is on disk when this returns.

        Args:
            run: the run's id.
            key: what is judged, such as ``"thumbs"``.
            score: a finite number or a bool; more is better.
            value: anything that JSON can hold, beside the score or in its stead.
            comment: the judge's words.
            source: ``"human"``, ``"model"`` or ``"code"``.
            user_id: who judged.

        Returns:
            The feedback's id.

        Raises:
            InvalidFeedback: an argument is not what it must be.
            UnknownRun: no such run is in this home.
            NotKept: it could not be written.
            LogClosed: the log was closed.
        """
        said = feedback_of(
            run, key=key, score=score, value=value, comment=comment, source=source, user_id=user_id
        )
        self._writer.commit(said)
        return said.feedback_id

    def correct(
        self,
        run: str,
        output: str | Message,
        *,
        comment: str | None = None,
        source: Source = "human",
        user_id: str | None = None,
    ) -> str:
        """Say what a run should have answered; it is on disk when this returns.

        Returns:
            The id of the feedback, whose key is ``"correction"``.

        Raises:
            InvalidMessage: the output cannot be stored.
            InvalidFeedback: another argument is not what it must be.
            UnknownRun: no such run is in this home.
            NotKept: it could not be written.
            LogClosed: the log was closed.
        """
        said = correction_of(run, output, comment=comment, source=source, user_id=user_id)
        self._writer.commit(said)
        return said.feedback_id

    def compare(
        self,
        run_a: str,
        run_b: str,
        *,
        winner: Winner,
        source: Source = "human",
        user_id: str | None = None,
        comment: str | None = None,
    ) -> str:
        """Say which of two answers to one prompt is better; it is on disk when this returns.

        Returns:
            The comparison's id.

        Raises:
            InvalidFeedback: the winner is not ``"a"``, ``"b"`` or ``"tie"``, the runs are of
                different prompts, or another argument is not what it must be.
            UnknownRun: one of the runs is not in this home.
            NotKept: it could not be written.
            LogClosed: the log was closed.
        """
        said = comparison_of(
            run_a, run_b, winner=winner, source=source, user_id=user_id, comment=comment
        )
        self._writer.commit(said)
        return said.comparison_id

    @property
    def dropped(self) -> dict[str, int]:
        """How many runs this log could not keep, by reason."""
        return self._writer.dropped

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until what was recorded is on disk; say whether it was, within ``timeout`` seconds.

        Raises:
            LogClosed: the log was closed.
        """
        return self._writer.flush(timeout)

    def verify(self) -> list[Problem]:
        """Hash every message of the home again and follow every reference.

        Returns:
            What does not hold; empty for a sound record.

        Raises:
            CorruptHome: the database cannot be read.
            LogClosed: the log was closed.
        """
        self.flush()
        connection = connect(self.home, readonly=True)
        try:
            with translated(self.home):
                return Store(connection).verify()
        finally:
            connection.close()

    def close(self) -> None:
        """Write what was recorded and stop; a closed log takes nothing more."""
        self._finalizer.detach()
        self._writer.close(CLOSE_SECONDS)

    def __enter__(self) -> Log:
        """Give the log itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the log."""
        self.close()

    def __repr__(self) -> str:
        """Say which home and namespace it writes to."""
        return f"Log({str(self.home.path)!r}, namespace={self.namespace!r})"


def _checked(run_id: str) -> str:
    if not isinstance(run_id, str) or not run_id or not run_id.isprintable():
        raise InvalidMessage(f"run_id is {run_id!r}; pass a non-empty string of printable text")
    return run_id
