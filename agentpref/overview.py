"""What a reader of an update's report wants to know beside it, as plain values.

What was learned from which feedback, accuracy and KL over all revisions, where the revision comes
from, and what to label next; and all updates of some time under one line, for a mail. The page, the
terminal and the mail draw the same values.

All of it is read from the home. Counts of examples are those of the list that the last update made:
``unread`` says how many judgements came in since.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from agentpref.home import Home
from agentpref.labelling import label_next
from agentpref.printable import escaped
from agentpref.record.ingest.redaction import redact
from agentpref.record.journal import Entry, listed
from agentpref.record.messages import as_json
from agentpref.serve.backend import Revision
from agentpref.serve.registry import Registry
from agentpref.types import BASE, COMMENT_ID, REVISED_BY, REVISED_FROM

NEWEST = 24
"""How many of the newest updates the history has: so many columns can be read on a page."""

SHOWN_WORDS = 60
"""So many characters of a comment are shown."""

_FEWEST = 20
"""With fewer held-out pairs, an accuracy says too little to speak of forgetting."""

GONE = "no longer known"
"""What an example counts under whose prompt was judged anew, or forgotten, since; or that a version
used which kept no list of examples."""

_FATES = {
    "new": "trained",
    "trained_aside": "trained",
    "held_out": "held_out",
    "set_aside": "set_aside",
    "known": "known",
}
"""What became of a new example, by its role in the ledger."""


def overview(connection: sqlite3.Connection, home: Home, entry: Entry) -> dict[str, Any]:
    """Gather everything beside the report of one update.

    ``learned_from`` is ``None`` for an update that looked at nothing new. ``history`` has the
    updates of the namespace that trained a candidate, the oldest first.
    """
    registry = Registry(home, namespace=entry.namespace)
    published = {revision.revision_id: revision for revision in registry.list()}
    state = registry.state()
    serves = {state.live or BASE: "live"} | ({state.canary: "canary"} if state.canary else {})
    found = history(listed(connection, entry.namespace), serves)
    return {
        "learned_from": learned_from(connection, entry) if entry.in_ledger else None,
        "words": learned_words(connection, entry) if entry.in_ledger else [],
        "history": found[-NEWEST:],
        "earlier": max(0, len(found) - NEWEST),
        "forgetting": forgetting(found, state.live),
        "lineage": lineage(published, found, entry, serves),
        "label_next": label_next(connection, entry, state.live),
        "unread": _unread(connection, entry.namespace),
        "live": state.live or BASE,
        "canary": state.canary,
    }


def learned_from(connection: sqlite3.Connection, entry: Entry) -> dict[str, Any]:
    """Count the new examples that an update tried, in four ways.

    By ``source`` (who judged; of several, all of them), ``origin`` (what was said), ``tag``, and
    ``date`` (local, of the judgement). Each is a list of ``name``, ``trained``, ``held_out``,
    ``set_aside`` (what it was refused with, or went on without) and ``known`` (what served was
    right about them already).
    """
    query = """SELECT pair_id, role FROM update_pair
        WHERE update_id = ? AND role IN (SELECT value FROM json_each(?))"""
    uses: dict[str, str] = dict(
        connection.execute(query, (entry.update_id, as_json([*_FATES]))).fetchall()
    )
    ids = (as_json([*uses]),)
    some = "IN (SELECT value FROM json_each(?))"
    query = f"SELECT example_id, tag, origin, created_at FROM example WHERE example_id {some}"
    known = {row[0]: row[1:] for row in connection.execute(query, ids)}
    judged: dict[str, set[str]] = {}
    for pair_id, source in connection.execute(_JUDGED_BY.format(some=some), ids):
        judged.setdefault(pair_id, set()).add(source)
    counts: dict[str, Counter[tuple[str, str]]] = {
        name: Counter() for name in ("source", "origin", "tag", "date")
    }
    for example_id, role in uses.items():
        tag, origin, created_at = known.get(example_id, (GONE, GONE, None))
        source = " and ".join(sorted(judged.get(example_id, ()))) or GONE
        cells = {"source": source, "origin": origin, "tag": tag, "date": _day(created_at)}
        for name, cell in cells.items():
            counts[name][cell, _FATES[role]] += 1
    return {name: _table(found, by_name=name == "date") for name, found in counts.items()}


def learned_words(connection: sqlite3.Connection, entry: Entry) -> list[dict[str, Any]]:
    """The words by which answers were revised, of the revisions that an update was trained on.

    A list of ``origin``, how many ``examples`` have it, and ``words``: a list of ``text`` and how
    many ``examples`` it made, the most first. Of comments, that is what people said, redacted and
    shortened; of critiques, the name of the principle. Comments are read where they are kept, so
    those of a user who was forgotten are gone.
    """
    found = connection.execute(_REVISED, {"update_id": entry.update_id}).fetchall()
    counts: dict[str, Counter[str]] = {}
    examples: dict[str, set[str]] = {}
    for pair_id, origin, words in sorted(set(found), key=repr):
        examples.setdefault(origin, set()).add(pair_id)
        text = " ".join(redact(str(words or "")).split()).strip(" .!").lower()
        text = text if len(text) <= SHOWN_WORDS else f"{text[: SHOWN_WORDS - 1].rstrip()}…"
        counts.setdefault(origin, Counter())[escaped(text)] += bool(text)
    return [
        {
            "origin": origin,
            "examples": len(examples[origin]),
            "words": [
                {"text": text, "examples": count}
                for text, count in sorted(some.items(), key=lambda one: (-one[1], one[0]))
                if count
            ],
        }
        for origin, some in sorted(counts.items())
    ]


def _table(counts: Counter[tuple[str, str]], *, by_name: bool) -> list[dict[str, Any]]:
    """Rows of a count, the largest first, or by name."""
    rows = [
        {"name": name, **{fate: counts[name, fate] for fate in _FATES.values()}}
        for name in {name for name, _ in counts}
    ]
    if by_name:
        return sorted(rows, key=lambda row: row["name"])
    return sorted(rows, key=lambda row: (-sum(row[f] for f in _FATES.values()), row["name"]))


def _day(at: float | None) -> str:
    if at is None:
        return GONE
    try:
        return datetime.fromtimestamp(at).strftime("%Y-%m-%d")
    except (OSError, OverflowError, ValueError):  # a damaged home may have any number
        return GONE


def history(
    entries: Iterable[Entry], serves: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The updates that trained a candidate, the oldest first, with what was measured of it.

    ``accuracy`` maps each tag that was evaluated to ``pairs``, ``before`` and ``after``, and
    ``retained`` each one of which live had learned some (of versions that did not tell these apart,
    all). ``turned`` names the tags in which people changed their minds, so that what they had said
    before no longer counts. ``kl`` and ``kl_budget`` are in nats per token, and ``None`` where
    nothing was measured.
    """
    found = []
    for entry in sorted(entries, key=lambda entry: (entry.created_at, entry.update_id)):
        report = entry.report
        if not entry.in_ledger or not report.get("accuracy"):
            continue
        checks: Sequence[Mapping[str, Any]] = report.get("checks", ())
        distance = next((check for check in checks if check["name"].startswith("KL")), {})
        found.append(
            {
                "update_id": entry.update_id,
                "created_at": entry.created_at,
                "verdict": entry.verdict,
                "revision": entry.revision,
                "parent": report.get("parent"),
                "serves": (serves or {}).get(entry.revision or ""),
                "accuracy": report["accuracy"],
                "retained": report.get("retained", report["accuracy"]),
                "turned": [one["tag"] for one in report.get("changed", ()) if one.get("aged_out")],
                "kl": distance.get("value"),
                "kl_budget": distance.get("bound"),
            }
        )
    return found


def forgetting(found: Sequence[Mapping[str, Any]], live: str | None) -> list[dict[str, Any]]:
    """What was lost of each tag since the revision of live's line that was best at it.

    Only like is compared with like: each update of the line measured live and its candidate on the
    same examples, those that live had learned, and these changes are added up. So neither people
    who changed their minds nor another topic under the same tag look like forgetting. Changes on
    fewer than 20 held-out pairs do not count. The most is first.
    """
    levels: dict[str, list[tuple[float, str]]] = {}
    last: dict[str, float] = {}
    for row in _line(found, live):
        for tag, one in row["retained"].items():
            if one["pairs"] >= _FEWEST:
                own = levels.setdefault(tag, [(0.0, row["parent"] or BASE)])
                own.append((own[-1][0] + one["after"] - one["before"], row["revision"]))
                last[tag] = row["accuracy"][tag]["after"]
    rows = []
    for tag, own in levels.items():
        best, revision = max(own, key=lambda level: level[0])
        lost = round(best - own[-1][0], 6)  # what is left is the rounding of the sum
        rows.append({"tag": tag, "lost": lost, "best_revision": revision, "last": last[tag]})
    return sorted(rows, key=lambda row: (-row["lost"], row["tag"]))


def _line(found: Sequence[Mapping[str, Any]], live: str | None) -> list[Mapping[str, Any]]:
    """The updates that made live and its ancestors, the oldest first."""
    made = {row["revision"]: row for row in found if row["revision"]}
    line: list[Mapping[str, Any]] = []
    while live is not None and live in made:
        line.append(made.pop(live))
        live = line[-1]["parent"]
    return line[::-1]


def lineage(
    published: Mapping[str, Revision],
    found: Sequence[Mapping[str, Any]],
    entry: Entry,
    serves: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The line of revisions from the base to an update's revision, or to what it started from."""
    verdicts = {row["revision"]: row["verdict"] for row in found}
    line: list[dict[str, Any]] = []
    name = entry.revision or entry.report.get("parent")
    while name is not None and name in published and len(line) < len(published):
        one = published[name]
        line.append(
            {
                "revision": name,
                "created_at": one.created_at,
                "verdict": verdicts.get(name, "published by hand"),
                "serves": serves.get(name),
                "standing": standing(one),
            }
        )
        name = one.parent
    base = {"revision": BASE, "created_at": None, "verdict": None, "standing": None}
    return [base | {"serves": serves.get(BASE)}, *reversed(line)]


def standing(revision: Revision) -> str | None:
    """Why a revision must not serve, in a word; ``None`` if it may."""
    reasons = {
        "tainted": revision.tainted_at,
        "in quarantine": revision.quarantined_at,
        "pruned": revision.pruned_at,
    }
    return next((word for word, at in reasons.items() if at is not None), None)


def _unread(connection: sqlite3.Connection, namespace: str) -> int:
    """How many judgements of a namespace came in since its examples were listed."""
    (count,) = connection.execute(_UNREAD, {"namespace": namespace}).fetchone()
    return int(count)


# All updates of some time


def since(connection: sqlite3.Connection, at: float, namespace: str | None = None) -> list[Entry]:
    """The updates that ended since a time, the oldest first; ``None`` is of all namespaces.

    Of those that ended alike, and began to before that time, the last one counts.
    """
    found = [e for e in listed(connection, namespace) if e.created_at + _seconds(e) >= at]
    found = [entry if entry.first_at >= at else entry._replace(times=1) for entry in found]
    return sorted(found, key=lambda entry: (entry.created_at, entry.update_id))


def _seconds(entry: Entry) -> float:
    return float(entry.report.get("seconds") or 0.0)


_ORDER = (
    "promoted", "passed", "refused", "cut_short", "insufficient", "nothing_usable", "failed",
    "interrupted", "busy", "running", "nothing_to_gain", "nothing_new",
)  # fmt: skip


def subject(entries: Sequence[Entry], when: str) -> str:
    """The first line of a mail: ``1 promoted, 1 refused since yesterday``.

    Nights that found nothing new are told only where nothing else happened.
    """
    counts = Counter[str]()
    for entry in entries:
        counts[entry.verdict] += entry.times
    if len(counts) > 1:
        del counts["nothing_new"]
    order = [*_ORDER, *sorted(counts.keys() - {*_ORDER})]
    told = [f"{counts[name]} {name.replace('_', ' ')}" for name in order if counts[name]]
    return f"{', '.join(told) or 'no update'} {when}"


_JUDGED_BY = """
WITH said(pair_id, source) AS (SELECT pair_id, source FROM pair_source WHERE pair_id {some})
SELECT pair_id, feedback.source FROM said JOIN feedback ON feedback_id = said.source
UNION SELECT pair_id, comparison.source FROM said JOIN comparison ON comparison_id = said.source
"""

# The list of examples says what counts as revised: what people say of the two answers is stronger.
_REVISED = f"""
SELECT DISTINCT pair_id, example.origin, coalesce(
    (SELECT comment FROM feedback WHERE feedback_id = json_extract(metadata, '$.{COMMENT_ID}')),
    json_extract(metadata, '$.principle'))
FROM update_pair JOIN example ON example_id = pair_id JOIN pair_source USING (pair_id)
    JOIN comparison ON comparison_id = pair_source.source JOIN run ON run_id IN (run_a, run_b)
WHERE update_id = :update_id AND role IN ('new', 'trained_aside')
    AND example.origin IN ('comment', 'critique')
    AND CASE WHEN json_valid(metadata) THEN json_extract(metadata, '$.{REVISED_FROM}')
        IN (run_a, run_b) AND json_extract(metadata, '$.{REVISED_BY}') = example.origin END
"""

# New judgements are the last rows of their tables, of whichever namespace: see prefer/catalog.py.
_UNREAD = """
WITH behind(feedback, comparisons) AS (
    SELECT (SELECT count(*) FROM feedback) - feedback,
        (SELECT count(*) FROM comparison) - comparisons
    FROM listing WHERE namespace = :namespace
), said(run_id) AS (
    SELECT run_id FROM (SELECT run_id FROM feedback ORDER BY rowid DESC
        LIMIT coalesce((SELECT max(0, feedback) FROM behind), 0))
    UNION ALL SELECT run_a FROM (SELECT run_a FROM comparison ORDER BY rowid DESC
        LIMIT coalesce((SELECT max(0, comparisons) FROM behind), 0))
)
SELECT count(*) FROM said CROSS JOIN run USING (run_id)
WHERE namespace = :namespace
"""
