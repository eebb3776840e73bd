"""The end of an update: its ledger row, its revision and its promotion, in one transaction.

A revision without its ledger row would be one of which nobody knows what it learned, and a ledger
row that says "promoted" beside another live revision would be a lie. So a process that is killed
leaves all of them or none. What passed the gate is promoted unless people decided otherwise.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from agentpref.accounting import uses
from agentpref.errors import ConfigError
from agentpref.home import CANDIDATE, own_folder
from agentpref.prefer.strata import Listed
from agentpref.printable import in_namespace
from agentpref.prove.gain import NAME, odds
from agentpref.record.database import transaction
from agentpref.record.updates import UpdateRow, Updates
from agentpref.serve import decisions, trials
from agentpref.serve.publishing import Publication
from agentpref.serve.registry import Registry
from agentpref.serve.status import ServingState
from agentpref.serve.trials import BEGUN, FADED
from agentpref.types import INSTRUCTED, UpdateReport

if TYPE_CHECKING:
    import sqlite3

    from agentpref.learn.learner import Learner


class Wishes(NamedTuple):
    """What an update is asked for that determines no training; see ``agentpref.update``."""

    promote: bool = True
    canary: float | None = None
    again: bool = False

    @classmethod
    def checked(cls, promote: bool, canary: float | None, *, again: bool = False) -> Wishes:
        """The wishes, if they go together.

        Raises:
            ConfigError: ``canary`` is out of range, or given beside ``promote=False``.
        """
        if canary is not None and not (0 < canary <= 1 and promote):
            raise ConfigError(
                f"canary is {canary!r}, but must be a share above 0 and at most 1, and takes the "
                "place of a promotion: leave out promote=False (--no-promote)"
            )
        return cls(promote, canary, again)


_CHANGED = "somebody changed what serves while the update ran"

AS_USUAL = Wishes()
"""What passes is promoted."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an update came to: its report, what each example was used for, and answers to show."""

    report: UpdateReport
    groups: Mapping[str, Sequence[Listed]]
    wishes: Wishes = AS_USUAL
    answers: Sequence[tuple[str, str, str]] = ()

    def settle(
        self,
        registry: Registry,
        connection: sqlite3.Connection,
        learner: Learner,
        serving: ServingState,
    ) -> UpdateReport:
        """Keep the outcome, publish its candidate unless it was refused, and promote what passed.

        The verdict is ``promoted`` only of what was made live. What is likely better, and not
        proven so, is tried as the canary (``serve/trials.py``). Nobody is overruled who held the
        namespace, took the like of it back, or changed what serves since the update began: the
        report then says so and names the command. ``serving`` is what served at the beginning.
        """
        from agentpref.learn.cache import LogpCache

        policy = (learner.base.numbers, self.report.update_id)
        if self.report.verdict not in ("passed", "insufficient"):
            LogpCache(connection, *policy).forget()
            with transaction(connection):
                report = self._end_trial(self.report, connection, serving)
                self._keep(connection, report)
            return report
        with ExitStack() as at_end:
            place = tempfile.TemporaryDirectory(dir=registry.home.path, prefix=CANDIDATE)
            folder = Path(at_end.enter_context(place))
            own_folder(folder)  # if it is killed, the home's other users can remove it
            learner.save(folder)
            publication = at_end.enter_context(self._publishing(registry, learner, folder))
            name = publication.revision.revision_id
            LogpCache(publication.connection, *policy).rename(name)
            report = replace(self.report, revision=name)
            if report.verdict == "passed":
                report = self._serve(report, publication, serving)
            elif self._is_likely():
                report = self._try(report, publication, serving)
            else:
                report = self._end_trial(report, publication.connection, serving)
            self._keep(publication.connection, report)
        return report

    def _serve(
        self, report: UpdateReport, publication: Publication, serving: ServingState
    ) -> UpdateReport:
        """Promote the candidate, or say why it was not made live."""
        name = publication.revision.revision_id
        canary = self.wishes.canary
        why = self._objection(publication)
        if not why and canary is None:
            if publication.promote(serving):
                return replace(report, verdict="promoted")
            why = _CHANGED
        elif not why and canary is not None:
            instead = f" instead of {serving.canary}" if serving.canary is not None else ""
            why = f"it was made the canary, for {_percent(canary)} of the threads{instead}"
            if not publication.canary(serving, canary):
                why = _CHANGED
        note = (
            f"{name} passed and was not made live: {why}; {self._cure(publication)} makes it live"
        )
        return replace(report, notes=[*report.notes, note])

    def _try(
        self, report: UpdateReport, publication: Publication, serving: ServingState
    ) -> UpdateReport:
        """Make the candidate the canary, since a gain is likely; or say why it is none."""
        name, share = publication.revision.revision_id, report.config["gate"]["canary"]
        likely = f"{BEGUN}, {odds(report.gain['chance'] or 0.0)} by chance"
        trial = trials.read(publication.connection, serving)
        why = self._objection(publication)
        if not why and serving.canary is not None:
            why = f"{serving.canary} is the canary"
        elif not why and trial.vetoed:
            why = "a canary was ended since live was made live, so it takes a proof, or your word"
        elif not why:
            why = f"it was made the canary, for {_percent(share)} of the threads, where people's "
            why += "thumbs decide"
            if not publication.canary(serving, share, likely):
                why = _CHANGED
        cure = self._cure(publication)
        note = f"{name} was not made live ({likely}, is not proven): {why}; {cure} makes it live"
        return replace(report, notes=[*report.notes, note])

    def _end_trial(
        self, report: UpdateReport, connection: sqlite3.Connection, serving: ServingState
    ) -> UpdateReport:
        """End a canary that was a trial, since its gain is no longer likely.

        What an adapter from elsewhere, or a text, shows says nothing of the canary, which learned
        other things.
        """
        if report.training.get("start") in ("adopted", INSTRUCTED):
            return report
        ended = ("refused", "insufficient", "nothing_to_gain")
        if report.verdict not in ended or not report.gain or report.gain.get("likely"):
            return report
        if not trials.end(connection, serving, f"update {report.update_id}"):
            return report
        note = f"{serving.canary}, which was on trial as the canary, was ended: {FADED}"
        return replace(report, notes=[*report.notes, note])

    def _objection(self, publication: Publication) -> str:
        """What people decided or wished against serving it; empty if nothing."""
        trained = [example.example_id for example in self.groups["trained"]]
        repeated = decisions.taken_back_before(
            publication.connection, publication.revision, trained
        )
        held = decisions.read_hold(publication.connection, self.report.namespace)
        if repeated is not None or held is not None:
            return repeated or "the namespace is held"
        return "" if self.wishes.promote else "it was not to be promoted"

    def _cure(self, publication: Publication) -> str:
        """The command that makes it live."""
        namespace = self.report.namespace
        name = publication.revision.revision_id
        cure = f"`{in_namespace(f'agentpref adapters promote {name}', namespace)}`"
        if decisions.read_hold(publication.connection, namespace) is None:
            return cure
        return f"`{in_namespace('agentpref adapters hold --end', namespace)}`, then {cure}"

    def _is_likely(self) -> bool:
        """Whether a gain is likely, though not proven, and nothing else speaks against it."""
        report = self.report
        failed = {check["name"] for check in report.checks if not check["passed"]}
        if report.verdict != "insufficient" or not report.gain.get("likely") or failed != {NAME}:
            return False
        return bool(report.config["gate"]["canary"] > 0)

    def _publishing(
        self, registry: Registry, learner: Learner, folder: Path
    ) -> AbstractContextManager[Publication]:
        report = self.report
        return registry.publishing(
            folder,
            parent=report.parent,
            model=learner.base.identity,
            training={"config": report.config, **report.training},
            watermark={
                "update_id": report.update_id,
                "pairs": report.counts["trained"],
                "thumbs": report.counts["trained_thumbs"],
            },
            instructions=learner.instructions("candidate"),
        )

    def _keep(self, connection: sqlite3.Connection, report: UpdateReport) -> None:
        """Store the report, and what each example was used for and made of."""
        pairs, sources = uses(self.groups, report.verdict)
        Updates(connection).add(
            UpdateRow(
                update_id=report.update_id,
                namespace=report.namespace,
                created_at=report.created_at,
                finished_at=time.time(),
                parent=report.parent,
                candidate=report.revision,
                verdict=report.verdict,
                report=report.to_mapping(),
                pairs=pairs,
                sources=sources,
                answers=self.answers,
            )
        )


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"
