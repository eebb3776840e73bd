"""Tables and triggers of the list of examples, as the step ``listing`` makes them.

A released step is never edited: to change them, add a step.
"""

from __future__ import annotations

LISTING = (
    """CREATE TABLE listing (
        namespace TEXT PRIMARY KEY NOT NULL,
        feedback INTEGER NOT NULL,
        comparisons INTEGER NOT NULL,
        scales TEXT NOT NULL,
        rules INTEGER NOT NULL
    ) WITHOUT ROWID""",
    """CREATE TABLE stale_prompt (
        namespace TEXT NOT NULL,
        prompt TEXT NOT NULL,
        PRIMARY KEY (namespace, prompt)
    ) WITHOUT ROWID""",
    """CREATE TABLE judged_run (
        namespace TEXT NOT NULL,
        prompt TEXT NOT NULL,
        run_id TEXT NOT NULL,
        PRIMARY KEY (namespace, prompt, run_id)
    ) WITHOUT ROWID""",
    """CREATE TABLE example (
        number INTEGER PRIMARY KEY,
        namespace TEXT NOT NULL,
        prompt TEXT NOT NULL,
        example_id TEXT NOT NULL,
        created_at REAL NOT NULL,
        origin TEXT NOT NULL,
        tag TEXT NOT NULL,
        lone INTEGER NOT NULL,
        point REAL NOT NULL
    )""",
    "CREATE INDEX example_of_prompt ON example(namespace, prompt)",
    """CREATE TABLE left_out (
        namespace TEXT NOT NULL,
        prompt TEXT NOT NULL,
        reason TEXT NOT NULL,
        judgements INTEGER NOT NULL,
        PRIMARY KEY (namespace, prompt, reason)
    ) WITHOUT ROWID""",
    """CREATE TRIGGER feedback_removed AFTER DELETE ON feedback BEGIN
        UPDATE listing SET feedback = max(0, feedback - 1);
        INSERT OR IGNORE INTO stale_prompt
            SELECT namespace, prompt FROM run JOIN listing USING (namespace)
            WHERE run_id = OLD.run_id;
    END""",
    """CREATE TRIGGER comparison_removed AFTER DELETE ON comparison BEGIN
        UPDATE listing SET comparisons = max(0, comparisons - 1);
        INSERT OR IGNORE INTO stale_prompt
            SELECT namespace, prompt FROM run JOIN listing USING (namespace)
            WHERE run_id = OLD.run_a;
    END""",
    """CREATE TRIGGER feedback_changed AFTER UPDATE ON feedback BEGIN
        INSERT OR IGNORE INTO stale_prompt
            SELECT namespace, prompt FROM run JOIN listing USING (namespace)
            WHERE run_id IN (OLD.run_id, NEW.run_id);
    END""",
    """CREATE TRIGGER comparison_changed AFTER UPDATE ON comparison BEGIN
        INSERT OR IGNORE INTO stale_prompt
            SELECT namespace, prompt FROM run JOIN listing USING (namespace)
            WHERE run_id IN (OLD.run_a, NEW.run_a);
    END""",
    """CREATE TRIGGER run_removed AFTER DELETE ON run BEGIN
        INSERT OR IGNORE INTO stale_prompt SELECT namespace, prompt FROM judged_run
            WHERE namespace = OLD.namespace AND prompt = OLD.prompt LIMIT 1;
        DELETE FROM judged_run
            WHERE namespace = OLD.namespace AND prompt = OLD.prompt AND run_id = OLD.run_id;
        DELETE FROM example WHERE namespace = OLD.namespace AND prompt = OLD.prompt;
    END""",
)
