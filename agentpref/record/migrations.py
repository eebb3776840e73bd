"""The schema, as numbered steps in the order they were needed.

Each step is a function that changes a database from the version before; its docstring gives the
reason for the columns it adds. A step that has been released is never edited: the next one is
written. A program that knows fewer steps than a database has goes on with it, unless one of those
that it does not know is breaking. Applying the steps, each with the record of it in one
transaction, is ``database``'s work. Times are seconds since 1970; columns of lists and mappings
hold JSON text.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from agentpref.home import Home
from agentpref.record import tally_schema
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.views import create_views

Change: TypeAlias = Callable[[sqlite3.Connection], None]


class Step(NamedTuple):
    """One change of the schema; ``version`` is what the database has after it.

    ``breaking`` says that a program which does not know the step must not use the database any
    more, not even one that had it open before.
    """

    version: int
    name: str
    change: Change
    breaking: bool = False


STEPS: list[Step] = []


def step(change: Change) -> Change:
    """Add a change, under the next number, with which older programs may go on.

    Such a change adds: tables, indices, views, triggers that need nobody's help, columns that may
    be null or have a default. What older programs read stays, and means what it meant.
    """
    STEPS.append(Step(len(STEPS) + 1, change.__name__, change))
    return change


def breaking_step(change: Change) -> Change:
    """Add a change, under the next number, with which older programs must not go on."""
    STEPS.append(Step(len(STEPS) + 1, change.__name__, change, breaking=True))
    return change


@step
def messages_and_runs(connection: sqlite3.Connection) -> None:
    """What happened.

    ``message`` is a Merkle chain: ``id`` hashes ``parent`` and ``body``, its keys sorted, so that a
    conversation of n turns costs n rows, equal prompts are one row, and a changed body convicts
    itself. It keeps its rowid: WITHOUT ROWID takes 1.15 times the space for messages of 1 kB and
    3.4 times for those of 2 kB, since a row of more than a quarter of an index page goes on in a
    page of its own.

    ``run.prompt`` and ``run.output`` are the last node of what was asked and its child. The three
    ids are the host's own and are kept apart because they are asked for apart: ``trace_id`` is a
    task, ``thread_id`` a conversation, ``user_id`` whom to forget. ``revision`` says which weights
    answered; ``token_ids`` and ``logprobs`` are what the engine truly wrote, which re-tokenising
    the text need not give again.
    """
    connection.execute(
        """CREATE TABLE message (
            id TEXT PRIMARY KEY NOT NULL,
            parent TEXT REFERENCES message(id),
            body TEXT NOT NULL
        )"""
    )
    connection.execute(
        """CREATE TABLE run (
            run_id TEXT PRIMARY KEY NOT NULL,
            namespace TEXT NOT NULL,
            created_at REAL NOT NULL,
            prompt TEXT NOT NULL REFERENCES message(id),
            output TEXT NOT NULL REFERENCES message(id),
            model TEXT,
            revision TEXT,
            thread_id TEXT,
            trace_id TEXT,
            user_id TEXT,
            params TEXT NOT NULL,
            token_ids TEXT,
            logprobs TEXT,
            tags TEXT NOT NULL,
            metadata TEXT NOT NULL
        )"""
    )
    connection.execute("CREATE INDEX run_in_time ON run(namespace, created_at, run_id)")


@step
def feedback_and_comparisons(connection: sqlite3.Connection) -> None:
    """What was thought of it.

    ``feedback.score`` is a number that can be compared and ``value`` whatever else was said, as
    JSON. ``correction`` is the output as it should have been, a child of the run's prompt beside
    the run's own output. ``user_id`` is the judge's, who need not be the one that asked. A
    comparison has no namespace: its two runs have.
    """
    connection.execute(
        """CREATE TABLE feedback (
            feedback_id TEXT PRIMARY KEY NOT NULL,
            run_id TEXT NOT NULL REFERENCES run(run_id),
            created_at REAL NOT NULL,
            key TEXT NOT NULL,
            score REAL,
            value TEXT,
            comment TEXT,
            source TEXT NOT NULL,
            user_id TEXT,
            correction TEXT REFERENCES message(id)
        )"""
    )
    connection.execute("CREATE INDEX feedback_on_run ON feedback(run_id)")
    connection.execute(
        """CREATE TABLE comparison (
            comparison_id TEXT PRIMARY KEY NOT NULL,
            created_at REAL NOT NULL,
            run_a TEXT NOT NULL REFERENCES run(run_id),
            run_b TEXT NOT NULL REFERENCES run(run_id),
            winner TEXT NOT NULL,
            source TEXT NOT NULL,
            user_id TEXT,
            comment TEXT
        )"""
    )


@step
def updates(connection: sqlite3.Connection) -> None:
    """What was learnt from it.

    ``parent`` and ``candidate`` are revisions, ``verdict`` is empty until the gate has ruled, and
    ``report`` is all that the gate saw. ``update_pair`` says which pairs trained a revision and
    whether they were new or replayed: the lineage from a user's words to the weights.
    """
    connection.execute(
        """CREATE TABLE updates (
            update_id TEXT PRIMARY KEY NOT NULL,
            namespace TEXT NOT NULL,
            created_at REAL NOT NULL,
            finished_at REAL,
            parent TEXT,
            candidate TEXT,
            verdict TEXT,
            report TEXT
        )"""
    )
    connection.execute(
        """CREATE TABLE update_pair (
            update_id TEXT NOT NULL REFERENCES updates(update_id),
            pair_id TEXT NOT NULL,
            role TEXT NOT NULL,
            PRIMARY KEY (update_id, pair_id)
        ) WITHOUT ROWID"""
    )


@step
def log_probabilities(connection: sqlite3.Connection) -> None:
    """What a policy gave to a text, so that no night scores a row twice.

    ``policy`` names the weights and template that scored, ``row`` the token ids that were scored:
    neither can change under the same name, so a row is never stale. ``tokens`` is how many were
    summed into ``logp`` (natural log).
    """
    connection.execute(
        """CREATE TABLE logp (
            policy TEXT NOT NULL,
            row TEXT NOT NULL,
            logp REAL NOT NULL,
            tokens INTEGER NOT NULL,
            PRIMARY KEY (policy, row)
        ) WITHOUT ROWID"""
    )


@step
def revisions_and_serving(connection: sqlite3.Connection) -> None:
    """What serves.

    ``revision.seq`` counts in the whole home, since it stands in the revision's name and all
    namespaces keep their revisions in one folder. ``serving`` is one row per namespace, changed
    only by compare-and-swap on ``generation``; what it was before is appended to
    ``serving_history``, which nothing rewrites.
    """
    connection.execute(
        """CREATE TABLE revision (
            revision_id TEXT PRIMARY KEY NOT NULL,
            namespace TEXT NOT NULL,
            seq INTEGER NOT NULL UNIQUE,
            parent TEXT,
            created_at REAL NOT NULL,
            manifest TEXT NOT NULL
        )"""
    )
    connection.execute(
        """CREATE TABLE serving (
            namespace TEXT PRIMARY KEY NOT NULL,
            live TEXT,
            canary TEXT,
            weight REAL NOT NULL DEFAULT 0,
            generation INTEGER NOT NULL DEFAULT 0
        ) WITHOUT ROWID"""
    )
    connection.execute(
        """CREATE TABLE serving_history (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            namespace TEXT NOT NULL,
            at REAL NOT NULL,
            generation INTEGER NOT NULL,
            action TEXT NOT NULL,
            live TEXT,
            canary TEXT,
            weight REAL NOT NULL DEFAULT 0
        )"""
    )


@breaking_step
def privacy(connection: sqlite3.Connection) -> None:
    """Whom to forget, and what learned from them.

    ``user_id`` of ``run``, ``feedback`` and ``comparison`` is a keyed hash from here on; the key is
    in the file ``user.keys``. ``forgotten`` keeps the hash of who was forgotten and when, so that
    what still waits elsewhere (a queue, a spill, another home) is not let in again. ``pair_source``
    says which feedback and comparisons each pair was made of that an update used: the way from a
    user's words to the revisions whose training saw them, which are then ``tainted_at`` a time.
    Older programs would write user ids as they are, and let the forgotten back in.
    """
    connection.execute(
        """CREATE TABLE forgotten (
            user_id TEXT PRIMARY KEY NOT NULL,
            at REAL NOT NULL
        ) WITHOUT ROWID"""
    )
    connection.execute(
        """CREATE TABLE pair_source (
            source TEXT NOT NULL,
            pair_id TEXT NOT NULL,
            PRIMARY KEY (source, pair_id)
        ) WITHOUT ROWID"""
    )
    connection.execute("ALTER TABLE revision ADD COLUMN tainted_at REAL")
    keys = functools.cache(lambda: Pseudonyms.of(Home.of(connection)))  # made when first needed
    connection.create_function("pseudonym", 1, lambda user_id: keys().name(user_id))
    for table in ("run", "feedback", "comparison"):
        connection.execute(
            f"UPDATE {table} SET user_id = pseudonym(user_id) WHERE user_id IS NOT NULL"
        )


@step
def views(connection: sqlite3.Connection) -> None:
    """What people read.

    A row of ``run_text`` is one model call: when, for whom, the last question of the user, the
    answer, and what its thumbs say on average. ``feedback_text`` and ``comparison_text`` are what
    was said, beside the texts that it was said of; ``lineage`` is an update, what the gate ruled,
    what became of its revision, and how many pairs went in; ``message_text`` is one message. Where
    a message is a list of parts, its texts stand one below the other, and another part as its type
    in brackets; what was called beside the text is JSON in ``tool_calls``.

    ``time`` is UTC as ISO 8601, to be read. To filter or sort, use ``created_at`` (for runs with a
    ``namespace``) or the ids: those are indexed, also in the views, which are no copies.
    """
    connection.execute("CREATE INDEX feedback_in_time ON feedback(created_at)")
    connection.execute("CREATE INDEX comparison_in_time ON comparison(created_at)")
    connection.execute("CREATE INDEX comparison_on_a ON comparison(run_a)")
    connection.execute("CREATE INDEX comparison_on_b ON comparison(run_b)")
    create_views(connection)


@step
def tallies(connection: sqlite3.Connection) -> None:
    """What can be told at once of a record of any size.

    ``tally`` counts what each namespace holds. Its row '' takes back the threads and users that
    stand in several, so that the sum of all rows is the home's. ``thread`` and ``asker`` count the
    runs of each conversation and of each user. ``judged`` holds the runs that something was said
    of, by prompt, since that is how pairs are made; it may name some of which nothing is said any
    more. ``scale`` says what the scores of a key look like, corrections aside: how many there are,
    how many are below 0, and how many beyond -1 to 1.

    Triggers on what comes would double the time that writing takes (15 to 20 µs more for a run of
    16, 40 for a judgement of 170). So rows are counted many at a time, in the order in which they
    were written; ``counted`` names the last of each table that was, and whoever reads adds those
    behind it. What goes is taken off by triggers. A row goes after what was said of it, and none is
    ever replaced or moved to another run or namespace.
    """
    for statement in (*tally_schema.TABLES, *tally_schema.TRIGGERS, *tally_schema.FILLING):
        connection.execute(statement)


@step
def shorter_time_index(connection: sqlite3.Connection) -> None:
    """Less to write for each run.

    ``run_in_time`` held the run's id too, to sort runs of the same microsecond without looking at
    them: 37 bytes a run, for ties that hardly ever are.
    """
    connection.execute("DROP INDEX run_in_time")
    connection.execute("CREATE INDEX run_in_time ON run(namespace, created_at)")


@step
def standing(connection: sqlite3.Connection) -> None:
    """Which revisions must not serve for now, and which are gone.

    A revision that was found broken, or that an operator wants out of the way, is
    ``quarantined_at`` a time for a reason until it is released. One whose folder went, to make
    room, is ``pruned_at`` a time for good: its row stays, since history and taint lead through it.
    """
    connection.execute("ALTER TABLE revision ADD COLUMN quarantined_at REAL")
    connection.execute("ALTER TABLE revision ADD COLUMN quarantine_reason TEXT")
    connection.execute("ALTER TABLE revision ADD COLUMN pruned_at REAL")
