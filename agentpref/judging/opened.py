"""A judge of a home, ready to be asked: its rubric, its engine, and what it said before."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from agentpref import plugins
from agentpref.errors import JudgeError, UncalibratedJudge
from agentpref.home import Home
from agentpref.prefer.judges import rubric as rubrics
from agentpref.prefer.judges.calibration import Calibration
from agentpref.prefer.judges.hearing import (
    UNLIMITED,
    Case,
    Forgetful,
    Limits,
    Memory,
    Spending,
    hear,
)
from agentpref.prefer.judges.panel import Panel
from agentpref.prefer.judges.rubric import Rubric
from agentpref.prefer.judges.verdicts import Judge, Opinion, Verdict, opinion, source_of
from agentpref.record.database import connect, translated
from agentpref.record.judges import Judges, Version
from agentpref.record.store import Store
from agentpref.reward.judge import NAME as REWARD
from agentpref.reward.judge import open_judge_of_rewards
from agentpref.types import Progress, Source, Winner

PANEL = "panel"
"""The engine of a judge that unites others."""

_SIGNS: Mapping[Winner, int] = {"a": 1, "b": -1, "tie": 0}


@dataclass(frozen=True, slots=True)
class Asking:
    """How questions are asked: so many at a time, within limits, each anew if ``anew``."""

    concurrency: int = 8
    limits: Limits = UNLIMITED
    anew: bool = False
    progress: Progress | None = None


ASKING = Asking()


@dataclass(frozen=True)
class OpenedJudge:
    """A judge of a home.

    ``voter`` is whom its comparisons are by, ``calibration`` what is known of it in this namespace,
    and ``noise`` its share of wrong verdicts in the strata in which it is trusted. One that is
    ``distrusted`` was deceived in the online loop. Of a panel, ``judge`` is ``None`` and
    ``members`` are its judges.
    """

    rubric: Rubric
    version: Version
    voter: str
    source: Source
    calibration: Calibration | None
    noise: Mapping[str, float]
    distrusted: bool
    weights: Panel | None
    judge: Judge | None
    members: tuple[OpenedJudge, ...]
    connection: sqlite3.Connection

    @property
    def name(self) -> str:
        """Its name in the home."""
        return self.rubric.name

    def hear(
        self, cases: Sequence[Case], spending: Spending, asking: Asking = ASKING
    ) -> Iterator[tuple[int, Opinion]]:
        """Ask the questions, and yield each opinion with the place of its case.

        What was said before is not asked again, unless it is to be asked anew; then nothing is
        kept. See :func:`agentpref.prefer.judges.hearing.hear`.
        """
        if self.judge is None:
            yield from self._united(cases, spending, asking)
            return
        limits = replace(asking.limits, price=self.rubric.price)
        if limits.cost is not None and limits.price is None:
            raise JudgeError(
                f"a limit of cost needs the price of judge {self.name!r}; add a line such as "
                "`price: [0.15, 0.60]`, in dollars for a million tokens read and written"
            )
        yield from hear(
            self.judge,
            cases,
            memory=Forgetful() if asking.anew else _Kept(self.connection, self.voter),
            spending=spending,
            limits=limits,
            concurrency=asking.concurrency,
            progress=asking.progress,
        )

    def trusts(self, tag: str) -> bool:
        """Whether what it says in a stratum trains and proves."""
        if self.source == "code":
            return True
        return tag in self.noise

    def require_trusted(self, namespace: str) -> None:
        """Raise ``UncalibratedJudge`` where it is trusted in no stratum."""
        if self.source == "code":
            return
        of_it = f"`agentpref judge calibrate {self.name}`"
        if self.distrusted:
            raise UncalibratedJudge(
                f"a second judge saw {self.name!r} being deceived by what it trained, so nothing "
                f"that it says trains any more; change its rubric, and run {of_it}"
            )
        if self.calibration is None:
            raise UncalibratedJudge(
                f"nobody knows how right judge {self.name!r} is in {namespace!r} in its present "
                f"form, so nothing that it says would train; run {of_it} first"
            )
        if not self.noise:
            raise UncalibratedJudge(
                f"judge {self.name!r} is not shown to be better than a coin in any stratum of "
                f"{namespace!r}, so nothing that it says would train; improve its rubric or model, "
                f"or log more comparisons by people, and run {of_it} again"
            )

    def recall(self, cases: Sequence[Case]) -> Iterator[tuple[int, Opinion]]:
        """What it said of these questions before; nothing is asked."""
        return self.hear(cases, Spending(), Asking(limits=Limits(seconds=0)))

    def _united(
        self, cases: Sequence[Case], spending: Spending, asking: Asking
    ) -> Iterator[tuple[int, Opinion]]:
        if self.weights is None:
            raise JudgeError(
                f"panel {self.name!r} has no weights yet; run `agentpref judge calibrate "
                f"{self.name}`, which needs about 30 comparisons by people"
            )
        for number, signs in enumerate(self.signs(cases, spending, asking)):
            if len(signs) == len(self.members):  # a part of them is not the panel
                verdict = Verdict(*self.weights.vote(signs))
                yield number, opinion(verdict, verdict.swap())

    def signs(
        self, cases: Sequence[Case], spending: Spending, asking: Asking
    ) -> list[dict[str, float]]:
        """What each member of a panel says of each case: from -1 (b) to 1 (a), over both orders."""
        found: list[dict[str, float]] = [{} for _ in cases]
        for member in self.members:
            for number, one in member.hear(cases, spending, asking):
                both = (one.as_given.winner, one.swapped.swap().winner)
                found[number][member.name] = sum(_SIGNS[winner] for winner in both) / 2
        return found


@contextmanager
def at_work(
    home: Home | str | Path | None, name: str | Judge, namespace: str
) -> Iterator[tuple[Home, sqlite3.Connection, OpenedJudge]]:
    """Open a home and a judge that is trusted somewhere in a namespace, for a block."""
    place = Home.open(home)
    with translated(place), closing(connect(place)) as connection:
        Store(connection).require_namespace(namespace)
        judge = open_judge(place, connection, name, namespace)
        judge.require_trusted(namespace)
        yield place, connection, judge


def open_judge(
    home: Home, connection: sqlite3.Connection, name: str | Judge, namespace: str
) -> OpenedJudge:
    """Read a judge's rubric, make its engine, and note its version in the home.

    The judge ``reward`` is the reward model of the namespace, unless a rubric has that name. A
    judge that is given as an object is known by its attributes ``name`` (else that of its class)
    and ``version``: one with another version has to be calibrated again.

    Raises:
        JudgeError: there is no such judge, or its rubric or engine is wrong.
        ConfigError: no engine is registered under the name that the rubric gives.
        MissingDependency: its engine needs a package that is not installed.
    """
    if not isinstance(name, str):
        return _of_object(connection, name, namespace)
    if name == REWARD and name not in rubrics.names(home):
        return _of_rewards(home, connection, namespace)
    rubric, digest = rubric_of(home, name)
    if rubric.engine == PANEL:
        members = tuple(open_judge(home, connection, one, namespace) for one in rubric.members)
        version = Version(name, digest, rubric.source)
        return _known(connection, namespace, rubric, version, None, members)
    judge = plugins.load(plugins.JUDGES, rubric.engine)(rubric)
    if not isinstance(judge, Judge):
        raise JudgeError(
            f"the engine {rubric.engine!r} of judge {name!r} made {type(judge).__name__}, "
            "which has no method judge(prompts, completions)"
        )
    version = Version(name, digest, rubric.source, source_of(judge))
    return _known(connection, namespace, rubric, version, judge, ())


def rubric_of(home: Home, name: str) -> tuple[Rubric, str]:
    """A judge's rubric, and the digest of its version: that of a panel covers its members.

    Raises:
        JudgeError: there is no such judge, its rubric is wrong, or it is a panel with another one.
    """
    rubric = rubrics.read(home, name)
    if rubric.engine != PANEL:
        return rubric, rubric.digest
    members = [rubrics.read(home, member) for member in rubric.members]
    for member in members:
        if member.engine == PANEL:
            raise JudgeError(
                f"panel {name!r} has the panel {member.name!r} in it; name single judges"
            )
    return rubric, "-".join(one.digest for one in (rubric, *members))


def _of_rewards(home: Home, connection: sqlite3.Connection, namespace: str) -> OpenedJudge:
    judge, calibration = open_judge_of_rewards(home, namespace)
    version = Version(REWARD, judge.model.name, "")
    known = Judges(connection)
    voter = known.register(version)
    if known.calibration(namespace, voter) is None:
        noise = {tag: calibration.noise(tag) for tag in calibration.strata}
        trusted = {tag: one for tag, one in noise.items() if one is not None}
        about = "held-out pairs of its fit"
        found = {"calibration": calibration.to_mapping(), "weights": {}, "gold": about}
        known.calibrate(namespace, voter, trusted, found)
    rubric = Rubric(name=REWARD, text="the reward model of the namespace", engine="object")
    return _known(connection, namespace, rubric, version, judge, ())


def _of_object(connection: sqlite3.Connection, judge: Judge, namespace: str) -> OpenedJudge:
    name = str(getattr(judge, "name", type(judge).__name__.lower()))
    rubric = Rubric(name=name, text="a judge that the app has made", engine="object")
    version = Version(name, str(getattr(judge, "version", "1")), "", source_of(judge))
    return _known(connection, namespace, rubric, version, judge, ())


def _known(
    connection: sqlite3.Connection,
    namespace: str,
    rubric: Rubric,
    version: Version,
    judge: Judge | None,
    members: tuple[OpenedJudge, ...],
) -> OpenedJudge:
    """A judge with what the home knows of it."""
    known = Judges(connection)
    voter = known.register(version)
    found = known.calibration(namespace, voter)
    report: Mapping[str, Any] = {} if found is None else found.report
    return OpenedJudge(
        rubric,
        version,
        voter,
        version.source,
        Calibration.from_mapping(report["calibration"]) if report.get("calibration") else None,
        {} if found is None else found.noise,
        bool(report.get("distrusted")),
        Panel.from_mapping(report["weights"]) if report.get("weights") else None,
        judge,
        members,
        connection,
    )


@dataclass(frozen=True)
class _Kept(Memory):
    """What a judge said before, as the home keeps it."""

    connection: sqlite3.Connection
    voter: str

    def find(self, questions: Sequence[str]) -> Mapping[str, Verdict]:
        found = Judges(self.connection).verdicts(self.voter, questions)
        return {question: Verdict(**said) for question, said in found.items()}

    def keep(self, said: Sequence[tuple[Case, Verdict]]) -> None:
        if said:
            rows = [(case.question.digest, case.prompt_id, asdict(one)) for case, one in said]
            Judges(self.connection).keep(self.voter, rows)
