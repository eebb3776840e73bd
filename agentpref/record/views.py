"""The views of the database, for people who read it with sqlite-utils, Datasette or SQL.

The tables are made for writing: text is JSON in a chain of messages, times are numbers. Each view
gives one row for one thing that happened, with its texts and its time as ISO 8601 (UTC). agentpref
itself reads none of them. A view that changes is dropped and made again by a new migration.
"""

from __future__ import annotations

from agentpref.types import RETRACTION


def _moment(column: str) -> str:
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', {column}, 'unixepoch')"


def _count_pairs(role: str) -> str:
    return f"""(
        SELECT count(*) FROM update_pair
        WHERE update_pair.update_id = updates.update_id AND role = '{role}'
    )"""


_MESSAGE_TEXT = """
CREATE VIEW message_text AS
SELECT id, parent, json_extract(body, '$.role') AS role,
    CASE json_type(body, '$.content')
        WHEN 'array' THEN (
            SELECT group_concat(
                CASE part.type
                    WHEN 'object' THEN coalesce(
                        json_extract(part.value, '$.text'),
                        '[' || json_extract(part.value, '$.type') || ']'
                    )
                    ELSE part.value
                END,
                char(10)
            )
            FROM json_each(body, '$.content') AS part
        )
        ELSE json_extract(body, '$.content')
    END AS text,
    json_extract(body, '$.tool_calls') AS tool_calls
FROM (SELECT id, parent, CASE WHEN json_valid(body) THEN body END AS body FROM message)
"""

RUN_TEXT = f"""
CREATE VIEW run_text AS
SELECT run_id, {_moment("created_at")} AS time,
    namespace, thread_id, trace_id, user_id,
    (
        WITH RECURSIVE line AS (
            SELECT parent, role, text FROM message_text WHERE id = run.prompt
            UNION
            SELECT message_text.parent, message_text.role, message_text.text
            FROM line JOIN message_text ON message_text.id = line.parent
            WHERE line.role IS NOT 'user'
        )
        SELECT text FROM line WHERE role = 'user'
    ) AS question,
    answer.text AS answer, answer.tool_calls, model, revision, tags,
    (
        SELECT avg(score) FROM feedback AS said
        WHERE said.run_id = run.run_id AND key = 'thumbs' AND NOT EXISTS (
            SELECT 1 FROM feedback AS later
            WHERE later.run_id = said.run_id AND later.source = said.source
                AND later.user_id IS said.user_id
                AND later.created_at >= said.created_at AND (
                    later.key = '{RETRACTION}'
                    AND json_type(later.value, '$.key') IS NOT NULL
                    AND coalesce(json_extract(later.value, '$.key'), 'thumbs') = 'thumbs'
                    OR later.key = 'thumbs' AND later.score IS NOT NULL
                    AND (later.created_at, later.feedback_id) > (said.created_at, said.feedback_id)
                )
        )
    ) AS thumbs,
    metadata, created_at
FROM run LEFT JOIN message_text AS answer ON answer.id = output
"""

_FEEDBACK_TEXT = f"""
CREATE VIEW feedback_text AS
SELECT feedback_id, {_moment("feedback.created_at")} AS time,
    namespace, feedback.run_id, key, score, value, comment, source,
    feedback.user_id, question, answer, fixed.text AS correction, revision, feedback.created_at
FROM feedback CROSS JOIN run_text ON run_text.run_id = feedback.run_id
LEFT JOIN message_text AS fixed ON fixed.id = correction
"""

_COMPARISON_TEXT = f"""
CREATE VIEW comparison_text AS
SELECT comparison_id, {_moment("comparison.created_at")} AS time,
    a.namespace, run_a, run_b, winner, comment, source, comparison.user_id,
    a.question, a.answer AS answer_a, b.answer AS answer_b,
    a.revision AS revision_a, b.revision AS revision_b, comparison.created_at
FROM comparison
CROSS JOIN run_text AS a ON a.run_id = run_a
CROSS JOIN run_text AS b ON b.run_id = run_b
"""

_LINEAGE = f"""
CREATE VIEW lineage AS
SELECT update_id, {_moment("updates.created_at")} AS time,
    updates.namespace, verdict, updates.parent, candidate AS revision,
    CASE candidate WHEN live THEN 'live' WHEN canary THEN 'canary' END AS serves,
    {_moment("tainted_at")} AS tainted,
    {_count_pairs("new")} AS pairs_new,
    {_count_pairs("replay")} AS pairs_replayed,
    {_count_pairs("held_out")} AS pairs_held_out,
    finished_at - updates.created_at AS seconds, updates.created_at
FROM updates
LEFT JOIN revision ON revision_id = candidate
LEFT JOIN serving ON serving.namespace = updates.namespace
"""

VIEWS = tuple(
    view.strip() for view in (_MESSAGE_TEXT, RUN_TEXT, _FEEDBACK_TEXT, _COMPARISON_TEXT, _LINEAGE)
)
