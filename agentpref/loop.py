"""One update, end to end: record → prefer → learn → prove → serve.

This is the only module that knows all the parts. It decides their order and what is handed from
one to the next, holds the home while it works, and leaves either everything or nothing behind.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agentpref.config import UpdateConfig
from agentpref.errors import WrongBase
from agentpref.prefer.pairs import read_pairs
from agentpref.record.database import connect, translated
from agentpref.record.home import Home
from agentpref.record.ids import new_id
from agentpref.record.keeper import drain
from agentpref.record.locks import exclusive
from agentpref.record.store import Store
from agentpref.record.updates import Role, UpdateRow, Updates
from agentpref.serve.backend import Revision
from agentpref.serve.registry import Registry
from agentpref.types import BASE, Pair

if TYPE_CHECKING:
    import sqlite3

    from agentpref.learn.adapter import Policy
    from agentpref.learn.base import BaseModel
    from agentpref.learn.cache import LogpCache
    from agentpref.learn.encode import EncodedPair
    from agentpref.learn.learner import Learner, Progress
    from agentpref.prove.checks import Check

_CANDIDATE = ".candidate-"

Outcome = Literal["promoted", "refused", "insufficient", "nothing_new"]


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What an update did and why. Accuracies are held-out, per tag, before and after."""

    update_id: str
    namespace: str
    model: str
    created_at: float
    verdict: Outcome
    parent: str | None
    revision: str | None = None
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def reasons(self) -> list[str]:
        """Words of the checks that did not hold."""
        return [f"{check['name']}: {check['words']}" for check in self.checks if not check["holds"]]

    def to_mapping(self) -> dict[str, Any]:
        """The report as plain values: what ``--json`` prints and the database keeps."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Night:
    """The pairs of one update, by what they are for."""

    new: tuple[Pair, ...]
    old: tuple[Pair, ...]
    new_held_out: tuple[Pair, ...]
    old_held_out: tuple[Pair, ...]

    @classmethod
    def of(cls, pairs: Sequence[Pair], learned: set[str]) -> Night:
        """Part pairs by side of the split, and by whether the live revision has learned them."""
        parts: dict[tuple[bool, bool], list[Pair]] = {}
        for pair in pairs:
            parts.setdefault((pair.held_out, pair.pair_id in learned), []).append(pair)
        sides = ((False, False), (False, True), (True, False), (True, True))
        return cls(*(tuple(parts.get(side, ())) for side in sides))

    @property
    def fresh(self) -> set[str]:
        """Ids of the pairs that no ancestor has learned, on either side."""
        return {pair.pair_id for pair in (*self.new, *self.new_held_out)}

    def all(self) -> tuple[Pair, ...]:
        """The pairs of every kind."""
        return (*self.new, *self.old, *self.new_held_out, *self.old_held_out)

    def counts(self) -> dict[str, int]:
        """How many pairs of each kind there are."""
        return {name: len(getattr(self, name)) for name in self.__dataclass_fields__}


def update(
    home: str | Path | None = None,
    *,
    model: str,
    config: UpdateConfig | None = None,
    namespace: str = "default",
    checks: Mapping[str, Check] | None = None,
    progress: Progress | None = None,
) -> UpdateReport:
    """Learn from what was logged since the live revision was trained, and serve it if it is better.

    Args:
        home: a home folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        model: ``"tiny"``, a folder of safetensors, or a name on a model hub.
        config: settings; the defaults are meant to be kept.
        namespace: whose feedback, and whose live revision.
        checks: your own checks by name; ``None`` runs those that installed packages offer.
        progress: called with ``(stage, done, total)`` as work goes on.

    Returns:
        The report. ``nothing_new`` means that no pair came in since the last update;
        ``insufficient`` leaves a revision that may be canaried but does not serve.

    Raises:
        NotAHome: there is no home in the folder.
        UpdateRunning: another update holds the home.
        RevisionError: the live revision is tainted by what was forgotten since.
        ModelNotFound: the model resolves to nothing.
        WrongBase: the live revision was trained on another base.
        TrainingDiverged: the loss is no longer finite. In all these cases nothing was changed.
    """
    place = Home.open(home)
    settings = config or UpdateConfig()
    with exclusive(place), translated(place), closing(connect(place)) as connection:
        drain(place)
        _sweep(place)
        return _Update(place, connection, model, settings, namespace, checks, progress).run()


class _Update:
    """One update while it runs: the parts that it brings together."""

    def __init__(
        self,
        home: Home,
        connection: sqlite3.Connection,
        model: str,
        config: UpdateConfig,
        namespace: str,
        checks: Mapping[str, Check] | None,
        progress: Progress | None,
    ) -> None:
        self.home, self.connection, self.model, self.config = home, connection, model, config
        self.namespace, self.checks = namespace, checks
        self.progress: Progress = progress or (lambda stage, done, total: None)
        self.registry = Registry(home, namespace=namespace)
        self.updates = Updates(connection)
        self.update_id, self.started = new_id(), time.time()

    def run(self) -> UpdateReport:
        """Go through the night in order."""
        state = self.registry.state()
        live = None if state.live is None else self.registry.get(state.live)
        if live is not None:
            self.registry.require_untainted(live)
        pairs = read_pairs(Store(self.connection), self.namespace, held_out=self.config.held_out)
        night = Night.of(pairs.pairs, self.updates.learned_by(state.live))
        report = UpdateReport(
            update_id=self.update_id,
            namespace=self.namespace,
            model=self.model,
            created_at=self.started,
            verdict="nothing_new",
            parent=state.live,
            counts={**night.counts(), "thumbs": len(pairs.thumbs)},
            left_out=dict(pairs.left_out),
        )
        if not night.new or night.fresh == self.updates.tried_on(self.namespace, state.live):
            return report
        report, roles = self._learn_and_prove(report, live, night)
        self._keep(report, roles, night)
        if report.verdict == "promoted" and report.revision is not None:
            self.registry.promote(report.revision, expected_generation=state.generation)
        return report

    def _learn_and_prove(
        self, report: UpdateReport, live: Revision | None, night: Night
    ) -> tuple[UpdateReport, dict[str, Role]]:
        from agentpref.prove import exam
        from agentpref.prove.checks import installed_checks
        from agentpref.prove.gate import judge

        checks = installed_checks() if self.checks is None else self.checks
        learner = self._learner(live)
        new = learner.encode(night.new)
        if not new:
            return self._left_out(report, learner), _roles(night, ())
        replayed = self._replay(learner, night)
        training = learner.fit([*new, *replayed], new=len(new))
        marks = [
            exam.mark(learner, learner.encode(pairs))
            for pairs in (night.new_held_out, night.old_held_out)
        ]
        evidence = exam.evidence(learner, *marks, trained=new, checks=checks)
        verdict = judge(evidence, self.config.gate, seed=self.config.seed)
        done = replace(
            self._left_out(report, learner),
            verdict=verdict.verdict,
            counts={**report.counts, "replayed": len(replayed)},
            accuracy=marks[0].joined(marks[1]).by_tag(),
            training=asdict(training),
            checks=verdict.to_mapping()["checks"],
        )
        scores = self._cache(learner.base, self.update_id)
        if verdict.verdict == "refused":
            scores.forget()
        else:
            done = replace(done, revision=self._publish(learner, live, done))
            scores.rename(str(done.revision))
        return done, _roles(night, replayed)

    def _left_out(self, report: UpdateReport, learner: Learner) -> UpdateReport:
        """The report with what could not be encoded, and the time it took to see so."""
        left_out = {**report.left_out, **learner.left_out}
        return replace(report, left_out=left_out, seconds=time.time() - self.started)

    def _learner(self, live: Revision | None) -> Learner:
        from agentpref.learn.base import load_base
        from agentpref.learn.learner import Learner

        self.progress("load model", 0, 1)
        base = load_base(self.model, held_in=self.config.precision)
        self.progress("load model", 1, 1)
        _check_base(base, live)
        caches: dict[Policy, LogpCache] = {
            "base": self._cache(base, BASE),
            "live": self._cache(base, live.revision_id if live is not None else BASE),
            "candidate": self._cache(base, self.update_id),
        }
        folder = live.path if live is not None else None
        return Learner(base, folder, self.config, caches=caches, progress=self.progress)

    def _cache(self, base: BaseModel, policy: str) -> LogpCache:
        from agentpref.learn.cache import LogpCache

        return LogpCache(self.connection, base.numbers, policy)

    def _replay(self, learner: Learner, night: Night) -> list[EncodedPair]:
        """Old pairs to train again, from every stratum alike."""
        from agentpref.learn import replay
        from agentpref.prove.strata import stratify

        settings = self.config.replay
        old = learner.encode(night.old)
        strata: dict[str, list[EncodedPair]] = {}
        for row, stratum in zip(old, stratify([row.pair for row in old]), strict=True):
            strata.setdefault(str(stratum), []).append(row)
        return replay.draw(
            strata,
            replay.replay_size(len(night.new), settings),
            hard_share=settings.hard_share,
            hardness=lambda rows: [-h for h in learner.margins("live", rows)],
            rng=random.Random(self.config.seed),
        )

    def _publish(self, learner: Learner, live: Revision | None, report: UpdateReport) -> str:
        with tempfile.TemporaryDirectory(dir=self.home.path, prefix=_CANDIDATE) as folder:
            learner.save(Path(folder))
            revision = self.registry.publish(
                folder,
                parent=live.revision_id if live is not None else None,
                base=learner.base.identity,
                training={"config": self.config.to_mapping(), **report.training},
                watermark={"update_id": self.update_id, "pairs": report.counts["new"]},
            )
        return revision.revision_id

    def _keep(self, report: UpdateReport, roles: dict[str, Role], night: Night) -> None:
        """Write the report, and of each pair what it was used for and made of, into the ledger."""
        self.updates.add(
            UpdateRow(
                update_id=report.update_id,
                namespace=report.namespace,
                created_at=report.created_at,
                finished_at=time.time(),
                parent=report.parent,
                candidate=report.revision,
                verdict=report.verdict,
                report=report.to_mapping(),
                pairs=roles,
                sources={
                    pair.pair_id: pair.provenance for pair in night.all() if pair.pair_id in roles
                },
            )
        )


def _roles(night: Night, replayed: Sequence[EncodedPair]) -> dict[str, Role]:
    roles: dict[str, Role] = {row.pair.pair_id: "replay" for row in replayed}
    roles.update({pair.pair_id: "new" for pair in night.new})
    roles.update({pair.pair_id: "held_out" for pair in night.new_held_out})
    return roles


def _check_base(base: BaseModel, live: Revision | None) -> None:
    if live is None:
        return
    trained_on = live.manifest["base"]
    if any(trained_on[part] != base.identity[part] for part in ("digest", "template_digest")):
        raise WrongBase(
            f"{live.revision_id} was trained on {trained_on['name']!r}, whose weights or chat "
            f"template are not those of {base.name!r}; pass that model, or use a new namespace"
        )


def _sweep(home: Home) -> None:
    """Remove the candidates of updates that were killed. Call it with the home held."""
    for folder in home.path.glob(f"{_CANDIDATE}*"):
        shutil.rmtree(folder, ignore_errors=True)
