"""The statements of the step ``tallies``, which says what they are for; frozen with it.

Knows nothing of who counts and who reads: that is ``tallies``.
"""

from __future__ import annotations

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
    "CREATE TABLE counted (last TEXT REFERENCES run(run_id))",
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
)


FILLING = (
    "INSERT INTO tally (namespace) VALUES ('')",
    "INSERT INTO tally (namespace, runs) SELECT namespace, count(*) FROM run GROUP BY namespace",
    """INSERT INTO thread (thread_id, namespace, runs)
        SELECT thread_id, namespace, count(*) FROM run WHERE thread_id IS NOT NULL
        GROUP BY thread_id, namespace""",
    """INSERT INTO asker (user_id, namespace, runs)
        SELECT user_id, namespace, count(*) FROM run WHERE user_id IS NOT NULL
        GROUP BY user_id, namespace""",
    "INSERT INTO counted (last) SELECT run_id FROM run ORDER BY rowid DESC LIMIT 1",
    "INSERT INTO counted (last) SELECT NULL WHERE NOT EXISTS (SELECT 1 FROM counted)",
    """INSERT INTO tally (namespace, feedback, corrections)
        SELECT namespace, count(*), count(correction) FROM feedback JOIN run USING (run_id)
        WHERE true GROUP BY namespace
        ON CONFLICT (namespace) DO UPDATE SET feedback = excluded.feedback,
            corrections = excluded.corrections""",
    """INSERT INTO tally (namespace, comparisons)
        SELECT namespace, count(*) FROM comparison JOIN run ON run_id = run_a
        WHERE true GROUP BY namespace
        ON CONFLICT (namespace) DO UPDATE SET comparisons = excluded.comparisons""",
    """INSERT INTO judged (namespace, prompt, run_id)
        SELECT namespace, prompt, run_id FROM run WHERE run_id IN (
            SELECT run_id FROM feedback
            UNION ALL SELECT run_a FROM comparison UNION ALL SELECT run_b FROM comparison)""",
    """INSERT INTO scale (namespace, key, source, scores, negative, beyond)
        SELECT namespace, key, source, count(*), sum(score < 0), sum(abs(score) > 1)
        FROM feedback JOIN run USING (run_id) WHERE score IS NOT NULL AND correction IS NULL
        GROUP BY namespace, key, source""",
)

_COUNTED = "old.rowid <= (SELECT run.rowid FROM counted JOIN run ON run_id = last)"


def _membership(table: str, key: str, count: str) -> tuple[str, ...]:
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
        WHEN old.{key} IS NOT NULL AND {_COUNTED} BEGIN
            {leave}
        END""",
        f"""CREATE TRIGGER run_changes_{table} BEFORE UPDATE OF {key} ON run
        WHEN old.{key} IS NOT new.{key} AND {_COUNTED} BEGIN
            {leave}
            INSERT INTO {table} ({key}, namespace, runs)
            SELECT new.{key}, new.namespace, 1 WHERE new.{key} IS NOT NULL
            ON CONFLICT ({key}, namespace) DO UPDATE SET runs = runs + 1;
        END""",
    )


def _feedback(sign: int, row: str) -> str:
    """Statements that count a row of feedback, or take it back."""
    return f"""
        INSERT INTO tally (namespace, feedback, corrections)
        SELECT namespace, {sign}, {sign} * ({row}.correction IS NOT NULL)
        FROM run WHERE run_id = {row}.run_id
        ON CONFLICT (namespace) DO UPDATE SET feedback = feedback + excluded.feedback,
            corrections = corrections + excluded.corrections;
        INSERT INTO scale (namespace, key, source, scores, negative, beyond)
        SELECT namespace, {row}.key, {row}.source,
            {sign}, {sign} * ({row}.score < 0), {sign} * (abs({row}.score) > 1)
        FROM run
        WHERE run_id = {row}.run_id AND {row}.score IS NOT NULL AND {row}.correction IS NULL
        ON CONFLICT (namespace, key, source) DO UPDATE SET scores = scores + excluded.scores,
            negative = negative + excluded.negative, beyond = beyond + excluded.beyond;"""


def _comparison(sign: int, row: str) -> str:
    """Statements that count a comparison, or take it back."""
    return f"""
        INSERT INTO tally (namespace, comparisons)
        SELECT namespace, {sign} FROM run WHERE run_id = {row}.run_a
        ON CONFLICT (namespace) DO UPDATE SET comparisons = comparisons + excluded.comparisons;"""


def _judge(*runs: str) -> str:
    return f"""
        INSERT INTO judged (namespace, prompt, run_id)
        SELECT namespace, prompt, run_id FROM run WHERE run_id IN ({", ".join(runs)})
        ON CONFLICT DO NOTHING;"""


_RUN_TRIGGERS = (
    *_membership("thread", "thread_id", "threads"),
    *_membership("asker", "user_id", "users"),
    f"""CREATE TRIGGER run_goes BEFORE DELETE ON run
    WHEN {_COUNTED} BEGIN
        UPDATE tally SET runs = runs - 1 WHERE namespace = old.namespace;
    END""",
    """CREATE TRIGGER run_is_gone AFTER DELETE ON run BEGIN
        UPDATE counted SET last = (
            SELECT run_id FROM run WHERE rowid < old.rowid ORDER BY rowid DESC LIMIT 1)
        WHERE last = old.run_id;
        DELETE FROM judged
        WHERE namespace = old.namespace AND prompt = old.prompt AND run_id = old.run_id;
    END""",
)

_FEEDBACK_TRIGGERS = (
    f"""CREATE TRIGGER feedback_comes AFTER INSERT ON feedback BEGIN
        {_feedback(1, "new")}
        {_judge("new.run_id")}
    END""",
    f"""CREATE TRIGGER feedback_goes AFTER DELETE ON feedback BEGIN
        {_feedback(-1, "old")}
    END""",
    f"""CREATE TRIGGER feedback_changes
    AFTER UPDATE OF run_id, key, score, source, correction ON feedback BEGIN
        {_feedback(-1, "old")}
        {_feedback(1, "new")}
        {_judge("new.run_id")}
    END""",
)

_COMPARISON_TRIGGERS = (
    f"""CREATE TRIGGER comparison_comes AFTER INSERT ON comparison BEGIN
        {_comparison(1, "new")}
        {_judge("new.run_a", "new.run_b")}
    END""",
    f"""CREATE TRIGGER comparison_goes AFTER DELETE ON comparison BEGIN
        {_comparison(-1, "old")}
    END""",
)

TRIGGERS = (*_RUN_TRIGGERS, *_FEEDBACK_TRIGGERS, *_COMPARISON_TRIGGERS)
