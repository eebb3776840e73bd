"""The prompt arm: what people's comparisons ask for, as instructions instead of weights.

Some of what an adapter learns can simply be said. So the rules that say it are chosen on the
comparisons that would train an adapter, and put to the same gate by the same held-out ones. What
passes is a revision of kind ``prompt``: live's weights, and instructions that every engine puts
into the system prompt. With ``arm="both"`` an update trains its adapter as ever, and its report
says whether text alone does as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from agentpref.accounting import account, with_account
from agentpref.aside import with_aside
from agentpref.errors import JudgeError
from agentpref.home import Home
from agentpref.learn.data import UpdateRows
from agentpref.models.threads import sharing
from agentpref.outcome import Outcome
from agentpref.prefer.judges import rubric
from agentpref.prefer.strata import Listed
from agentpref.proving import By, Proving, encode, judge
from agentpref.repeats import stalled
from agentpref.serve.validate import check_revision
from agentpref.types import INSTRUCTED, UpdateReport, Verdict

if TYPE_CHECKING:
    from agentpref.config import UpdateConfig
    from agentpref.instructing.rules import Chosen
    from agentpref.learn.encode import EncodedExample
    from agentpref.learn.learner import Learner
    from agentpref.prove.checks import Scorer, UserCheck
    from agentpref.prove.evaluate import Scores

MARGIN = 0.03
"""By so much text may be less accurate than the adapter, to do as well."""

PRINCIPLES = 6
"""So many principles of the home's judges are tried as rules, at most."""


@dataclass
class Instructing(Proving):
    """An update that trains nothing: its candidate is live with other instructions."""

    def run(self) -> UpdateReport:
        """Go through the update in order."""
        # 1. What serves, and what there is to choose rules by and to prove them.
        stock = self.take_stock(again=self.wishes.again)
        serving, live, _, refusals, available, report = stock
        known = stalled(self.connection, report, available, again=self.wishes.again)
        report = with_aside(report if known is None else known, refusals, available)
        report = replace(report, update_id=self.update_id, created_at=self.created_at)
        there = By.of(available.new_held_out, available.old_held_out)
        if not there.rows or known is not None:
            from agentpref.models.base import find_base

            find_base(self.model)  # a wrong name is said in this case, too
            if not there.rows and available.new:
                waiting = len(available.new)
                report = replace(report, verdict="nothing_usable")
                report.notes.append(
                    f"none of {waiting} examples is held out, so none could prove instructions: "
                    "collect more"
                )
            return self.trace.end(self.connection, report)

        # 2. The candidate is live, and told the rules that help.
        checks = self.load_parts()
        adapter = None if live is None else check_revision(live)
        base = self.load_base(live)
        with sharing() as share:
            learner = self.learner(base, live, adapter)
            rows = self.encode(learner, available)
            chosen = find_rules(self.home, learner, rows, self.config)
            told = learner.instructions("candidate")
            report = replace(
                report,
                training={"start": INSTRUCTED, "instructions": told, **chosen._asdict()},
            )
            is_new = told != learner.instructions("live")
            if is_new:  # the rows are asked otherwise now, and counted anew
                learner.shortened.clear()
                learner.retokenized.clear()
                rows = encode(learner, rows.data)
            by = By.of(rows.new_held_out, rows.old_held_out)
            used = replace(rows, new=[], new_held_out=[] if by.learned else by.rows)
            groups = account(available, used, learner.objections)
            report = with_account(report, learner, groups)
            if not (is_new and by.rows):
                verdict: Verdict = "nothing_usable"
                if by.rows and self.config.rules:
                    verdict = "nothing_to_gain"
                    report.notes.append("what serves is told these rules already")
                elif by.rows:
                    verdict = "refused"
                    report.notes.append(_no_rule(chosen))
                    report.checks.append(_failed(chosen))
                report = replace(report, verdict=verdict, seconds=self.budget.spent())
                kept = Outcome(report, _uses(groups, report), self.wishes)
                return kept.settle(self.registry, self.connection, learner, serving)

            # 3. Prove.
            proven = self.prove(learner, by, rows, checks, serving.live, trained=rows.new)
            fares, words = self.exam(learner, available)
        report = replace(
            report,
            **proven.told,
            training={**report.training, **share.to_mapping(), "exam": fares},
            counts=report.counts | {"evaluated_thumbs": proven.thumbs},
            notes=[*report.notes, *by.notes, *proven.notes, *words],
            seconds=self.budget.spent(),
        )

        if report.verdict == "refused":
            report.notes.append(
                "nothing was trained: where a check advises to train otherwise, change or shorten "
                "the rules"
            )

        # 4. Record, publish and serve it: all of it or nothing.
        outcome = Outcome(report, _uses(groups, report), self.wishes, proven.shown)
        return outcome.settle(self.registry, self.connection, learner, serving)


def find_rules(home: Home, learner: Learner, rows: UpdateRows, config: UpdateConfig) -> Chosen:
    """Tell the learner's candidate the rules that the settings name, or those that help."""
    from agentpref.instructing import rules
    from agentpref.prove import probes
    from agentpref.prove.asked import asked

    if config.rules:
        learner.instruct(rules.written(config.rules))
        return rules.Chosen(config.rules, 0, 0)
    judged = probes.judged(learner, rows.new, seed=config.seed)
    proposals = [*rules.rules_of(asked(judged.answers)), *map(rules.rule_of, _principles(home))]
    examples = [row.example for row in rows.new]
    return rules.choose(learner, examples, proposals, beta=config.loss.beta, seed=config.seed)


def _principles(home: Home) -> list[str]:
    """What the home's judges judge by: the words of whoever runs it."""
    found: dict[str, None] = {}
    for name in rubric.names(home):
        with suppress(JudgeError):  # a broken rubric is for `agentpref judge list` to say
            found |= {principle.text: None for principle in rubric.read(home, name).principles}
    return [*found][:PRINCIPLES]


def _no_rule(chosen: Chosen) -> str:
    what = "the comparisons show nothing that a rule could say"
    if chosen.missed is not None:
        rule, better, worse = chosen.missed
        what = (
            f"none of {chosen.tried} rules provably helps; the best, {rule!r}, makes {better} of "
            f"{chosen.pairs} pairs better and {worse} worse"
        )
    return f"{what}: --rule TEXT puts a rule of your own to the gate"


def _failed(chosen: Chosen) -> dict[str, Any]:
    from agentpref.prove.results import CheckResult

    return asdict(CheckResult("rules", False, None, None, _no_rule(chosen)))


def _uses(
    groups: Mapping[str, Sequence[Listed]], report: UpdateReport
) -> dict[str, Sequence[Listed]]:
    """What the ledger keeps: examples that trained nothing stay new, and all if it was refused.

    Those that rules were chosen by stand there as anchors do: whoever is forgotten taints the
    instructions, and an adapter may still learn from the others.
    """
    if report.verdict in ("refused", "nothing_to_gain"):
        waiting = [*groups["waiting"], *groups["new_evaluated"]]
        return {**groups, "new_evaluated": [], "waiting": waiting}
    chosen_by = groups["waiting"] if report.training.get("tried") else ()
    return {**groups, "anchored": [*groups["anchored"], *chosen_by]}


@dataclass(frozen=True, slots=True)
class Beside:
    """What instructions come to beside an adapter, on the same new held-out prompts.

    ``text`` and ``adapter`` are accuracies; ``better`` prompts are ranked better by the text, and
    ``worse`` ones by the adapter. ``verdict`` is the gate's on the text.
    """

    rules: tuple[str, ...]
    verdict: str
    prompts: int
    text: float
    adapter: float
    better: int
    worse: int
    reasons: tuple[str, ...] = ()

    @property
    def does_as_well(self) -> bool:
        """Whether the text passes, and nothing shows that it is worse than the adapter."""
        from agentpref.prove.signs import sign_test

        is_worse = sign_test(self.worse, self.better, one_sided=True) <= 0.1
        return self.verdict == "passed" and self.text >= self.adapter - MARGIN and not is_worse

    @property
    def note(self) -> str:
        """The line of the report."""
        if not self.rules:
            return "text alone does not do as well: no rule that was tried provably helps"
        told = " ".join(" ".join(self.rules).split())
        found = (
            f"{self.text:.2f} right beside the adapter's {self.adapter:.2f} on {self.prompts} "
            f"held-out prompts ({self.better} better, {self.worse} worse)"
        )
        if self.does_as_well:
            return f"text alone does as well: {found}, told {told!r}; `--arm prompt` serves it"
        why = f"; the gate: {self.verdict}" + (f", {self.reasons[0]}" if self.reasons else "")
        return f"text alone does not do as well: {found}, told {told!r}{why}"


def beside(
    home: Home,
    learner: Learner,
    rows: UpdateRows,
    adapter: Scores,
    *,
    checks: Mapping[str, UserCheck],
    scorers: Mapping[str, Scorer],
    config: UpdateConfig,
    looks: int,
) -> Beside:
    """Put live with instructions to the gate that has judged an update's adapter.

    Args:
        home: whose judges' principles are tried as rules, too.
        learner: its candidate is the adapter, and is it again afterwards.
        rows: what trained and proved the adapter.
        adapter: the adapter's scores on the new held-out rows.
        checks: the user's own checks.
        scorers: the user's own scorers of answers.
        config: the settings of the update.
        looks: how often the held-out rows were looked at before.
    """
    from agentpref.prove.metrics import accuracy
    from agentpref.prove.signs import Signs

    with learner.aside("live"):
        chosen = find_rules(home, learner, rows, config)
        if not chosen.rules:
            return Beside((), "refused", 0, 0.0, 0.0, 0, 0)
        again = [_measured(learner, some) for some in (rows.new_held_out, rows.old_held_out)]
        new, _, _, result = judge(
            learner,
            *again,
            trained=_measured(learner, rows.new),
            ordinary=_measured(learner, rows.ordinary_held_out),
            checks=checks,
            scorers=scorers,
            config=config,
            looks=looks,
        )
    paired, others = new.paired(), adapter.paired()
    right = dict(zip(others.prompts, others.candidate, strict=True))
    both = [
        (prompt, right[prompt], text)
        for prompt, text in zip(paired.prompts, paired.candidate, strict=True)
        if prompt in right
    ]
    prompts, of_adapter, of_text = zip(*both, strict=True) if both else ((), (), ())
    signs = Signs.of(replace(paired, live=of_adapter, candidate=of_text, prompts=prompts))
    return Beside(
        chosen.rules,
        result.verdict,
        signs.prompts,
        accuracy(of_text) if both else 0.0,
        accuracy(of_adapter) if both else 0.0,
        signs.better,
        signs.worse,
        result.reasons,
    )


def _measured(learner: Learner, rows: Sequence[EncodedExample]) -> list[EncodedExample]:
    return learner.measure([row.example for row in rows])
