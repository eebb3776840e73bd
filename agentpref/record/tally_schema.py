"""The statements of the step ``tallies``, which says what they are for; frozen with it.

``additions`` is how rows are counted: all of them when the step is taken, and from then on some at
a time. Knows nothing of who does that, and of who reads: see ``tallies``.
"""

from __future__ import annotations

from collections.abc import Mapping

TABLES = (
    """CREATE TABLE tally (
        namespace TEXT PRIMARY KEY NOT NULL,
        runs INTEGER NOT NULL DEFAULT 0,
        threads INTEGER NOT NULL DEFAULT 0,
        users INTEGER NOT NULL DEFAULT 0,
        feedback INTEGER NOT NULL DEFAULT 0,
        corrections INTEGER NOT NULL DEFAULT 0,
        comparisons INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID""",
    """CREATE TABLE thread (
        thread_id TEXT NOT NULL,
        namespace TEXT NOT NULL,
        runs INTEGER NOT NULL,
        PRIMARY KEY (thread_id, namespace)
    ) WITHOUT ROWID""",
    """CREATE TABLE asker (
        user_id TEXT NOT NULL,
        namespace TEXT NOT NULL,
        runs INTEGER NOT NULL,
        PRIMARY KEY (user_id, namespace)
    ) WITHOUT ROWID""",
    """CREATE TABLE judged (
        namespace TEXT NOT NULL,
        prompt TEXT NOT NULL,
        run_id TEXT NOT NULL,
        PRIMARY KEY (namespace, prompt, run_id)
    ) WITHOUT ROWID""",
    """CREATE TABLE scale (
        namespace TEXT NOT NULL,
        key TEXT NOT NULL,
        source TEXT NOT NULL,
        scores INTEGER NOT NULL,
        negative INTEGER NOT NULL,
        beyond INTEGER NOT NULL,
        PRIMARY KEY (namespace, key, source)
    ) WITHOUT ROWID""",
    "CREATE TABLE counted (what TEXT PRIMARY KEY NOT NULL, last TEXT) WITHOUT ROWID",
    "INSERT INTO counted (what) VALUES ('run'), ('feedback'), ('comparison')",
    "INSERT INTO tally (namespace) VALUES ('')",
)


def counted(table: str) -> str:
    """Write the number of a table's last row that is counted; 0 where none is."""
    return (
        f"coalesce((SELECT {table}.rowid FROM counted JOIN {table} ON {table}_id = last"
        f" WHERE what = '{table}'), 0)"
    )


def additions(where: str) -> Mapping[str, tuple[str, ...]]:
    """Write the statements that count rows of each table; ``{table}`` is its name in ``where``."""
    runs, feedback, comparisons = (
        where.format(table=table) for table in ("run", "feedback", "comparison")
    )
    return {
        "run": (
            f"""INSERT INTO tally (namespace, runs)
            SELECT namespace, count(*) FROM run WHERE {runs} GROUP BY namespace
            ON CONFLICT (namespace) DO UPDATE SET runs = runs + excluded.runs""",
            _members("thread", "thread_id", runs),
            _members("asker", "user_id", runs),
        ),
        "feedback": (
            f"""INSERT INTO tally (namespace, feedback, corrections)
            SELECT namespace, count(*), count(correction)
            FROM feedback CROSS JOIN run USING (run_id) WHERE {feedback} GROUP BY namespace
            ON CONFLICT (namespace) DO UPDATE SET feedback = feedback + excluded.feedback,
                corrections = corrections + excluded.corrections""",
            f"""INSERT INTO scale (namespace, key, source, scores, negative, beyond)
            SELECT namespace, key, source, count(*), sum(score < 0), sum(abs(score) > 1)
            FROM feedback CROSS JOIN run USING (run_id)
            WHERE {feedback} AND score IS NOT NULL AND correction IS NULL
            GROUP BY namespace, key, source
            ON CONFLICT (namespace, key, source) DO UPDATE SET scores = scores + excluded.scores,
                negative = negative + excluded.negative, beyond = beyond + excluded.beyond""",
            _judged("feedback", "feedback.run_id", feedback),
        ),
        "comparison": (
            f"""INSERT INTO tally (namespace, comparisons)
            SELECT namespace, count(*) FROM comparison CROSS JOIN run ON run_id = run_a
            WHERE {comparisons} GROUP BY namespace
            ON CONFLICT (namespace) DO UPDATE SET comparisons = comparisons + excluded.comparisons
            """,
            _judged("comparison", "run_a", comparisons),
            _judged("comparison", "run_b", comparisons),
        ),
    }


def _members(table: str, key: str, where: str) -> str:
    return f"""INSERT INTO {table} ({key}, namespace, runs)
    SELECT {key}, namespace, count(*) FROM run WHERE {where} AND {key} IS NOT NULL
    GROUP BY {key}, namespace
    ON CONFLICT ({key}, namespace) DO UPDATE SET runs = runs + excluded.runs"""


def _judged(table: str, run: str, where: str) -> str:
    return f"""INSERT INTO judged (namespace, prompt, run_id)
    SELECT namespace, prompt, run.run_id FROM {table} CROSS JOIN run ON run.run_id = {run}
    WHERE {where} ON CONFLICT DO NOTHING"""


FILLING = (
    *(statement for some in additions("true").values() for statement in some),
    *(
        f"""UPDATE counted SET last = (
            SELECT {table}_id FROM {table} ORDER BY rowid DESC LIMIT 1)
        WHERE what = '{table}'"""
        for table in ("run", "feedback", "comparison")
    ),
)


def _member_triggers(table: str, key: str, count: str) -> tuple[str, ...]:
    """Triggers that keep a table of distinct keys of runs, and the counts of them."""
    this = f"{key} = old.{key} AND namespace = old.namespace"
    elsewhere = f"""EXISTS (SELECT 1 FROM {table} AS other
                WHERE other.{key} = {{row}}.{key} AND other.namespace <> {{row}}.namespace)"""
    leave = f"""UPDATE {table} SET runs = runs - 1 WHERE {this};
            DELETE FROM {table} WHERE {this} AND runs = 0;"""
    return (
        f"""CREATE TRIGGER {table}_comes AFTER INSERT ON {table} BEGIN
            UPDATE tally SET {count} = {count} + 1 WHERE namespace = new.namespace;
            UPDATE tally SET {count} = {count} - 1
            WHERE namespace = '' AND {elsewhere.format(row="new")};
        END""",
        f"""CREATE TRIGGER {table}_goes AFTER DELETE ON {table} BEGIN
            UPDATE tally SET {count} = {count} - 1 WHERE namespace = old.namespace;
            UPDATE tally SET {count} = {count} + 1
            WHERE namespace = '' AND {elsewhere.format(row="old")};
        END""",
        f"""CREATE TRIGGER run_leaves_{table} BEFORE DELETE ON run
        WHEN old.{key} IS NOT NULL AND old.rowid <= {counted("run")} BEGIN
            {leave}
        END""",
        f"""CREATE TRIGGER run_changes_{table} BEFORE UPDATE OF {key} ON run
        WHEN old.{key} IS NOT new.{key} AND old.rowid <= {counted("run")} BEGIN
            {leave}
            INSERT INTO {table} ({key}, namespace, runs)
            SELECT new.{key}, new.namespace, 1 WHERE new.{key} IS NOT NULL
            ON CONFLICT ({key}, namespace) DO UPDATE SET runs = runs + 1;
        END""",
    )


def _last_goes(table: str) -> str:
    """A trigger that makes the row before the last that was counted the last one."""
    return f"""CREATE TRIGGER {table}_counted_last AFTER DELETE ON {table} BEGIN
        UPDATE counted SET last = (
            SELECT {table}_id FROM {table} WHERE rowid < old.rowid ORDER BY rowid DESC LIMIT 1)
        WHERE what = '{table}' AND last = old.{table}_id;
    END"""


def _feedback(sign: str, row: str) -> str:
    """Statements that count one row of feedback, or take it back."""
    place = f"SELECT namespace FROM run WHERE run_id = {row}.run_id"
    return f"""UPDATE tally SET feedback = feedback {sign} 1,
            corrections = corrections {sign} ({row}.correction IS NOT NULL)
        WHERE namespace = ({place});
        INSERT INTO scale (namespace, key, source, scores, negative, beyond)
        SELECT namespace, {row}.key, {row}.source, 0, 0, 0 FROM run WHERE run_id = {row}.run_id
        ON CONFLICT DO NOTHING;
        UPDATE scale SET scores = scores {sign} 1, negative = negative {sign} ({row}.score < 0),
            beyond = beyond {sign} (abs({row}.score) > 1)
        WHERE namespace = ({place}) AND key = {row}.key AND source = {row}.source
            AND {row}.score IS NOT NULL AND {row}.correction IS NULL;"""


_FEEDBACK_TRIGGERS = (
    f"""CREATE TRIGGER feedback_goes BEFORE DELETE ON feedback
    WHEN old.rowid <= {counted("feedback")} BEGIN
        {_feedback("-", "old")}
    END""",
    f"""CREATE TRIGGER feedback_changes BEFORE UPDATE OF key, score, source, correction ON feedback
    WHEN old.rowid <= {counted("feedback")} BEGIN
        {_feedback("-", "old")}
        {_feedback("+", "new")}
    END""",
    _last_goes("feedback"),
)

_COMPARISON_TRIGGERS = (
    f"""CREATE TRIGGER comparison_goes BEFORE DELETE ON comparison
    WHEN old.rowid <= {counted("comparison")} BEGIN
        UPDATE tally SET comparisons = comparisons - 1
        WHERE namespace = (SELECT namespace FROM run WHERE run_id = old.run_a);
    END""",
    _last_goes("comparison"),
)

_RUN_TRIGGERS = (
    *_member_triggers("thread", "thread_id", "threads"),
    *_member_triggers("asker", "user_id", "users"),
    f"""CREATE TRIGGER run_goes BEFORE DELETE ON run
    WHEN old.rowid <= {counted("run")} BEGIN
        UPDATE tally SET runs = runs - 1 WHERE namespace = old.namespace;
    END""",
    """CREATE TRIGGER run_was_judged AFTER DELETE ON run BEGIN
        DELETE FROM judged
        WHERE namespace = old.namespace AND prompt = old.prompt AND run_id = old.run_id;
    END""",
    _last_goes("run"),
)

TRIGGERS = (*_RUN_TRIGGERS, *_FEEDBACK_TRIGGERS, *_COMPARISON_TRIGGERS)
