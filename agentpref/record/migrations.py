"""The schema, as numbered steps in the order they were needed.

Each step is a function that changes a database from the version before; its docstring gives the
reason for the columns it adds. A released step is never edited: a new one is added. An older
agentpref keeps working with a database that has more steps than it knows, unless one of these steps
is breaking. ``database`` applies each step, with the record of it, in one transaction. Times are
seconds since 1970; columns of lists and mappings hold JSON text.
"""

from __future__ import annotations

import functools
import sqlite3

from agentpref.home import Home
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.listing import LISTING
from agentpref.record.scales import declare_what_had_a_scale, derive_scales
from agentpref.record.seals import add_seals, add_sums
from agentpref.record.steps import STEPS as STEPS
from agentpref.record.steps import Step as Step
from agentpref.record.steps import breaking_step, step
from agentpref.record.sums import resum
from agentpref.record.views import RUN_TEXT, VIEWS


@step
def messages_and_runs(connection: sqlite3.Connection) -> None:
    """What happened.

    ``message`` is a Merkle chain: ``id`` hashes ``parent`` and ``body``, its keys sorted. So a
    conversation of n turns costs n rows, equal prompts are one row, and a changed body is detected.
    It keeps its rowid: WITHOUT ROWID takes 1.15 times the space for messages of 1 kB and 3.4 times
    for those of 2 kB, because a row of more than a quarter of an index page overflows.

    ``run.prompt`` and ``run.output`` are the last node of what was asked and its child. Three ids
    are the app's own: ``trace_id`` is a task, ``thread_id`` a conversation, ``user_id`` the user
    to forget. ``revision`` says which weights answered; ``token_ids`` and ``logprobs`` are what the
    engine wrote, which tokenising the text again need not give.
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
    """What people, models and code thought of it.

    ``feedback.score`` is a number that can be compared; ``value`` is anything else, as JSON.
    ``correction`` is the output as it should have been, a child of the run's prompt beside the
    run's own output. ``user_id`` is the one who judged. A comparison has the namespace of its runs.
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
    """What was learned from it.

    ``parent`` and ``candidate`` are revisions, ``verdict`` is the gate's, and ``report`` is what
    the gate saw. ``update_pair`` says which pairs trained a revision and whether they were new or
    replayed: the lineage from a user's feedback to the weights.
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
    """Log-probabilities that a policy gave to a text, so that no update computes one twice.

    ``policy`` names the weights and the template, ``row`` the token ids. Both are content
    addresses, so a value is never stale. ``logp`` sums the natural logs of ``tokens`` tokens.
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

    ``revision.seq`` counts in the whole home, because it is part of the revision's name and all
    namespaces keep their revisions in one folder. ``serving`` has one row per namespace, changed by
    compare-and-swap on ``generation``. Each change appends a row to ``serving_history``.
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

    From here on ``user_id`` of ``run``, ``feedback`` and ``comparison`` is a keyed hash; the key is
    in the file ``user.keys``. ``forgotten`` keeps the hash of who was forgotten and when, so that
    what waits elsewhere (a queue, a spill, another home) does not come back. ``pair_source`` says
    which feedback and comparisons made each pair that an update used: it leads from a user's
    feedback to the revisions that trained on it, which are then ``tainted_at`` a time. Older
    programs would write user ids as they are, and let the forgotten back in.
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
    """What people read, with sqlite-utils, Datasette or SQL of their own.

    A row of ``run_text`` is one model call: its time and user, the user's last question, the
    answer, and the mean of its thumbs. ``feedback_text`` and ``comparison_text`` show judgements
    beside the texts that they judge; ``lineage`` shows an update, the gate's verdict, the state of
    its revision, and how many pairs it used; ``message_text`` shows one message. For a message of
    several parts, ``text`` has each text on a line of its own and each other part as its type in
    brackets; ``tool_calls`` is JSON.

    ``time`` is UTC as ISO 8601, for reading. To filter or sort, use ``created_at`` (for runs with a
    ``namespace``) or the ids: those are indexed, also through the views.
    """
    connection.execute("CREATE INDEX feedback_in_time ON feedback(created_at)")
    connection.execute("CREATE INDEX comparison_in_time ON comparison(created_at)")
    connection.execute("CREATE INDEX comparison_on_a ON comparison(run_a)")
    connection.execute("CREATE INDEX comparison_on_b ON comparison(run_b)")
    for view in VIEWS:
        connection.execute(view)


@step
def tallies(connection: sqlite3.Connection) -> None:
    """Nothing: it made tables of counts and triggers, which ``counted_when_asked`` drops."""


@step
def shorter_time_index(connection: sqlite3.Connection) -> None:
    """Less to write for each run.

    ``run_in_time`` held the run's id too, 37 bytes a run, to sort runs of the same microsecond;
    such ties hardly ever happen.
    """
    connection.execute("DROP INDEX run_in_time")
    connection.execute("CREATE INDEX run_in_time ON run(namespace, created_at)")


@step
def standing(connection: sqlite3.Connection) -> None:
    """Which revisions must not serve for now, and which are gone.

    A revision that was found broken, or that an operator took out of service, is
    ``quarantined_at`` a time for a reason until it is released. One whose folder was deleted to
    make room is ``pruned_at`` a time for good: its row stays, because history and taint need it.
    """
    connection.execute("ALTER TABLE revision ADD COLUMN quarantined_at REAL")
    connection.execute("ALTER TABLE revision ADD COLUMN quarantine_reason TEXT")
    connection.execute("ALTER TABLE revision ADD COLUMN pruned_at REAL")


@breaking_step
def counted_when_asked(connection: sqlite3.Connection) -> None:
    """Less to write for each run and judgement.

    Counts come from plain queries now, which take half a second on 700,000 runs and 50,000
    judgements. The tables and triggers that the step ``tallies`` made in older homes go. The step
    is breaking because older programs read these tables; what they still log waits in the spill.
    """
    for trigger in _TALLY_TRIGGERS:
        connection.execute(f"DROP TRIGGER IF EXISTS {trigger}")
    for table in ("tally", "thread", "asker", "judged", "scale", "counted"):
        connection.execute(f"DROP TABLE IF EXISTS {table}")


@step
def scales_and_retractions(connection: sqlite3.Connection) -> None:
    """What a score means, and what was taken back.

    ``feedback.scale`` is the lowest and the highest score that could have been given, as a list; an
    end that is not known is null. ``feedback_scale`` has the scale of each source of scores since
    it first showed one, and refuses scores outside it. Rows from before get the scale that all
    scores of their source show together; imported ones were 0 or 1.

    Feedback with the key ``retraction`` takes back what its voter said of the run before. The mean
    of thumbs in ``run_text`` has the newest of each voter that was not taken back.
    """
    connection.execute("ALTER TABLE feedback ADD COLUMN scale TEXT")
    connection.execute(
        """CREATE TABLE feedback_scale (
            namespace TEXT NOT NULL,
            key TEXT NOT NULL,
            source TEXT NOT NULL,
            low REAL NOT NULL,
            high REAL NOT NULL,
            since REAL NOT NULL,
            PRIMARY KEY (namespace, key, source)
        ) WITHOUT ROWID"""
    )
    derive_scales(connection)
    connection.execute("DROP VIEW run_text")
    connection.execute(RUN_TEXT)


@step
def listing(connection: sqlite3.Connection) -> None:
    """The list of examples, so that no update reads all judgements.

    ``listing`` says how many judgements of the home (the first ones in the order they came in) the
    list of a namespace has seen, and by which ``rules`` and ``scales`` it was made.
    ``stale_prompt`` names prompts whose examples are to be listed anew, and ``judged_run`` the
    judged answers to each prompt. ``example`` has what an update chooses by, and no text: a prompt
    is held out where its ``point``, from 0 to 1, is below the share. ``left_out`` counts judgements
    without an example. Only updates write these tables, and triggers where rows are deleted or
    changed; what comes in is found by its place at the end.
    """
    for statement in LISTING:
        connection.execute(statement)


@step
def user_keys(connection: sqlite3.Connection) -> None:
    """Which keys the home's users are named with.

    ``user_key`` has a fingerprint of each key of ``user.keys``: a keyed hash of a constant, by
    which a missing or a wrong file is noticed. The next process that has the keys fills it.
    """
    connection.execute(
        "CREATE TABLE user_key (fingerprint TEXT PRIMARY KEY NOT NULL) WITHOUT ROWID"
    )


@breaking_step
def seals(connection: sqlite3.Connection) -> None:
    """What was changed by other hands.

    ``seal`` hashes a row and the seal of the row before it; ``last_seal`` has the seal of a table's
    last row. So `verify` finds rows that were edited, inserted or deleted. The step is breaking
    because older programs would write rows without a seal.
    """
    add_seals(connection)


@step
def journal_and_holds(connection: sqlite3.Connection) -> None:
    """What came of every night, and why nothing may be made live.

    ``journal`` has the updates that are not in ``updates``: nothing new, busy, failed, interrupted,
    or (while ``ended_at`` is null) running. Apart, they mislead nobody who reads what was learned;
    not sealed, a row can be written again when its update ends, or by the next that ends alike
    (``times``). ``hold_reason`` is why nothing is promoted after a ``hold`` in ``serving_history``.
    """
    connection.execute(
        """CREATE TABLE journal (
            number INTEGER PRIMARY KEY AUTOINCREMENT, update_id TEXT NOT NULL,
            namespace TEXT NOT NULL, started_at REAL NOT NULL, ended_at REAL, verdict TEXT,
            report TEXT NOT NULL, times INTEGER NOT NULL DEFAULT 1, first_at REAL NOT NULL
        )"""
    )
    connection.execute(
        """CREATE TABLE hold_reason (
            namespace TEXT NOT NULL, generation INTEGER NOT NULL, reason TEXT NOT NULL,
            PRIMARY KEY (namespace, generation)
        ) WITHOUT ROWID"""
    )


@step
def declared_keys_and_traces(connection: sqlite3.Connection) -> None:
    """Which keys are preferences, and the last answer of a trace.

    Only scores under ``thumbs`` and under keys that ``feedback_scale`` has a known scale of count
    as preferences. The keys of older homes under which people's scores had a scale are declared so,
    and go on to count. ``run_of_trace`` finds the runs of a trace, to judge it from any process;
    runs without a trace cost nothing.
    """
    declare_what_had_a_scale(connection)
    connection.execute("CREATE INDEX run_of_trace ON run(trace_id) WHERE trace_id IS NOT NULL")


@step
def forgotten_runs(connection: sqlite3.Connection) -> None:
    """Which runs went because their user was forgotten.

    ``forgotten_run`` has 64 bits of a hash of each one's id. What somebody else said of such a run,
    and waited in a spill, may quote it: it is dropped, and not kept for the operator.
    """
    connection.execute("CREATE TABLE forgotten_run (hash INTEGER PRIMARY KEY)")


@breaking_step
def sums_of_tables(connection: sqlite3.Connection) -> None:
    """What every table held when agentpref wrote to it last.

    ``table_sum`` has the number of a table's rows and the sum of their hashes. So `verify` finds
    rows that were changed, added or deleted in any table, whatever is written or removed after
    that; it replaces ``last_seal``. ``logp.checksum`` hashes a score, so that an update uses none
    that was changed. The step is breaking because older programs would write and add nothing.
    """
    add_sums(connection)


@breaking_step
def answers(connection: sqlite3.Connection) -> None:
    """What live and a candidate wrote on the same held-out prompts, to show it beside a report.

    ``number`` orders the answers of one update. A removal deletes them with their prompt, and
    forgetting a user those of every update and descendant that may have learned from the text. The
    step is breaking because older programs would forget a user and leave these.
    """
    connection.execute(
        """CREATE TABLE answers (
            update_id TEXT NOT NULL, number INTEGER NOT NULL, prompt TEXT NOT NULL,
            before TEXT NOT NULL, after TEXT NOT NULL,
            PRIMARY KEY (update_id, number)
        ) WITHOUT ROWID"""
    )
    resum(connection, ["answers"])


@breaking_step
def judges(connection: sqlite3.Connection) -> None:
    """Who judges beside people, and how far each is trusted.

    ``judge`` has the versions of judges by the name that their comparisons have as ``user_id``.
    ``verdict`` has each answer of a judge to a question, so that nothing is asked twice; a removal
    deletes those on prompts of which it removes something. ``calibration`` says how right a voter
    is: ``noise`` maps each trusted stratum to its share of wrong verdicts. The step is breaking
    because older programs would train on what a model said that nobody calibrated.
    """
    connection.execute(
        """CREATE TABLE judge (
            voter TEXT PRIMARY KEY NOT NULL, name TEXT NOT NULL, digest TEXT NOT NULL,
            rubric TEXT NOT NULL, source TEXT NOT NULL, created_at REAL NOT NULL
        ) WITHOUT ROWID"""
    )
    connection.execute(
        """CREATE TABLE verdict (
            judge TEXT NOT NULL, question TEXT NOT NULL, prompt TEXT NOT NULL,
            created_at REAL NOT NULL, said TEXT NOT NULL,
            PRIMARY KEY (judge, question)
        ) WITHOUT ROWID"""
    )
    connection.execute(
        """CREATE TABLE calibration (
            number INTEGER PRIMARY KEY AUTOINCREMENT, namespace TEXT NOT NULL,
            voter TEXT NOT NULL, created_at REAL NOT NULL, noise TEXT NOT NULL,
            report TEXT NOT NULL
        )"""
    )
    resum(connection, ["judge", "verdict", "calibration"])


_TALLY_TRIGGERS = (
    "thread_comes", "thread_goes", "run_leaves_thread", "run_changes_thread", "asker_comes",
    "asker_goes", "run_leaves_asker", "run_changes_asker", "run_goes", "run_was_judged",
    "run_counted_last", "feedback_goes", "feedback_changes", "feedback_counted_last",
    "comparison_goes", "comparison_counted_last",
)  # fmt: skip
