"""The end of an update: its ledger row, its revision and its promotion, in one transaction.

A revision without its ledger row would be one of which nobody knows what it learned, and a ledger
row that says "promoted" beside another live revision would be a lie. So a process that is killed
leaves all of them or none.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from agentpref.accounting import uses
from agentpref.home import own_folder
from agentpref.prefer.strata import Listed
from agentpref.record.updates import UpdateRow, Updates
from agentpref.serve.publishing import Publication
from agentpref.serve.registry import Registry
from agentpref.serve.status import ServingState
from agentpref.types import UpdateReport

if TYPE_CHECKING:
    import sqlite3

    from agentpref.learn.learner import Learner

CANDIDATE = ".candidate-"
"""How the names of folders begin in which an update keeps its candidate."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an update came to: its report, and what each example was used for."""

    report: UpdateReport
    groups: Mapping[str, Sequence[Listed]]

    def settle(
        self,
        registry: Registry,
        connection: sqlite3.Connection,
        learner: Learner,
        serving: ServingState,
    ) -> UpdateReport:
        """Keep the outcome, publish its candidate unless it was refused, and promote what passed.

        Somebody who changed what serves since the update began is not overruled: the report then
        says so and names the command. ``serving`` is what served when the update began.
        """
        from agentpref.learn.cache import LogpCache

        policy = (learner.base.numbers, self.report.update_id)
        if self.report.verdict not in ("promoted", "insufficient"):
            LogpCache(connection, *policy).forget()
            self._keep(connection, self.report)
            return self.report
        with ExitStack() as at_end:
            place = tempfile.TemporaryDirectory(dir=registry.home.path, prefix=CANDIDATE)
            folder = Path(at_end.enter_context(place))
            own_folder(folder)  # if it is killed, the home's other users can remove it
            learner.save(folder)
            publication = at_end.enter_context(self._publishing(registry, learner, folder))
            name = publication.revision.revision_id
            LogpCache(publication.connection, *policy).rename(name)
            report = replace(self.report, revision=name)
            if report.verdict == "promoted":
                report = _served(report, publication, serving)
            self._keep(publication.connection, report)
        return report

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
        )

    def _keep(self, connection: sqlite3.Connection, report: UpdateReport) -> None:
        """Store the report, and what each example was used for and made of."""
        pairs, sources = uses(self.groups)
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
            )
        )


def _served(report: UpdateReport, publication: Publication, serving: ServingState) -> UpdateReport:
    """Promote the candidate, or say why it does not serve."""
    if publication.promote(serving):
        return replace(report, served=True)
    command = f"agentpref adapters promote {report.revision}"
    if report.namespace != "default":
        command += f" --namespace {shlex.quote(report.namespace)}"
    note = (
        f"{report.revision} passed and does not serve: somebody changed what serves while the "
        f"update ran; `{command}` makes it live"
    )
    return replace(report, notes=[*report.notes, note])
