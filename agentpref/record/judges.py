"""What a home knows of its judges: their versions, what they said, and how right they are.

A judge is a voter like a person, and each version of it (of its rubric and model) is another one.
Its verdicts on pairs of runs are comparisons; :class:`Judges` keeps, beside them, every single
verdict by the question that was asked, so that nothing is asked twice. A calibration says how right
a voter is in each stratum of a namespace, by what people said of the same answers. The newest one
counts.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from agentpref.record.database import transaction
from agentpref.record.keys import registered
from agentpref.record.messages import as_json
from agentpref.record.sums import counted
from agentpref.types import Source


class Version(NamedTuple):
    """One version of a judge; ``digest`` covers all that its verdicts depend on.

    ``rubric`` is its file as it was; of a judge that an app asks itself, it is empty.
    """

    name: str
    digest: str
    rubric: str
    source: Source = "model"


class Calibrated(NamedTuple):
    """A calibration: when, the noise ε of the strata that are trusted, and all that was found."""

    at: float
    noise: Mapping[str, float]
    report: Mapping[str, Any]


class Judges:
    """The judges of a home, over a connection of ``database.connect``."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def voter_of(self, user_id: str) -> str:
        """The name under which the home keeps what a user id says."""
        return registered(self._connection).name(user_id)

    def register(self, version: Version, user_id: str | None = None) -> str:
        """Note a version, and return the name of it as a voter; a known one changes nothing.

        ``user_id`` is under what an app logs the verdicts of a judge of its own.
        """
        voter = self.voter_of(user_id or f"judge:{version.name}@{version.digest}")
        with transaction(self._connection):
            query = "SELECT 1 FROM judge WHERE voter = ?"
            if self._connection.execute(query, (voter,)).fetchone() is None:
                of_it = {"where": "voter = ?", "values": (voter,)}
                with counted(self._connection, "judge", **of_it):  # type: ignore[arg-type]
                    self._connection.execute(
                        "INSERT INTO judge (voter, name, digest, rubric, source, created_at)"
                        " VALUES (?, ?, ?, ?, ?, ?)",
                        (voter, *version, time.time()),
                    )
        return voter

    def verdicts(self, voter: str, questions: Collection[str]) -> dict[str, dict[str, Any]]:
        """What a judge said of some questions before, by their digests."""
        query = """SELECT question, said FROM verdict
            WHERE judge = ? AND question IN (SELECT value FROM json_each(?))"""
        found = self._connection.execute(query, (voter, as_json(sorted(questions))))
        return {question: orjson.loads(said) for question, said in found}

    def keep(self, voter: str, said: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
        """Keep verdicts: of each the question, the id of its prompt's last message, and itself.

        A removal of anything that was said to the prompt deletes them, because they may quote it.
        One whose prompt was removed meanwhile is not kept; without an id, it is of no run.
        """
        questions = as_json([question for question, _, _ in said])
        some = "judge = ? AND question IN (SELECT value FROM json_each(?))"
        with (
            transaction(self._connection),
            counted(self._connection, "verdict", where=some, values=(voter, questions)),
        ):
            self._connection.executemany(
                "INSERT OR REPLACE INTO verdict (judge, question, prompt, created_at, said)"
                " SELECT ?1, ?2, ?3, ?4, ?5"
                " WHERE ?3 = '' OR EXISTS (SELECT 1 FROM message WHERE id = ?3)",
                [(voter, question, prompt, time.time(), as_json(verdict))
                 for question, prompt, verdict in said],
            )  # fmt: skip

    def calibrate(
        self, namespace: str, voter: str, noise: Mapping[str, float], report: Mapping[str, Any]
    ) -> None:
        """Note how right a voter is from now on; what it said before is read by that, too."""
        with (
            transaction(self._connection),
            counted(self._connection, "calibration", where="voter = ?", values=(voter,)),
        ):
            self._connection.execute(
                "INSERT INTO calibration (namespace, voter, created_at, noise, report)"
                " VALUES (?, ?, ?, ?, ?)",
                (namespace, voter, time.time(), as_json(noise), as_json(report)),
            )

    def calibration(self, namespace: str, voter: str) -> Calibrated | None:
        """The newest calibration of a voter; ``None`` if it was never calibrated."""
        query = """SELECT created_at, noise, report FROM calibration
            WHERE (namespace, voter) = (?, ?) ORDER BY number DESC LIMIT 1"""
        found = self._connection.execute(query, (namespace, voter)).fetchone()
        if found is None:
            return None
        at, noise, report = found
        return Calibrated(at, orjson.loads(noise), orjson.loads(report))

    def find(self, name: str, digest: str) -> str | None:
        """The name as a voter of a known version."""
        query = "SELECT voter FROM judge WHERE (name, digest) = (?, ?)"
        found = self._connection.execute(query, (name, digest)).fetchone()
        return None if found is None else str(found[0])

    def calibrated(self, namespace: str) -> dict[str, tuple[Version, Calibrated]]:
        """The judges that were calibrated, each in its newest version, by name."""
        found = self._connection.execute(
            """SELECT name, digest, rubric, source, voter FROM judge
            JOIN (SELECT voter, max(number) AS newest FROM calibration
                WHERE namespace = ? GROUP BY voter) USING (voter) ORDER BY newest""",
            (namespace,),
        ).fetchall()
        known = ((Version(*row[:4]), self.calibration(namespace, row[4])) for row in found)
        return {version.name: (version, one) for version, one in known if one is not None}


def trusted(connection: sqlite3.Connection, namespace: str) -> dict[str, dict[str, float]]:
    """The noise ε of each judge in each stratum in which it is trusted, by its name as a voter."""
    is_there = "SELECT 1 FROM sqlite_master WHERE name = 'calibration'"
    if connection.execute(is_there).fetchone() is None:  # an older home that is only read
        return {}
    found = connection.execute(
        """SELECT voter, noise FROM calibration WHERE number IN
            (SELECT max(number) FROM calibration WHERE namespace = ? GROUP BY voter)""",
        (namespace,),
    )
    return {voter: orjson.loads(noise) for voter, noise in found}
