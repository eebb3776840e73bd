"""Runs, feedback and comparisons, written to and read from one open database.

Writes are idempotent by id and join the caller's transaction if there is one. Reads return whole
values and parse each message once. A store has one user at a time, like its connection.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import orjson

from agentpref.errors import (
    ForgottenRun,
    ForgottenUser,
    InvalidFeedback,
    RecordError,
    RunExists,
    UnknownNamespace,
    UnknownRun,
    shown_id,
)
from agentpref.record.chains import Chains, read_feedback, read_run
from agentpref.record.database import insert_or_ignore, statement, transaction
from agentpref.record.finding import Wanted, find, newest, spellings, unknown_run
from agentpref.record.messages import (
    COMPARISON_COLUMNS,
    FEEDBACK_COLUMNS,
    RUN_COLUMNS,
    Linker,
    Node,
    RunRow,
    StoredRecord,
    as_json,
    run_row,
)
from agentpref.record.scales import fixed_scale
from agentpref.record.seals import sealed
from agentpref.record.standards import Standards, standards
from agentpref.record.sums import counted
from agentpref.types import (
    RETRACTION,
    REVISED_FROM,
    SAMPLED_FOR,
    Comparison,
    Feedback,
    Run,
)

_INSERT_FEEDBACK = statement("feedback", (*FEEDBACK_COLUMNS, "seal"))
_INSERT_COMPARISON = statement("comparison", (*COMPARISON_COLUMNS, "seal"))


def _columns(table: str, columns: Iterable[str]) -> str:
    return ", ".join(f"{table}.{name}" for name in columns)


_SELECT_RUN = f"SELECT {_columns('run', RUN_COLUMNS)} FROM run"
_JUDGED = """(
    SELECT run_id FROM feedback
    UNION SELECT run_a FROM comparison
    UNION SELECT run_b FROM comparison) AS judged"""
_PROMPTS_SINCE = """
    SELECT prompt FROM feedback CROSS JOIN run USING (run_id)
    WHERE feedback.created_at >= :since AND namespace = :namespace
    UNION
    SELECT prompt FROM comparison CROSS JOIN run ON run_id = run_a
    WHERE comparison.created_at >= :since AND namespace = :namespace"""

_STATS = """
SELECT runs, threads, users, feedback, corrections, comparisons, first_at, last_at FROM
    (SELECT count(*) AS runs, count(DISTINCT thread_id) AS threads,
        count(DISTINCT user_id) AS users, min(created_at) AS first_at, max(created_at) AS last_at
    FROM run WHERE {this}),
    (SELECT count(*) AS feedback, count(correction) AS corrections
    FROM feedback CROSS JOIN run USING (run_id) WHERE {this}),
    (SELECT count(*) AS comparisons FROM comparison CROSS JOIN run ON run_id = run_a WHERE {this})
"""
# One statement, because two would see two states of a home that others write to. CROSS JOIN makes
# SQLite go through the judgements and look up their runs: there are far fewer of them.

_NAMESPACES = """
SELECT namespace FROM run UNION ALL SELECT namespace FROM revision
UNION ALL SELECT namespace FROM updates JOIN update_pair USING (update_id)"""
_NAMED = 8
"""How many namespaces a message names."""


class Store:
    """The record of one home, over a connection of ``database.connect``.

    Writing raises ``UnknownRun`` if a run is not in this home, ``RunExists`` if another run has the
    same id, ``InvalidMessage`` if a message cannot be stored, and ``ForgottenUser`` if the user was
    forgotten later than the entry was made.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def add_run(self, run: Run) -> None:
        """Write a run and its messages; a run that is known changes nothing."""
        (refusal,) = self.add_runs([run_row(run)])
        if refusal is not None:
            raise refusal

    def add_runs(self, runs: Sequence[RunRow]) -> list[RecordError | None]:
        """Write many runs at once; return for each the error that ``add_run`` would raise."""
        with transaction(self._connection):
            refusals = self._refusals(runs)
            gone = [run.run_id for run, no in zip(runs, refusals, strict=True) if no is not None]
            bury_runs(self._connection, gone)
            accepted = [run for run, no in zip(runs, refusals, strict=True) if no is None]
            self._add_nodes(node for run in accepted for node in run.nodes)
            new = self._new_runs(accepted)
            rows = sealed(self._connection, "run", [run[:-1] for run in new])
            insert_or_ignore(self._connection, "run", (*RUN_COLUMNS, "seal"), rows)
            if len(new) < len(accepted):
                others = self._other_runs(accepted)
                refusals = [
                    no or others.get(id(run)) for run, no in zip(runs, refusals, strict=True)
                ]
        return refusals

    def add_feedback(self, feedback: Feedback) -> None:
        """Write feedback on a run, with its correction if it has one, and with its scale.

        Its run may be named in any way that ``finding.find`` understands. ``InvalidFeedback`` if
        its score is no thumb, or outside the scale of its source.
        """
        with transaction(self._connection):
            self._require_remembered(feedback)
            run_id, namespace, prompt = self._judged_run(feedback.run_id, feedback.created_at)
            row = {name: getattr(feedback, name) for name in FEEDBACK_COLUMNS} | {"run_id": run_id}
            scale = fixed_scale(self._connection, feedback, namespace)
            row["scale"] = None if scale is None else as_json(scale)
            if feedback.correction is not None:
                node = Linker().answer(prompt, feedback.correction)
                self._add_nodes([node])
                row["correction"] = node.id
            if feedback.value is not None:
                row["value"] = as_json(self._resolved(feedback))
            self._insert("feedback", _INSERT_FEEDBACK, [*row.values()])

    def add_comparison(self, comparison: Comparison) -> None:
        """Write a comparison; ``InvalidFeedback`` if its runs differ in prompt or namespace."""
        with transaction(self._connection):
            self._require_remembered(comparison)
            at = comparison.created_at
            run_a, space_a, prompt_a = self._judged_run(comparison.run_a, at)
            run_b, space_b, prompt_b = self._judged_run(comparison.run_b, at)
            if run_a == run_b and comparison.run_a != comparison.run_b:  # in two spellings
                raise InvalidFeedback(
                    f"run {run_a} is compared with itself; pass the ids of two runs"
                )
            if (space_a, prompt_a) != (space_b, prompt_b):
                what = "prompts" if space_a == space_b else "namespaces"
                raise InvalidFeedback(
                    f"runs {comparison.run_a} and {comparison.run_b} are of different {what}; "
                    "compare two answers to the same messages and tools"
                )
            row = {name: getattr(comparison, name) for name in COMPARISON_COLUMNS}
            row |= {"run_a": run_a, "run_b": run_b}
            self._insert("comparison", _INSERT_COMPARISON, [*row.values()])

    def run(self, run_id: str) -> Run:
        """Read one run; raise ``UnknownRun`` if it is not in this home."""
        row = self._connection.execute(f"{_SELECT_RUN} WHERE run_id = ?", (run_id,)).fetchone()
        if row is None:
            raise unknown_run(run_id)
        return read_run(row, Chains(self._connection))

    def runs(self, namespace: str) -> Iterator[Run]:
        """Read a namespace's runs, oldest first."""
        query = f"{_SELECT_RUN} WHERE namespace = ? ORDER BY created_at, run_id"
        messages = Chains(self._connection)
        for row in self._connection.execute(query, (namespace,)):
            yield read_run(row, messages)

    def newest_runs(self, wanted: Wanted, limit: int) -> Iterator[Run]:
        """Read the runs that are wanted, newest first, and no more than ``limit``."""
        messages = Chains(self._connection)
        rows = newest(self._connection, wanted, _columns("run", RUN_COLUMNS))
        found = (read_run(row, messages) for row in rows)
        return islice((run for run in found if wanted.has_text(run)), limit)

    def judged_runs(self, namespace: str, *, since: float | None = None) -> Iterator[Run]:
        """Read a namespace's runs that have feedback or comparisons, in the order of their ids.

        ``since`` (POSIX seconds) selects prompts that were judged then or later, with all judged
        answers to them, also the older ones.
        """
        messages = Chains(self._connection)
        columns, order = _columns("run", RUN_COLUMNS), "run.run_id"
        for row in self._judged(columns, _JUDGED, "judged.run_id", order, namespace, since):
            yield read_run(row, messages)

    def feedback(self, namespace: str, *, since: float | None = None) -> Iterator[Feedback]:
        """Read the feedback on a namespace's runs, oldest first; ``since`` as in ``judged_runs``.

        All feedback on a selected prompt is read, also what is older than ``since``.
        """
        columns = _columns("feedback", FEEDBACK_COLUMNS)
        order = "feedback.created_at, feedback_id"
        return self._read_feedback(
            self._judged(columns, "feedback", "feedback.run_id", order, namespace, since)
        )

    def comparisons(self, namespace: str, *, since: float | None = None) -> Iterator[Comparison]:
        """Read the comparisons of a namespace's runs, oldest first; ``since`` as above."""
        columns = _columns("comparison", COMPARISON_COLUMNS)
        order = "comparison.created_at, comparison_id"
        for row in self._judged(columns, "comparison", "run_a", order, namespace, since):
            yield Comparison(*row)

    def judgements(self, run_id: str) -> tuple[list[Feedback], list[Comparison]]:
        """Read what was said of one run, oldest first."""
        query = "SELECT {} FROM {} WHERE {} ORDER BY created_at"
        of_it = query.format(_columns("feedback", FEEDBACK_COLUMNS), "feedback", "run_id = ?1")
        feedback = [*self._read_feedback(self._connection.execute(of_it, (run_id,)))]
        columns, either = _columns("comparison", COMPARISON_COLUMNS), "run_a = ?1 OR run_b = ?1"
        of_two = query.format(columns, "comparison", either)
        return feedback, [Comparison(*row) for row in self._connection.execute(of_two, (run_id,))]

    def judged(
        self, namespace: str, run_ids: Sequence[str]
    ) -> tuple[list[Run], list[Feedback], list[Comparison]]:
        """Read some runs of a namespace and all that was said of them, in any order.

        The runs that they are compared with are read too, but not what was said of those.
        """
        ids, some = as_json([*run_ids]), "IN (SELECT value FROM json_each(?))"
        columns = _columns("comparison", COMPARISON_COLUMNS)
        found = self._connection.execute(
            f"SELECT {columns} FROM comparison WHERE run_a {some}", (ids,)
        )
        comparisons = [Comparison(*row) for row in found]
        columns = _columns("feedback", FEEDBACK_COLUMNS)
        found = self._connection.execute(
            f"SELECT {columns} FROM feedback WHERE run_id {some}", (ids,)
        )
        feedback = [*self._read_feedback(found)]
        asked = {*run_ids, *(row.run_b for row in comparisons)}
        query = f"{_SELECT_RUN} WHERE run_id {some} AND +namespace = ?"  # not by its index
        messages = Chains(self._connection)
        found = self._connection.execute(query, (as_json(sorted(asked)), namespace))
        return [read_run(row, messages) for row in found], feedback, comparisons

    def standards(self, namespace: str) -> Standards:
        """By what the judgements of a namespace are read; rows may have a scale of their own."""
        return standards(self._connection, namespace)

    def namespaces(self) -> list[str]:
        """Name the namespaces that have a run, a revision or an update, in alphabetical order."""
        query = f"SELECT DISTINCT namespace FROM ({_NAMESPACES}) ORDER BY namespace"
        return [name for (name,) in self._connection.execute(query)]

    def require_namespace(self, namespace: str) -> None:
        """Raise ``UnknownNamespace`` if other namespaces are in this home, and this one is not.

        A namespace is there once it has a run, a revision or an update that used something. While a
        home is empty, no name is wrong.
        """
        query = f"SELECT EXISTS (SELECT 1 FROM ({_NAMESPACES}) WHERE namespace = ?)"
        if self._connection.execute(query, (namespace,)).fetchone() == (1,):
            return
        if known := [repr(name) for name in self.namespaces()]:
            more = f" and {len(known) - _NAMED} more" if len(known) > _NAMED else ""
            raise UnknownNamespace(
                f"no namespace {shown_id(namespace)} is in this home; it has "
                f"{', '.join(known[:_NAMED])}{more}; name one of these, or log a run under the new "
                "name first"
            )

    def stats(self, namespace: str | None = None) -> dict[str, Any]:
        """Count what a namespace holds, or the whole home: .5 s for 700,000 runs.

        Returns:
            ``runs``, ``threads``, ``users``, ``feedback`` (which includes corrections),
            ``corrections``, ``comparisons``, and ``first_at`` and ``last_at`` of its runs (POSIX
            seconds; None without runs).
        """
        this = "true" if namespace is None else "namespace = :namespace"
        cursor = self._connection.execute(_STATS.format(this=this), {"namespace": namespace})
        names = [column[0] for column in cursor.description]
        return dict(zip(names, cursor.fetchone(), strict=True))

    @contextmanager
    def one_state(self) -> Iterator[None]:
        """Read everything in a block from one state of the home, whatever others write."""
        if self._connection.in_transaction:
            yield
            return
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.execute("ROLLBACK")

    def _judged(
        self, columns: str, judged: str, on: str, order: str, namespace: str, since: float | None
    ) -> Iterator[tuple[Any, ...]]:
        """Select from rows that name runs, and the runs; there are far more runs than such rows."""
        query = f"SELECT {columns} FROM {judged} CROSS JOIN run ON run.run_id = {on}"
        query += " WHERE namespace = :namespace"
        if since is not None:
            query += f" AND prompt IN ({_PROMPTS_SINCE})"
        values = {"namespace": namespace, "since": since}
        return self._connection.execute(f"{query} ORDER BY {order}", values)

    def _read_feedback(self, rows: Iterable[tuple[Any, ...]]) -> Iterator[Feedback]:
        messages = Chains(self._connection)
        return (read_feedback(row, messages) for row in rows)

    def _require_remembered(self, judgement: Feedback | Comparison) -> None:
        (refusal,) = self._refusals([judgement])
        if refusal is not None:
            raise refusal

    def _refusals(self, records: Sequence[StoredRecord]) -> list[RecordError | None]:
        """Refuse entries that are older than the forgetting of their user, or made of what went."""
        found = self._of_forgotten(records)
        for number, record in enumerate(records):
            if isinstance(record, RunRow) and found[number] is None:
                found[number] = self._of_gone(record)
        return found

    def _of_gone(self, run: RunRow) -> RecordError | None:
        """Refuse an answer that the home drew for, or made of, a run which was forgotten since.

        Nobody is its user, so nothing else would keep it out.
        """
        if REVISED_FROM not in run.metadata and SAMPLED_FOR not in run.metadata:
            return None
        about = orjson.loads(run.metadata)
        source = about.get(REVISED_FROM, about.get(SAMPLED_FOR))
        query = "SELECT 1 FROM forgotten_run WHERE hash = ?"
        values = (run_hash(source),) if isinstance(source, str) else (None,)
        if self._connection.execute(query, values).fetchone() is None:
            return None
        return ForgottenRun(f"run {shown_id(source)} was forgotten; an answer to it is dropped")

    def _of_forgotten(self, records: Sequence[StoredRecord]) -> list[RecordError | None]:
        users = {record.user_id for record in records} - {None}
        if not users:
            return [None] * len(records)
        some = "SELECT value FROM json_each(?)"
        query = f"SELECT user_id, at FROM forgotten WHERE user_id IN ({some})"
        forgotten = dict(self._connection.execute(query, (as_json([*users]),)))
        return [
            ForgottenUser(f"user {record.user_id} was forgotten later; the entry is dropped")
            if record.created_at <= forgotten.get(record.user_id, -math.inf)
            else None
            for record in records
        ]

    def _insert(self, table: str, statement: str, values: Sequence[Any]) -> None:
        """Insert a judgement with its seal, unless its id, the first value, is known."""
        query = f"SELECT 1 FROM {table} WHERE {table}_id = ?"
        if self._connection.execute(query, (values[0],)).fetchone() is None:
            (row,) = sealed(self._connection, table, [values])
            self._connection.execute(statement, row)

    def _new_runs(self, runs: Sequence[RunRow]) -> list[RunRow]:
        """The runs whose ids the home does not have, the first one of each id."""
        query = "SELECT run_id FROM run WHERE run_id IN (SELECT value FROM json_each(?))"
        ids = as_json([run.run_id for run in runs])
        known = {run_id for (run_id,) in self._connection.execute(query, (ids,))}
        new: dict[str, RunRow] = {}
        for run in runs:
            if run.run_id not in known:
                new.setdefault(run.run_id, run)
        return [*new.values()]

    def _other_runs(self, runs: Sequence[RunRow]) -> dict[int, RecordError]:
        """Refuse, by their ``id()``, runs that are not the ones which have their ids."""
        query = """SELECT run_id, namespace, prompt, output FROM run
            WHERE run_id IN (SELECT value FROM json_each(?))"""
        ids = as_json([run.run_id for run in runs])
        stored = {row[0]: row for row in self._connection.execute(query, (ids,))}
        return {
            id(run): RunExists(
                f"run {shown_id(run.run_id)} exists with another prompt, answer or namespace, and "
                "feedback on that id belongs to it; give each model call an id of its own"
            )
            for run in runs
            if stored[run.run_id] != (run.run_id, run.namespace, run.prompt, run.output)
        }

    def _add_nodes(self, nodes: Iterable[Node]) -> None:
        rows = {node.id: (node.id, node.parent, node.body.decode()) for node in nodes}
        insert_or_ignore(self._connection, "message", Node._fields, [*rows.values()])

    def _resolved(self, feedback: Feedback) -> Any:
        """The value of feedback; a retraction names the other run by the id that it has here."""
        value = feedback.value
        if feedback.key == RETRACTION and isinstance(value, Mapping) and value.get("against"):
            other, *_ = self._judged_run(value["against"], feedback.created_at)
            return {**value, "against": other}
        return value

    def _judged_run(self, name: str, at: float) -> tuple[str, str, str]:
        """Find what is judged: the id, namespace and prompt of a run, or of a trace's last one."""
        query = "SELECT run_id, namespace, prompt FROM run WHERE run_id = ?"
        row = self._connection.execute(query, (name,)).fetchone()
        if row is None:
            row = self._connection.execute(query, (self._found(name, at),)).fetchone()
        run_id, namespace, prompt = row
        return run_id, namespace, prompt

    def _found(self, name: str, at: float) -> str:
        try:
            return find(self._connection, name, at)
        except UnknownRun:
            query = "SELECT 1 FROM forgotten_run WHERE hash = ?"
            for spelling in spellings(name):
                if self._connection.execute(query, (run_hash(spelling),)).fetchone() is not None:
                    raise ForgottenRun(
                        f"run {shown_id(name)} was removed: it or its user was forgotten"
                    ) from None
            raise


def bury_runs(connection: sqlite3.Connection, run_ids: Iterable[str]) -> None:
    """Note which runs go because they or their user are forgotten: nobody judges them later."""
    hashes = [run_hash(run_id) for run_id in run_ids]
    some = "hash IN (SELECT value FROM json_each(?))"
    if hashes:
        with counted(connection, "forgotten_run", where=some, values=(as_json(hashes),)):
            rows = ((one,) for one in hashes)
            connection.executemany("INSERT OR IGNORE INTO forgotten_run VALUES (?)", rows)


def run_hash(run_id: str) -> int:
    """What is kept of a run that was removed."""
    digest = hashlib.blake2b(run_id.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
