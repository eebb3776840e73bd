"""The log in an app: it records runs, and judgements of them, in one home folder.

``record`` costs its caller a check and one JSON dump; a thread of the log writes. Feedback is on
disk before the call returns. Many threads may use one log, and many processes one home.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from agentpref.errors import AgentprefError, ConfigError, InvalidMessage, described
from agentpref.home import Home, StrPath
from agentpref.record.database import connect, translated
from agentpref.record.forks import EXIT_SECONDS
from agentpref.record.ingest import Ingest, RawRun, freeze, freeze_what_can_be_kept
from agentpref.record.ingest.checks import Judgement, as_id, checked
from agentpref.record.ingest.redaction import Redact
from agentpref.record.integrity import Problem, examine
from agentpref.record.judging import Judging
from agentpref.record.keys import keys_problem, names_of
from agentpref.record.messages import new_id
from agentpref.record.writer import Writer
from agentpref.types import Message, Tool

if TYPE_CHECKING:
    from uuid import UUID

    from agentpref.record.deletion.forget import Forgotten

CLOSE_SECONDS = 60.0
"""How long ``close`` waits for the queue."""


class Log(Judging):
    """The log of one namespace of a home; a context manager that closes itself.

    ``record`` never blocks and never raises: a run that cannot be stored is counted in ``dropped``,
    one with values that JSON cannot hold is kept and counted in ``altered``, and the logger
    ``agentpref`` warns. While the database is locked or full, runs and feedback go to a file of the
    home, and from there to the database later. With ``strict``, ``record`` returns when the run is
    on disk, changes no value, and raises.

    The other methods raise ``LogClosed`` after ``close``. Those that judge a run raise
    ``UnknownRun`` if it is not in this home, ``InvalidFeedback`` for an argument that is wrong,
    with its name, and ``NotKept`` if the judgement could not be written. Each judgement is on disk
    when the call returns its id.

    >>> with Log("./.agentpref") as log:
    ...     run = log.record([{"role": "user", "content": "2 + 2?"}], "4")
    ...     log.thumbs(run, up=True)
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
        """Open a home, or make one of a missing or empty folder.

        Args:
            home: the folder; else ``$AGENTPREF_HOME``, else ``./.agentpref``.
            namespace: an agent or tenant with runs, pairs and a live revision of its own.
            queue_size: how many runs may wait for the disk before further ones are dropped.
            queue_bytes: how many bytes of JSON they may take.
            redact: takes each text and returns the text to store, for example
                ``agentpref.redact``. The thread that writes calls it.
            strict: make ``record`` durable, and let it raise.

        Raises:
            ConfigError: the namespace is not printable text, or the queue has no room.
            NotAHome, CorruptHome, NewerHome: the folder or its database cannot be used; no new
                database is made where one was lost.
        """
        if not isinstance(namespace, str) or not namespace or not namespace.isprintable():
            raise ConfigError(f"namespace is {namespace!r}, but must be printable text")
        for name, value in (("queue_size", queue_size), ("queue_bytes", queue_bytes)):
            if value < 1:
                raise ConfigError(f"{name} is {value!r}, but must be 1 or more")
        self.home = Home.create(home)
        self.namespace = namespace
        self.strict = strict
        ingest = Ingest(namespace, names_of(self.home), redact)
        self._writer = Writer(self.home, ingest, limit=queue_size, limit_bytes=queue_bytes)
        self._take = self._writer.commit if strict else self._writer.offer
        self._finalizer = weakref.finalize(self, self._writer.close, EXIT_SECONDS)

    def record(
        self,
        messages: Sequence[Message],
        output: str | Message,
        *,
        run_id: str | UUID | None = None,
        model: str | None = None,
        revision: str | None = None,
        thread_id: str | None = None,
        trace_id: str | UUID | None = None,
        user_id: str | None = None,
        tools: Sequence[Tool] = (),
        params: Mapping[str, Any] | None = None,
        token_ids: Sequence[int] | None = None,
        logprobs: Sequence[float] | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> str:
        """Record one model call as it is now; the app may change its values afterwards.

        Args:
            messages: what the model was asked, in OpenAI's shape.
            output: its answer: plain text or an assistant's message.
            run_id: an id of your own; recording the same run again changes nothing, and another
                run under the same id is dropped as ``RunExists``.
            model: name of the base model.
            revision: the adapter that answered, as the router's lease names it.
            thread_id: the conversation.
            trace_id: the agent's task that this call is a part of; its last answer can be judged
                by it.
            user_id: who asked.
            tools: the tools that the model was offered, in OpenAI's shape.
            params: the sampling parameters.
            token_ids: the answer's tokens, as the engine wrote them.
            logprobs: the natural log-probability of each token.
            tags: domains; the run's pairs are filed under the first one.
            metadata: anything else; what JSON cannot hold is kept as text, and what is no mapping
                under the key ``value``.

        Returns:
            The run's id, for ``thumbs``, ``feedback``, ``correct`` and ``compare``.

        Raises:
            InvalidMessage, RunExists, RedactionFailed, NotKept, LogClosed: only with ``strict``; an
                argument cannot be stored, the id belongs to another run, ``redact`` raised or
                returned no text, the run could not be written, or the log was closed.
        """
        now = time.time_ns()
        name = new_id(now) if run_id is None else as_id(run_id)
        try:
            if not name or not name.isprintable():
                raise InvalidMessage(
                    f"run_id is {described(run_id)}; pass a non-empty string of printable text"
                )
            if not self.strict:
                params, metadata = self._as_mapping(name, params), self._as_mapping(name, metadata)
            parts = (
                messages, output, tools, model, revision, thread_id, trace_id, user_id,
                params, token_ids, logprobs, tags, metadata,
            )  # fmt: skip
            try:
                body, changes = freeze(*parts)
            except InvalidMessage:
                body, changes = freeze_what_can_be_kept(*parts)
                if self.strict and changes:
                    raise
            if changes:
                self._writer.note_altered(name, changes)
            self._take(RawRun(name, now / 1e9, body, time.monotonic()))
        except AgentprefError as error:
            if self.strict:
                raise
            self._writer.drop(type(error).__name__, 1, error)
        return name or new_id(now)  # which no run has, so that nobody judges it

    def receive(self, rows: Sequence[Any], *, ahead: float = 0.0) -> list[AgentprefError | None]:
        """Keep what other logs recorded, under the ids that these gave; see ``RemoteLog``.

        What is known already changes nothing, so rows may come again. Judgements of runs in other
        namespaces are refused as those of runs that are not there.

        Args:
            rows: what :func:`agentpref.record.rows.row_of` writes.
            ahead: by how many seconds the clock of the sender is ahead of the one here.

        Returns:
            For each row ``None``, which says that it is on disk, or the error that refused it.

        Raises:
            NotKept, LogClosed: some of the rows could not be written; send all of them again.
        """
        from agentpref.record.receiving import receive

        return receive(self.home, self.namespace, self._writer, rows, ahead)

    def _as_mapping(self, name: str, value: Any) -> Any:
        """Keep params or metadata that are no mapping under the key ``value``."""
        if value is None or type(value) is dict or issubclass(type(value), Mapping):
            return value
        self._writer.note_altered(name, {"object": 1})
        return {"value": value}

    def _commit(self, given: Judgement) -> Judgement:
        given = checked(given)
        self._writer.commit(given)
        return given

    @property
    def dropped(self) -> dict[str, int]:
        """How many runs this log could not keep, by reason; a forked child starts from zero."""
        return self._writer.dropped

    @property
    def altered(self) -> dict[str, int]:
        """How many runs were kept with values changed that JSON cannot hold, by kind.

        ``surrogate`` is half of a character, ``key`` a key that is no string, ``integer`` a number
        beyond 64 bits, ``circular`` and ``deep`` what contains itself or is nested too deep, and
        ``object`` any other object (as an id, it is left out); ``user`` are runs and judgements
        whose user got no name of their own, because the home's ``user.keys`` is lost. A forked
        child starts from zero.
        """
        return self._writer.altered

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything recorded is on disk.

        Returns:
            Whether it is. False after ``timeout`` seconds, and when neither the database nor the
            spill can be written; the runs then wait in memory, and the log tries again.
        """
        return self._writer.flush(timeout)

    def verify(self, *, sample: int | None = None) -> list[Problem]:
        """Check every row of the home; return the problems, none for a sound home.

        Args:
            sample: check this many random rows of each large table instead, which takes about a
                second in a home of any size.

        Raises:
            CorruptHome: the database cannot be read.
        """
        self.flush()
        with closing(connect(self.home, readonly=True)) as connection, translated(self.home):
            problems = examine(connection, sample=sample).problems
            if (lost := keys_problem(connection)) is not None:
                problems.append(Problem(self.home.user_keys.name, "", lost))
            return problems

    def forget(self, user_id: str) -> Forgotten:
        """Delete a user's texts from the home, and mark the revisions that were trained on them.

        This reads the whole home and writes it again, which takes minutes for many gigabytes.
        Others may log meanwhile.

        Returns:
            What was removed, which revisions were trained on it, and how to rebuild them.

        Raises:
            UpdateRunning: an update or a merge is running, which has already read the texts.
            NotKept: the removal is incomplete; the same call again completes it.
        """
        from agentpref.record.deletion.forget import forget

        self.flush()
        return forget(self.home, user_id)

    def close(self) -> None:
        """Write what was recorded, and stop; a closed log takes nothing more."""
        self._finalizer.detach()
        self._writer.close(CLOSE_SECONDS)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Log({str(self.home.path)!r}, namespace={self.namespace!r})"
