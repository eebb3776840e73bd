"""The ledger of updates: what each was trained on, its candidate, and the gate's report.

It answers three questions:

- Which pairs has a revision learned? Those that were new to it or to an ancestor.
- Which revisions have learned from given feedback? Those that trained on a pair made of it, and
  their descendants, and those that have the weights of one of these under another number. They are
  tainted for good, because weights cannot unlearn.
- Which revision can serve instead? The nearest clean ancestor, at worst the base model: an update
  that starts there learns again everything that is still on record.
"""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import orjson

from agentpref.config import PREFERENCES
from agentpref.errors import UpdateError
from agentpref.home import Home
from agentpref.record.chains import Chains
from agentpref.record.database import insert_or_ignore, transaction
from agentpref.record.messages import as_json
from agentpref.record.seals import SEALED, resealing, sealed
from agentpref.record.sums import counted
from agentpref.record.weights import name_weights
from agentpref.types import BASE, Answered

Role = Literal[
    "new", "replay", "held_out", "left_out", "waiting", "set_aside", "trained_aside",
    "aged_out", "restored", "known", "anchor", "anchor_held_out",
]  # fmt: skip
"""What an update used a pair for.

It could not use those left out, and did not get to those that wait. Those set aside were new to an
update that was refused with them, or that passed without a gain in them; if they trained a
candidate that passed, they are trained and aside. Those aged out it learned before, and people
think otherwise of since; restored ones count again. Known ones were new, and its parent, which was
right about them, has learned them by that. The anchors are ordinary answers, which nobody judged:
trained on or held out, but never learned.
"""


@dataclass(frozen=True, slots=True)
class UpdateRow:
    """One update as the ledger keeps it.

    ``pairs`` maps the ids of the pairs it used to their role; ``sources`` maps them to the ids of
    the feedback and comparisons that each was made of, or of the run of an ordinary answer.
    ``answers`` are ids of held-out prompts with the answers of live and of the candidate.
    """

    update_id: str
    namespace: str
    created_at: float
    finished_at: float
    parent: str | None
    candidate: str | None
    verdict: str
    report: Mapping[str, Any]
    pairs: Mapping[str, Role] = field(default_factory=dict)
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    answers: Sequence[tuple[str, str, str]] = ()


class Attempt(NamedTuple):
    """What an update tried: ids of pairs that the live revision has not learned, and its report.

    ``waiting`` are those that it had no time for, or that it had no use for because nothing could
    be trained. Of ``pairs``, it could not use those in ``left_out``. ``serves`` says whether its
    candidate is live now. ``before`` is the report of the update before it, if that one had the
    same parent.
    """

    update_id: str
    pairs: frozenset[str]
    report: Mapping[str, Any]
    waiting: frozenset[str] = frozenset()
    serves: bool = False
    before: Mapping[str, Any] | None = None
    left_out: frozenset[str] = frozenset()

    @property
    def used(self) -> int:
        """How many examples that were new it trained and evaluated."""
        return used(self.report)


def used(report: Mapping[str, Any]) -> int:
    """How many new examples an update trained and evaluated, by its report."""
    counts = report.get("counts", {})
    return sum(n for name, n in counts.items() if name.startswith(("trained", "new_evaluated")))


class Updates:
    """The updates of a home, over one open connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def add(self, update: UpdateRow) -> None:
        """Keep an update and the pairs it used, both or neither."""
        values = {name: getattr(update, name) for name in SEALED["updates"]}
        values["report"] = as_json(update.report)
        with transaction(self._connection):
            (row,) = sealed(self._connection, "updates", [[*values.values()]])
            self._connection.execute(
                f"INSERT INTO updates ({', '.join(values)}, seal)"
                f" VALUES ({', '.join('?' * len(row))})",
                row,
            )
            of_it = (update.update_id,)
            with counted(self._connection, "update_pair", where="update_id = ?", values=of_it):
                self._connection.executemany(
                    "INSERT INTO update_pair (update_id, pair_id, role) VALUES (?, ?, ?)",
                    [(update.update_id, pair, role) for pair, role in update.pairs.items()],
                )
            sources = [(source, pair) for pair, some in update.sources.items() for source in some]
            named = (as_json(sorted({source for source, _ in sources})),)
            some = "source IN (SELECT value FROM json_each(?))"
            with counted(self._connection, "pair_source", where=some, values=named):
                insert_or_ignore(self._connection, "pair_source", ("source", "pair_id"), sources)
            with counted(self._connection, "answers", where="update_id = ?", values=of_it):
                self._connection.executemany(
                    "INSERT INTO answers (update_id, number, prompt, before, after)"
                    " VALUES (?, ?, ?, ?, ?)",
                    [(update.update_id, n, *each) for n, each in enumerate(update.answers)],
                )
            # The journal says that it runs. Only one update of a home does at a time.
            query = "DELETE FROM journal WHERE namespace = ? AND ended_at IS NULL"
            self._connection.execute(query, (update.namespace,))

    def has(self, update_id: str) -> bool:
        """Return whether an update was finished and kept."""
        query = "SELECT 1 FROM updates WHERE update_id = ?"
        return self._connection.execute(query, (update_id,)).fetchone() is not None

    def looks(self, namespace: str, parent: str | None) -> int:
        """Return how often updates of a parent looked whether a gain is proven.

        A look that could not have proved one does not count: of an update of an older version, one
        at fewer pairs than it asked for.
        """
        query = """
            SELECT coalesce(max(json_extract(report, '$.gain.look')), 0)
                + coalesce(sum(json_type(report, '$.gain.look') IS NULL
                    AND json_extract(report, '$.counts.new_evaluated')
                        >= json_extract(report, '$.config.gate.min_pairs')), 0)
            FROM updates WHERE namespace = ? AND parent IS ?
        """
        (number,) = self._connection.execute(query, (namespace, parent)).fetchone()
        return int(number)

    def learned_by(self, revision: str | None) -> set[str]:
        """Return the ids of the pairs, held-out ones too, that its line learned or knew."""
        return self._pairs_of_line(revision, "new", "held_out", "known")

    def learned_by_method(
        self, revision: str | None, method: str, settings: Mapping[str, Any], roles: Sequence[Role]
    ) -> set[str]:
        """Return the ids that its line used in some roles, by a method and its settings."""
        found = self._connection.execute(
            "WITH RECURSIVE line(name) AS ("
            "  SELECT ? UNION SELECT parent FROM revision JOIN line ON revision_id = name"
            ") SELECT DISTINCT pair_id FROM update_pair JOIN updates USING (update_id)"
            " JOIN line ON candidate = name WHERE role IN (SELECT value FROM json_each(?))"
            " AND json_extract(report, '$.config.method') = ?"
            " AND json_extract(report, '$.config.offline') = json(?)",
            (revision, as_json([*roles]), method, as_json(settings)),
        )
        return {pair for (pair,) in found}

    def tried_on(
        self, namespace: str, parent: str | None, data: str
    ) -> list[tuple[str, dict[str, Any]]]:
        """Return ids and reports of a parent's updates from the same conversations.

        Args:
            namespace: of the updates.
            parent: the revision that they started from.
            data: what identifies the conversations, and what they were worth.
        """
        query = """SELECT update_id, report FROM updates WHERE namespace = ? AND parent IS ?
            AND json_extract(report, '$.training.data') = ?
            ORDER BY created_at DESC, update_id DESC"""
        found = self._connection.execute(query, (namespace, parent, data))
        return [(name, orjson.loads(report)) for name, report in found]

    def tried_by(self, revision: str) -> set[str]:
        """Return those too that it or an ancestor tried to learn, and could not use."""
        return self._pairs_of_line(revision, "new", "held_out", "known", "left_out")

    def trained_by(self, revision: str | None) -> set[str]:
        """Return those that trained it or an ancestor, as new ones or replayed."""
        return self._pairs_of_line(revision, "new", "replay", "trained_aside")

    def _pairs_of_line(self, revision: str | None, *roles: Role) -> set[str]:
        found = self._connection.execute(
            "WITH RECURSIVE line(name) AS ("
            "  SELECT ? UNION SELECT parent FROM revision JOIN line ON revision_id = name"
            ") SELECT DISTINCT pair_id FROM update_pair JOIN updates USING (update_id)"
            " JOIN line ON CASE role WHEN 'known' THEN updates.parent ELSE candidate END = name"
            " WHERE role IN (SELECT value FROM json_each(?))",
            (revision, as_json(roles)),
        )
        return {pair for (pair,) in found}

    def last_attempt(self, namespace: str, live: str | None) -> Attempt | None:
        """Return what the last update tried and the live revision has not learned.

        ``None`` if there was no update, if another revision than its parent or its candidate is
        live now, or if its candidate served and was rolled back.
        """
        found = self._connection.execute(
            "SELECT update_id, parent, candidate = ?1, report FROM updates"
            " WHERE namespace = ?2 AND (candidate = ?1"
            "  OR (parent IS ?1 AND verdict IS NOT 'promoted'))"
            " AND update_id IN (SELECT update_id FROM updates WHERE namespace = ?2"
            "  ORDER BY created_at DESC, update_id DESC LIMIT 2)"
            " ORDER BY created_at DESC, update_id DESC",
            (live, namespace),
        ).fetchall()
        newest = self._connection.execute(
            "SELECT update_id FROM updates WHERE namespace = ?"
            " ORDER BY created_at DESC, update_id DESC LIMIT 1",
            (namespace,),
        ).fetchone()
        if not found or found[0][0] != newest[0]:
            return None
        (update_id, parent, serves, report), *others = found
        # What its candidate was trained on is learned, if that serves now.
        # none of these is new
        learned = [
            "replay", "set_aside", "trained_aside", "aged_out", "restored", "known", "anchor",
            "anchor_held_out",
        ]  # fmt: skip
        learned += ["new", "held_out"] if serves else []
        pairs = self._connection.execute(
            "SELECT pair_id, role FROM update_pair WHERE update_id = ? AND role NOT IN"
            " (SELECT value FROM json_each(?))",
            (update_id, as_json(learned)),
        ).fetchall()
        return Attempt(
            update_id,
            frozenset(pair for pair, role in pairs if role != "waiting"),
            orjson.loads(report),
            waiting=frozenset(pair for pair, role in pairs if role == "waiting"),
            left_out=frozenset(pair for pair, role in pairs if role == "left_out"),
            serves=bool(serves),
            before=next((orjson.loads(r) for _, p, _, r in others if p == parent), None),
        )

    def revisions_trained_on(self, sources: Iterable[str]) -> list[str]:
        """Name the revisions that trained on any of these, or descend from one, oldest first.

        A revision with the weights of one of these, under another number, has learned the same.

        ``sources`` are ids of feedback, comparisons and runs that are still in the home. For pairs
        that were used before their sources were recorded, every update since the first one counts;
        so does a revision since then whose update is not in the ledger: a version before 0.2 may
        have been killed between the two.
        """
        name_weights(self._connection, Home.of(self._connection))
        found = self._connection.execute(_TRAINED_ON, {"sources": as_json([*sources])})
        return [revision for (revision,) in found]

    def last_shift(self, namespace: str) -> tuple[str, list[dict[str, Any]]] | None:
        """Return the last update that compared new prompts with known ones, and what it found."""
        found = self._connection.execute(
            "SELECT update_id, json_extract(report, '$.training.shift') FROM updates"
            " WHERE namespace = ? AND json_array_length(report, '$.training.shift') > 0"
            " ORDER BY created_at DESC, update_id DESC LIMIT 1",
            (namespace,),
        ).fetchone()
        return None if found is None else (found[0], orjson.loads(found[1]))

    def orphans(self) -> list[str]:
        """Name the revisions whose update is not in the ledger: what they learned is unknown."""
        query = f"SELECT revision_id FROM revision WHERE {ORPHANED} ORDER BY seq"
        return [name for (name,) in self._connection.execute(query)]

    def forget_words(self, sources: Iterable[str]) -> None:
        """Remove what candidates answered from updates that used any of these.

        That is their rows of ``answers``, and in reports the messages of the user's checks and
        scorers, which may quote an answer. A candidate also answers what its ancestors learned. So
        this includes the updates that made, or started from, a revision that has learned from any
        of these. The rest of a report is numbers, names of strata and fixed texts.
        """
        name_weights(self._connection, Home.of(self._connection))
        reports = self._connection.execute(_REPORTS_ON, {"sources": as_json([*sources])}).fetchall()
        touched = ["updates"] if reports else []
        named = (as_json([update_id for update_id, _ in reports]),)
        some = "update_id IN (SELECT value FROM json_each(?))"
        with transaction(self._connection), resealing(self._connection, touched):
            with counted(self._connection, "answers", where=some, values=named):
                self._connection.execute(f"DELETE FROM answers WHERE {some}", named)
            for update_id, text in reports:
                report = orjson.loads(text)
                for check in report.get("checks", ()):
                    if check.get("name", "").startswith(("check ", "scorer ")):
                        for key in {"message", "words"} & check.keys():  # "words" in reports of 0.1
                            check[key] = "(removed: the training saw what was forgotten since)"
                query = "UPDATE updates SET report = ? WHERE update_id = ?"
                self._connection.execute(query, (as_json(report), update_id))

    def answers(self, update_id: str) -> list[Answered]:
        """Return what live and an update's candidate answered to some held-out prompts.

        The prompts were chosen at random. The list is empty for an update that kept none, and those
        whose prompt was removed since are gone.
        """
        there = "SELECT 1 FROM sqlite_master WHERE name = 'answers'"
        if self._connection.execute(there).fetchone() is None:
            return []  # a home of an older version, which is only read
        rows = self._connection.execute(
            "SELECT prompt, before, after FROM answers WHERE update_id = ? ORDER BY number",
            (update_id,),
        ).fetchall()
        chains = Chains(self._connection)
        return [Answered(chains.prompt(prompt), *texts) for prompt, *texts in rows]

    def report(self, namespace: str, update_id: str | None = None) -> dict[str, Any]:
        """Return the report of an update or of the last one; ``UpdateError`` if there is none."""
        row = self._connection.execute(
            "SELECT report FROM updates WHERE namespace = ? AND update_id = coalesce(?, update_id)"
            " ORDER BY created_at DESC, update_id DESC LIMIT 1",
            (namespace, update_id),
        ).fetchone()
        if row is None:
            which = f"no update {update_id!r}" if update_id else "no update yet"
            cure = "leave the id out for the last" if update_id else "run 'agentpref update' first"
            raise UpdateError(f"namespace {namespace!r} has {which}; {cure}")
        return read_report(row[0])


def read_report(text: str) -> dict[str, Any]:
    """Read a stored report, of an older version too, under the names of today."""
    report: dict[str, Any] = _renamed(orjson.loads(text))
    return report


_NEW_NAMES = {
    "holds": "passed",
    "words": "message",
    "retokenised": "retokenized",
    "old_examined": "old_evaluated",
    "old_examined_thumbs": "old_evaluated_thumbs",
    "examined_thumbs": "evaluated_thumbs",
}
"""Keys of reports that 0.1.0 wrote, and what they are called since."""


def _renamed(value: Any) -> Any:
    if isinstance(value, list):
        return [_renamed(item) for item in value]
    if isinstance(value, dict):
        return {_NEW_NAMES.get(name, name): _renamed(item) for name, item in value.items()}
    return value


_USED = """
WITH RECURSIVE source(id) AS (SELECT value FROM json_each(:sources)),
since(at) AS (
    SELECT min(created_at) FROM (
        SELECT created_at FROM feedback WHERE feedback_id IN source
        UNION ALL SELECT created_at FROM comparison WHERE comparison_id IN source)
),
used(update_id, role) AS (
    SELECT DISTINCT update_id, role FROM updates JOIN update_pair USING (update_id), since
    WHERE pair_id IN (SELECT pair_id FROM pair_source WHERE source IN source)
        OR created_at >= at AND pair_id NOT IN (SELECT pair_id FROM pair_source)
)
"""
MADE_BY = """CASE WHEN json_valid(revision.manifest)
    THEN json_extract(revision.manifest, '$.watermark.update_id') END"""
"""SQL of the update that published a revision; null if it was published by hand."""

# Of nothing, SQLite says that it is not in an empty set.
ORPHANED = f"({MADE_BY}) IS NOT NULL AND ({MADE_BY}) NOT IN (SELECT update_id FROM updates)"
"""SQL: an update published a revision, and is not in the ledger."""

_SEEN = f"""{_USED}, trained(update_id) AS (
    SELECT update_id FROM used WHERE role IN ('new', 'replay', 'trained_aside', 'anchor')
), seen(name) AS (
    SELECT candidate FROM updates JOIN trained USING (update_id) WHERE candidate IS NOT NULL
    UNION SELECT revision_id FROM revision, since WHERE ({MADE_BY}) IN trained
        OR created_at >= at AND {ORPHANED}
    UNION SELECT revision.revision_id FROM seen JOIN revision ON revision.parent = name
        OR weights(revision.revision_id) = weights(name)
)
"""
_TRAINED_ON = f"{_SEEN} SELECT revision_id FROM revision WHERE revision_id IN seen ORDER BY seq"
_REPORTS_ON = f"""{_SEEN}
SELECT update_id, report FROM updates WHERE update_id IN (SELECT update_id FROM used)
    OR candidate IN seen OR parent IN seen
"""


# Taint, and the way back to a clean revision


@dataclass(frozen=True, slots=True)
class Rebuild:
    """A namespace that a tainted revision serves, and what to go back to.

    ``tainted`` names the live revision, the canary or both. ``clean`` is the last revision of the
    live one's line that is clean and may serve (perhaps the live one itself), or ``"base"``.
    ``model`` is the base model as it was given to the update, and ``method`` the options of one
    that learned from conversations.
    """

    home: str
    namespace: str
    tainted: tuple[str, ...]
    clean: str
    model: str
    method: str = ""

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that rebuild: serve the clean revision now, then learn again from it."""
        where = f"--home {shlex.quote(self.home)} --namespace {shlex.quote(self.namespace)}"
        update = f"agentpref update --model {shlex.quote(self.model)} {where}"
        return (
            f"agentpref adapters promote {self.clean} {where}",
            update,
            *((f"{update} {self.method}",) if self.method else ()),
        )


def taint(connection: sqlite3.Connection, revisions: Iterable[str], at: float) -> None:
    """Mark revisions as tainted since ``at``; a revision that is tainted keeps its older time."""
    with counted(connection, "standing"):
        connection.executemany(
            "UPDATE revision SET tainted_at = coalesce(tainted_at, ?) WHERE revision_id = ?",
            [(at, revision) for revision in revisions],
        )


def last_clean(connection: sqlite3.Connection, revision: str | None) -> str:
    """Name a revision or its nearest ancestor that is clean and may serve, else ``"base"``."""
    query = (
        "SELECT parent, coalesce(tainted_at, quarantined_at, pruned_at) IS NULL"
        " FROM revision WHERE revision_id = ?"
    )
    while revision is not None:
        parent, may_serve = connection.execute(query, (revision,)).fetchone()
        if may_serve:
            return revision
        revision = parent
    return BASE


def rebuilds(connection: sqlite3.Connection, home: Home) -> tuple[Rebuild, ...]:
    """Say how to rebuild each namespace that a tainted revision serves."""
    query = (
        "SELECT revision_id, coalesce(json_extract(manifest, '$.base.name'), 'MODEL'),"
        " json_extract(manifest, '$.training.config')"
        " FROM revision WHERE tainted_at IS NOT NULL"
    )
    models = {name: (model, _method(config)) for name, model, config in connection.execute(query)}
    query = "SELECT namespace, live, canary FROM serving ORDER BY namespace"
    found = []
    for namespace, *serving in connection.execute(query).fetchall():
        tainted = tuple(name for name in serving if name in models)
        if tainted:
            clean = last_clean(connection, serving[0])
            found.append(Rebuild(str(home.path), namespace, tainted, clean, *models[tainted[0]]))
    return tuple(found)


def _method(config: str | None) -> str:
    """The options of an update that learned from conversations; empty for another."""
    settings = orjson.loads(config or "{}")
    method = settings.get("method", PREFERENCES)
    if method == PREFERENCES:
        return ""
    rewards = settings["offline"]["rewards"].items()
    keys = " ".join(f"--reward {shlex.quote(f'{key}={weight:g}')}" for key, weight in rewards)
    return f"--method {method} {keys}"
