"""One adoption: an adapter that was trained elsewhere is judged as an update's candidate is.

Nothing is trained. The adapter is put beside live, both are asked about the held-out examples of
the home, and the gate decides; what passes is published and promoted like any other candidate.

What an adapter has learned elsewhere nobody here knows, so the ledger claims little. The held-out
examples that proved it count as learned by it from then on: later updates must not lose them.
Those of the training side stay new, and so do all if it is refused, since they are not at fault.
Its parent is what served, which it was proven against and replaces; so it is also tainted with it.

The module cannot be called ``adopt``: importing it would hide the function ``agentpref.adopt``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from agentpref.accounting import account, with_account
from agentpref.aside import with_aside
from agentpref.config import UpdateConfig
from agentpref.errors import RevisionError
from agentpref.groundwork import locked
from agentpref.home import Home
from agentpref.learn.data import Available
from agentpref.learn.process import Interrupts
from agentpref.models.threads import sharing
from agentpref.outcome import Outcome, Wishes
from agentpref.prefer.strata import Listed
from agentpref.prove import kl_budget
from agentpref.proving import By, Proving
from agentpref.record.journal import Trace
from agentpref.record.messages import as_json, new_id
from agentpref.serve.foreign import Foreign, read_foreign
from agentpref.serve.validate import check_revision
from agentpref.types import Example, Progress, Prompt, UpdateReport

if TYPE_CHECKING:
    from agentpref.models.base import BaseModel
    from agentpref.prove.checks import Scorer, UserCheck

R = TypeVar("R")

OUTLOOK = "nothing was changed; the same command starts over"


def adopt(
    home: str | Path | None,
    folder: str | Path,
    *,
    model: str,
    config: UpdateConfig | None = None,
    namespace: str = "default",
    checks: Mapping[str, UserCheck] | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    progress: Progress | None = None,
    promote: bool = True,
    canary: float | None = None,
    unseen: bool = False,
    trained_on: Iterable[str] = (),
    interrupts: Interrupts | None = None,
) -> UpdateReport:
    """Prove an adapter that was trained elsewhere, and serve it if it is better than live.

    It is evaluated as the candidate of an update is, and trains nothing. The held-out examples that
    live has not learned prove a gain; if there are none, those that it has learned do. Every
    adoption is one more look at them, and a later proof must be the surer.

    Args:
        home: a home folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        folder: where peft saved the adapter; it is only read.
        model: the base model, as for :func:`agentpref.update`.
        config: settings; those of the training do nothing.
        namespace: whose held-out examples to ask about, and whose live revision to replace.
        checks: your own checks by name; ``None`` runs those of installed packages.
        scorers: your own scorers of answers by name, in the same way.
        progress: called with ``(stage, done, total)`` as work goes on.
        promote: ``False`` publishes what passes the gate, and leaves what serves as it is.
        canary: let what passes serve this share of the threads, instead of promoting it.
        unseen: the adapter was trained on nothing of this home, so that the examples an update
            would train on prove, too. If it has seen them, they prove nothing.
        trained_on: ids of the runs of this home whose text it was trained on: if one of them is
            forgotten, so is the adapter.
        interrupts: ends the adoption from another thread, as a signal would.

    Returns:
        The report, as of an update. ``training`` names what was adopted. ``nothing_new`` means that
        there is no example to prove it by, and ``nothing_usable`` that none can be evaluated.

    Raises:
        ConfigError: ``canary`` is out of range, or the folder is in the home.
        InvalidAdapter: the adapter is broken, unsafe, of another base, or none that all engines
            serve; or the live revision's files are not those that were published.
        RevisionError: it was, or live was, trained on what was forgotten since.
        NotAHome: there is no home in the folder.
        UnknownNamespace: other namespaces are in the home, and this one is not.
        UpdateRunning: an update has locked the home.
        ModelNotFound: the model resolves to nothing.
        WrongBase: the live revision was trained on another base.
        UpdateInterrupted: a signal came. In all these cases nothing was changed.
    """
    wishes = Wishes.checked(promote, canary)
    place = Home.open(home)
    config = kl_budget.settled(config or UpdateConfig(), place, namespace)
    foreign = read_foreign(folder, place)
    interrupts = interrupts or Interrupts()
    blank = UpdateReport(
        new_id(), namespace, model, time.time(), "nothing_new", None, config=config.to_mapping()
    )
    with (
        Trace(place, blank) as trace,
        locked(place, namespace, interrupts, OUTLOOK) as connection,
    ):
        return _Adoption(
            place,
            connection,
            model,
            config,
            namespace,
            checks,
            scorers,
            interrupts.reporting(progress),
            interrupts,
            trace,
            wishes,
            foreign,
            unseen,
            tuple(dict.fromkeys(trained_on)),
        ).run()


@dataclass
class _Adoption(Proving):
    """One adoption while it runs."""

    foreign: Foreign
    unseen: bool
    trained_on: tuple[str, ...]

    def run(self) -> UpdateReport:
        """Go through the adoption in order."""
        # 1. What serves, and what there is to prove an adapter by.
        serving, live, _, refusals, available, report = self.take_stock(again=False)
        self.foreign.require_untainted(self.connection, self.home)
        self._require_runs()
        origin = {"start": "adopted", "adopted": self.foreign.about}
        report = with_aside(replace(report, training=origin), refusals, available)
        report.notes.extend(self.foreign.notes)
        there = self._proving(available.new_held_out, available.new, available.old_held_out)
        if not there.rows:
            from agentpref.models.base import find_base

            find_base(self.model)  # a wrong name is said in this case, too
            report.notes.append(self._nothing(available))
            return self.trace.end(self.connection, report)

        # 2. The base, and on it live and the adapter.
        checks = self.load_parts()
        adapter = None if live is None else check_revision(live)
        base = self.load_base(live)
        self.foreign.require_base(base.name, self._layers(base))
        with sharing() as share:
            learner = self.learner(base, live, adapter, candidate=self.foreign.files)
            rows = self.encode(learner, available)
            by = self._proving(rows.new_held_out, rows.new, rows.old_held_out)
            used = replace(rows, new=[], new_held_out=[] if by.learned else by.rows)
            groups = account(available, used, learner.objections)
            report = with_account(report, learner, groups)
            if not by.rows:
                report = replace(report, verdict="nothing_usable")
                return self.trace.end(self.connection, report)

            # 3. Prove.
            proven = self.prove(
                learner, by, rows, checks, serving.live, trained=[] if self.unseen else rows.new
            )
            fares, words = self.exam(learner, available)
        report = replace(
            report,
            **proven.told,
            training={**origin, **share.to_mapping(), "exam": fares},
            counts=report.counts | {"evaluated_thumbs": proven.thumbs},
            notes=[*report.notes, *by.notes, *proven.notes, *words],
            seconds=self.budget.spent(),
        )

        # 4. Record what proved it, publish it, and serve it: all of it or nothing.
        outcome = Outcome(report, self._uses(groups, report), self.wishes, proven.shown)
        return outcome.settle(self.registry, self.connection, learner, serving)

    def _proving(self, held_out: Sequence[R], trainable: Sequence[R], old: Sequence[R]) -> By[R]:
        """What proves a gain: what live has not learned, or else what it has."""
        return By.of([*held_out, *(trainable if self.unseen else ())], old)

    def _nothing(self, available: Available) -> str:
        """Says why there is nothing to prove an adapter by."""
        waiting = len(available.new)
        if not waiting:
            return "no judgements that could prove an adapter: collect some, then adopt it"
        return (
            f"none of {waiting} examples is held out, so none could prove an adapter: collect more,"
            " or say that it has seen nothing of this home: unseen=True (--unseen)"
        )

    def _require_runs(self) -> None:
        """Refuse an adapter that was trained on a run which is not here any more."""
        query = """SELECT count(*) FROM json_each(?)
            WHERE value NOT IN (SELECT run_id FROM run)"""
        (gone,) = self.connection.execute(query, (as_json([*self.trained_on]),)).fetchone()
        if gone:
            raise RevisionError(
                f"{gone} of the {len(self.trained_on)} runs that {self.foreign.files.folder} was "
                "trained on are not in the home: they were forgotten or removed since; train "
                "another one without them"
            )

    def _layers(self, base: BaseModel) -> dict[str, tuple[int, int]]:
        from agentpref.learn.adapter import layer_shapes

        return layer_shapes(base)

    def _uses(
        self, groups: Mapping[str, Sequence[Listed]], report: UpdateReport
    ) -> dict[str, Sequence[Listed]]:
        """What the ledger keeps: what counts as learned, what stays new, and what trained it."""
        sides: dict[bool, list[Listed]] = {True: [], False: [*groups["waiting"]]}
        for one in groups["new_evaluated"]:
            sides[one.held_out and report.verdict != "refused"].append(one)
        return {
            **groups,
            "new_evaluated": sides[True],
            "waiting": sides[False],
            "anchored": [_trained(run_id, self.namespace) for run_id in self.trained_on],
        }


def _trained(run_id: str, namespace: str) -> Example:
    """A run that trained an adapter elsewhere, as the ledger names it: an answer, not learned."""
    name = hashlib.sha256(f"trained an adopted adapter: {run_id}".encode()).hexdigest()
    return Example(name, namespace, 0.0, Prompt("", ()), (), "ordinary", provenance=(run_id,))
