"""The log that a host embeds: runs, and what is thought of them, into one home folder.

Recording costs its caller a check and one JSON dump; a thread of our own writes. Feedback is on
disk before the call returns. One log may be used from many threads, and many processes may log to
one home. Knows nothing of pairs, training or serving.
"""

from __future__ import annotations

import reprlib
import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from agentpref.errors import AgentprefError, ConfigError, InvalidMessage
from agentpref.home import Home, StrPath
from agentpref.record.database import connect, translated
from agentpref.record.forks import EXIT_SECONDS
from agentpref.record.ids import new_id
from agentpref.record.ingest.intake import Intake
from agentpref.record.ingest.judgement import comparison_of, correction_of, feedback_of
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.ingest.redaction import Redact
from agentpref.record.ingest.snapshot import Snapshot, freeze
from agentpref.record.integrity import Problem
from agentpref.record.reader import Reader
from agentpref.record.writer import Writer
from agentpref.types import Message, Source, Tool, Winner

if TYPE_CHECKING:
    from agentpref.record.deletion.forget import Forgotten

CLOSE_SECONDS = 60.0
"""How long ``close`` waits for the queue."""


class Log:
    """The log of one namespace of a home; a context manager that closes itself.

    ``record`` raises nothing of ours and waits for nothing: a run that is no run, or that cannot be
    stored at all, is counted in ``dropped`` and said by the logger ``agentpref``. While the
    database is locked or full, runs and feedback go to a file of the home and from there to the
    database later. With ``strict``, ``record`` waits until the run is on disk, and raises.
    """

    def __init__(
        self,
        home: StrPath | None = None,
        *,
        namespace: str = "default",
        queue_size: int = 10_000,
        queue_bytes: int = 64 * 1024 * 1024,
        redact: Redact | None = None,
        strict: bool = False,
    ) -> None:
        """Open a home, making it where the folder is missing or empty.

        Args:
            home: the folder; else ``$AGENTPREF_HOME``, else ``./.agentpref``.
            namespace: the agent or tenant whose runs, pairs and live revision are kept apart.
            queue_size: how many runs may wait for the disk before further ones are dropped.
            queue_bytes: how many bytes of JSON these may take.
            redact: given each text that is to be stored, gives the text that is; for example
                ``agentpref.redact``. Called by the thread that writes.
            strict: make ``record`` durable, and let it raise.

        Raises:
            NotAHome: the path is a file, or a folder of something else.
            CorruptHome: the database cannot be read.
            NewerHome: the database was written by a later agentpref.
            ConfigError: the namespace is no printable text, or the queue has no room.
        """
        if not isinstance(namespace, str) or not namespace or not namespace.isprintable():
            raise ConfigError(f"namespace is {namespace!r}, but must be printable text")
        for name, value in (("queue_size", queue_size), ("queue_bytes", queue_bytes)):
            if value < 1:
                raise ConfigError(f"{name} is {value!r}, but must be 1 or more")
        self.home = Home.create(home)
        self.namespace = namespace
        self.strict = strict
        intake = Intake(namespace, Pseudonyms.of(self.home), redact)
        self._writer = Writer(self.home, intake, limit=queue_size, limit_bytes=queue_bytes)
        self._take = self._writer.commit if strict else self._writer.offer
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
            InvalidMessage: with ``strict`` only: an argument cannot be stored; it is named.
            NotKept: with ``strict`` only: the run could not be written.
            RedactionFailed: with ``strict`` only: ``redact`` raised, or gave no text.
            LogClosed: with ``strict`` only: the log was closed.
        """
        now = time.time_ns()
        name = new_id(now) if run_id is None else run_id
        try:
            if run_id is not None:
                _check_run_id(run_id)
            body = freeze(
                messages,
                output,
                tools,
                model,
                revision,
                thread_id,
                trace_id,
                user_id,
                params,
                token_ids,
                logprobs,
                tags,
                metadata,
            )
            self._take(Snapshot(name, now / 1e9, body))
        except AgentprefError as error:
            if self.strict:
                raise
            self._writer.drop(type(error).__name__, 1, error)
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
        """How many runs this log could not keep, by reason; a forked child counts anew."""
        return self._writer.dropped

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until what was recorded is on disk.

        Returns:
            Whether it is; not, when ``timeout`` seconds are over, or when neither the database nor
            the spill can be written: then it waits in memory and is tried again.

        Raises:
            LogClosed: the log was closed.
        """
        return self._writer.flush(timeout)

    def verify(self, *, sample: int | None = None) -> list[Problem]:
        """Hash every message of the home again and follow every reference.

        Args:
            sample: look at so many rows of each large table instead, drawn at random: a second's
                work in a home of any size.

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
                return Reader(connection).verify(sample=sample)
        finally:
            connection.close()

    def forget(self, user_id: str) -> Forgotten:
        """Remove everything that a user said from the home, and mark the revisions that saw it.

        It reads the whole home and writes it anew: minutes for one of many gigabytes. Others may
        log meanwhile.

        Returns:
            What was removed, which revisions saw it, and how to rebuild them.

        Raises:
            UpdateRunning: an update holds the home; it would publish what it has read already.
            NotKept: not all of it could be done; the same call again completes it.
            LogClosed: the log was closed.
        """
        from agentpref.record.deletion.forget import forget

        self.flush()
        return forget(self.home, user_id)

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


def _check_run_id(run_id: str) -> None:
    if not isinstance(run_id, str) or not run_id or not run_id.isprintable():
        raise InvalidMessage(
            f"run_id is {reprlib.repr(run_id)}; pass a non-empty string of printable text"
        )
