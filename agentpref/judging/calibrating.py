"""Measures how right a judge is, by what people said of the same answers.

The strata in which it is trusted are kept in the home, with the share of its wrong verdicts in
each. What it says trains and proves by that from then on, also what it said before.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from agentpref.errors import JudgeError
from agentpref.home import Home
from agentpref.judging.gold import (
    Gold,
    gold_of_file,
    gold_of_home,
    logged_verdicts,
    standing_comparisons,
)
from agentpref.judging.opened import ASKING, Asking, OpenedJudge, open_judge
from agentpref.prefer.judges import rubric as rubrics
from agentpref.prefer.judges.calibration import (
    Calibration,
    GoldVerdict,
    calibrate,
    people_agreement,
)
from agentpref.prefer.judges.hearing import Spending
from agentpref.prefer.judges.panel import cross_validated, fit_panel
from agentpref.prefer.judges.verdicts import Judge
from agentpref.record.database import connect, translated
from agentpref.record.judges import Judges, Version
from agentpref.record.store import Store
from agentpref.reward.judge import NAME as REWARD
from agentpref.reward.judge import RewardJudge
from agentpref.types import Comparison

GOLD_LIMIT = 200


@dataclass(frozen=True, slots=True)
class Calibrating:
    """What a calibration found.

    ``trusted`` maps each stratum in which the judge makes pairs to its noise ε, and ``untrusted``
    the others to why it makes none. ``people`` says how reliable the people are themselves.
    """

    judge: str
    namespace: str
    gold: str
    calibration: Calibration
    trusted: Mapping[str, float]
    untrusted: Mapping[str, str]
    weights: Mapping[str, float] = field(default_factory=dict)
    people: Mapping[str, Any] = field(default_factory=dict)
    spending: Spending = field(default_factory=Spending)
    notes: tuple[str, ...] = ()

    def to_mapping(self) -> dict[str, Any]:
        """All of it as plain values: what ``--json`` prints."""
        return {
            "judge": self.judge,
            "namespace": self.namespace,
            "gold": self.gold,
            "trusted": dict(self.trusted),
            "untrusted": dict(self.untrusted),
            "weights": dict(self.weights),
            "people": dict(self.people),
            "spending": self.spending.to_mapping(),
            "notes": [*self.notes],
            "calibration": self.calibration.to_mapping(),
        }


def calibrate_judge(
    home: Home | str | Path | None,
    name: str | Judge,
    *,
    namespace: str = "default",
    gold: str | os.PathLike[str] | IO[bytes] | None = None,
    tag: str | None = None,
    limit: int = GOLD_LIMIT,
    asking: Asking = ASKING,
) -> Calibrating:
    """Ask a judge what people have decided, and keep how right it is.

    ``name`` is a rubric of the home, a judge as an object, or the ``user_id`` under which an app
    logged the verdicts of a judge of its own: then nothing is asked, and what it said of answers
    that people compared, too, is measured.

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        name: the judge.
        namespace: whose answers and judgements.
        gold: a file of preferences; by default what people said in the namespace.
        tag: the stratum of a file's rows without one.
        limit: ask about so many comparisons at most, as equally of each stratum as possible.
        asking: how the judge is asked.

    Strata without gold this time stay as they were measured before.

    Raises:
        JudgeError: there is no such judge, no gold, or the judge could not be asked.
        UncalibratedJudge: the online loop saw it being deceived, in this very version.
    """
    place = Home.open(home)
    with translated(place), closing(connect(place)) as connection:
        Store(connection).require_namespace(namespace)
        known = (*rubrics.names(place), REWARD)
        if isinstance(name, str) and name not in known and gold is None:
            return _Calibration(connection, namespace, name, asking).of_app(place)
        judge = open_judge(place, connection, name, namespace)
        if isinstance(judge.judge, RewardJudge):
            raise JudgeError(
                "the reward model is measured by its own fit, on pairs that it has not seen; "
                "`agentpref reward fit` fits and measures it again"
            )
        job = _Calibration(connection, namespace, judge.name, asking)
        if judge.distrusted:
            judge.require_trusted(namespace)
        if gold is None:
            found = gold_of_home(connection, namespace, limit=limit)
            return job.of_rubric(judge, found, f"{len(found)} comparisons by people")
        found = gold_of_file(gold, tag=tag, limit=limit)
        where = os.fspath(gold) if isinstance(gold, str | os.PathLike) else "what was given"
        return job.of_rubric(judge, found, f"{len(found)} comparisons by people in {where}")


@dataclass
class _Calibration:
    """One calibration while it runs."""

    connection: sqlite3.Connection
    namespace: str
    name: str
    asking: Asking

    def of_rubric(self, judge: OpenedJudge, gold: list[Gold], where: str) -> Calibrating:
        """Ask a judge of the home."""
        spending, weights = Spending(), dict[str, float]()
        cases = [one.case for one in gold]
        if judge.members:
            signs = judge.signs(cases, spending, self.asking)
            every = len(judge.members)
            answered = [number for number, said in enumerate(signs) if len(said) == every]
            better = [gold[number].better for number in answered]
            voted = cross_validated([signs[number] for number in answered], better)
            fitted = fit_panel([signs[number] for number in answered], better)
            weights = dict(fitted.to_mapping())
            said = [
                GoldVerdict(gold[number].stratum, gold[number].better, winner, winner, None)
                for number, winner in zip(answered, voted, strict=True)
            ]
        else:
            opinions = judge.hear(cases, spending, self.asking)
            said = [gold[number].verdict(one) for number, one in opinions]
        notes = []
        if len(said) < len(gold):
            stopped = f": {spending.stopped}" if spending.stopped else ""
            notes.append(
                f"{len(gold) - len(said)} of {len(gold)} questions were not answered{stopped}"
            )
        if not said:
            why = "; ".join(f"{reason} ({n})" for reason, n in spending.failed.items())
            raise JudgeError(
                f"judge {self.name!r} answered none of {len(gold)} questions"
                f"{f' ({spending.stopped})' if spending.stopped else ''}: {why or 'nothing failed'}"
            )
        return self._keep(judge.voter, said, where, weights, spending, notes)

    def of_app(self, home: Home) -> Calibrating:
        """Measure what an app's own judge said."""
        judges = Judges(self.connection)
        voter = judges.voter_of(self.name)
        said = [*logged_verdicts(self.connection, self.namespace, voter)]
        where = f"{len(said)} comparisons by people that it judged, too"
        if not said:
            raise JudgeError(
                f"no judge {self.name!r} is in {home.judges}, and nothing that a model said as the "
                f"user {self.name!r} is about answers that people compared; there are: "
                f"{', '.join(rubrics.names(home)) or 'none'}; `agentpref judge new {self.name}` "
                "writes a template"
            )
        judges.register(Version(self.name, "", ""), user_id=self.name)
        note = "its verdicts are those that an app logged under this name; nothing was asked"
        return self._keep(voter, said, where, {}, Spending(), [note])

    def _keep(
        self,
        voter: str,
        said: list[GoldVerdict],
        where: str,
        weights: Mapping[str, float],
        spending: Spending,
        notes: list[str],
    ) -> Calibrating:
        found = calibrate(said)
        noise = {tag: found.noise(tag) for tag in found.strata}
        trusted = {tag: one for tag, one in noise.items() if one is not None}
        untrusted = {tag: _why(found, tag) for tag in found.strata if tag not in trusted}
        judges = Judges(self.connection)
        before = judges.calibration(self.namespace, voter)
        if before is not None and not weights:  # a panel with other weights is another judge
            known = Calibration.from_mapping(before.report["calibration"])
            others = {tag: one for tag, one in known.strata.items() if tag not in found.strata}
            if others:
                notes.append(f"as measured before in {', '.join(sorted(others))}")
            found = replace(found, strata={**others, **found.strata})
            trusted = {tag: e for tag, e in before.noise.items() if tag in others} | trusted
        report = {"calibration": found.to_mapping(), "weights": dict(weights), "gold": where}
        judges.calibrate(self.namespace, voter, trusted, report)
        return Calibrating(
            self.name,
            self.namespace,
            where,
            found,
            trusted,
            untrusted,
            weights,
            people_agreement(_votes(self.connection, self.namespace)),
            spending,
            tuple(notes),
        )


def _why(found: Calibration, tag: str) -> str:
    """Why a judge is not trusted in a stratum."""
    one = found.strata[tag]
    decided = one.right + one.wrong
    if not decided:
        return "it decided nothing: all its verdicts were ties"
    return (
        f"right in {one.right} of {decided}: not shown to be better than a coin (at least "
        f"{one.lower:.2f}, more than .50 is needed)"
    )


def _votes(connection: sqlite3.Connection, namespace: str) -> list[tuple[str, str, str]]:
    """The comparisons by named people: what was compared, by whom, and the answer they liked."""
    return [
        (" ".join(sorted((row.run_a, row.run_b))), row.user_id, _in_order(row))
        for row in standing_comparisons(connection, namespace)
        if row.source == "human" and row.user_id is not None
    ]


def _in_order(row: Comparison) -> str:
    """The winner of the two runs in the order of their ids."""
    return row.winner if row.run_a <= row.run_b else row.swap().winner
