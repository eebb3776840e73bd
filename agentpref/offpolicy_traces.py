"""Off-policy evaluation of whole conversations: what would revisions have earned by their ends?

A conversation is worth what its steps earned, discounted. Another revision is worth the same sums,
each step weighed by how much likelier it gives this answer and all before it than the revision that
gave them: per-decision importance sampling, with the weights of each step normalised (CWPDIS;
Thomas 2015). Where a thread was served by one revision first and by another one later, each answer
is compared with its own. Ratios multiply, so the longer conversations are, the sooner a log says
nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentpref.earned import CONFIDENCE, Earned, objection
from agentpref.errors import EvaluationError
from agentpref.evaluation import Evaluating
from agentpref.evaluation.choices import named_revisions
from agentpref.home import Home
from agentpref.models.threads import sharing
from agentpref.offpolicy import OffPolicy, Valued, scored, settings_of
from agentpref.record.database import connect, translated
from agentpref.record.pages import Since, selection
from agentpref.record.store import Store
from agentpref.serve.registry import Registry
from agentpref.traces import RewardSpec, Trace, read_traces
from agentpref.types import BASE, Progress

if TYPE_CHECKING:
    from agentpref.prove.ope.estimators import Numbers

THINGS = "conversations"


def off_policy_of_traces(
    home: str | Path | None = None,
    revisions: Sequence[str] = (),
    *,
    spec: RewardSpec,
    namespace: str = "default",
    model: str | None = None,
    since: Since = None,
    limit: int | None = 1000,
    progress: Progress | None = None,
) -> OffPolicy:
    """Estimate what revisions would have earned by whole conversations.

    ``answers`` and ``own`` of the result count conversations.

    Args:
        home: a home folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        revisions: as of :func:`agentpref.evaluate`; by default the base and what serves.
        spec: what a step earns, and the discount.
        namespace: whose log.
        model: the base model; by default the one that the revisions were trained on, by its name.
        since: only conversations that went on from this time on.
        limit: so many conversations at most, the newest; ``None``: all.
        progress: called with ``(stage, done, total)``.

    Raises:
        ConfigError: an argument has no meaning.
        EvaluationError: no conversation has a score under a key of ``spec``.
        Everything that :func:`agentpref.offpolicy.off_policy` raises.
    """
    which, place = selection(namespace, since, limit), Home.open(home)
    read = read_traces(place, spec, namespace=namespace, since=since, limit=limit)
    rated = [trace for trace in read.traces if any(step.scored for step in trace.steps)]
    if not rated:
        keys = ", ".join(map(repr, spec.keys))
        raise EvaluationError(
            f"no conversation of {namespace!r} has a score under {keys}: log some by "
            "log.feedback(run_id, key=…, score=…), or name another key"
        )
    with translated(place), closing(connect(place, readonly=True)) as database:
        Store(database).require_namespace(which.namespace)
        registry = Registry(place, namespace=namespace)
        targets = named_revisions(registry, revisions, base_alone=True)
        published = {one.revision_id: one for one in registry.list()}
        left_out, weighable = Counter[str](), list[Trace]()
        for trace in rated:
            reasons = (objection(step.run, published) for step in trace.steps)
            why = next((one for one in reasons if one is not None), None)
            if why is None:
                weighable.append(trace)
            else:
                left_out[why] += 1
        config, name = settings_of(targets, model)
        live = registry.state().live or BASE
        names = [BASE if one is None else one.revision_id for one in targets]
        logps: dict[str, Numbers] = {}
        kept: list[Earned] = []
        if weighable:
            steps = {
                step.run.run_id: Earned(
                    step.run, step.reward, float(step.run.params["temperature"])
                )
                for trace in weighable
                for step in trace.steps
            }
            loggers = sorted({one.run.revision or BASE for one in steps.values()})
            needed = [published.get(one) for one in dict.fromkeys([*names, live, *loggers])]
            job = Evaluating(database, registry, needed, progress or (lambda stage, done, n: None))
            with sharing(None):
                kept, logps = scored(job, [*steps.values()], config, name, Counter())
        found = _valued(weighable, kept, logps, names, live, registry, spec, left_out)
        return replace(found, model=name)


def _valued(
    traces: Sequence[Trace],
    kept: Sequence[Earned],
    logps: dict[str, Numbers],
    names: Sequence[str],
    live: str,
    registry: Registry,
    spec: RewardSpec,
    left_out: Counter[str],
) -> OffPolicy:
    """The estimates of each revision, or why there is none."""
    import numpy as np

    from agentpref.prove.ope import intervals
    from agentpref.prove.ope import traces as ope
    from agentpref.prove.ope.support import Support, refusals

    at = {one.run.run_id: number for number, one in enumerate(kept)}
    whole = [trace for trace in traces if all(step.run.run_id in at for step in trace.steps)]
    left_out["unreadable_step"] += len(traces) - len(whole)
    longest = max((len(trace.steps) for trace in whole), default=0)
    mask = np.zeros((len(whole), longest), bool)
    rewards, behaviour = np.zeros(mask.shape), np.zeros(mask.shape)
    target = {name: np.zeros(mask.shape) for name in {*names, live}}
    for row, trace in enumerate(whole):
        for column, step in enumerate(trace.steps):
            number = at[step.run.run_id]
            mask[row, column], rewards[row, column] = True, step.reward
            behaviour[row, column] = logps[step.run.revision or BASE][number]
            for name, own in target.items():
                own[row, column] = logps[name][number]
    groups = [trace.id for trace in whole]
    worth = ope.returns(rewards, mask, gamma=spec.gamma)
    size: dict[str, Any] = {"groups": len({*groups}), "distinct": len({*worth.round(12).tolist()}),
            "things": THINGS}  # fmt: skip

    def weights_of(name: str) -> Numbers:
        if not whole:
            return np.zeros((0, 1))
        return ope.trace_weights(behaviour, target[name], mask)

    def value(weights: Numbers, rows: Any = slice(None)) -> float:
        return ope.per_decision(
            rewards[rows], weights[rows], mask[rows], gamma=spec.gamma, normalised=True
        )

    of_live = weights_of(live)
    live_tells = not [*refusals(Support.of(of_live[:, -1]), **size)]
    state, found = registry.state(), []
    serves = {state.canary: "canary", live: "live"}
    given = Counter(
        next(iter(by)) for by in ({s.run.revision or BASE for s in t.steps} for t in whole)
        if len(by) == 1
    )  # fmt: skip
    for name in names:
        weights = weights_of(name)
        support = Support.of(weights[:, -1])
        why = tuple(
            refusals(
                support, missing=left_out["no_tokens"], greedy=left_out["greedy"], **size

            )
        )  # fmt: skip
        one = Valued(
            name, serves.get(name), None, None, None, support.effective, support.largest, why,
            own=given[name],
        )  # fmt: skip
        if not why:
            interval = intervals.bootstrap(
                lambda rows: value(weights, rows), groups, confidence=CONFIDENCE  # noqa: B023
            )  # fmt: skip
            better = None
            if name != live and live_tells:
                better = intervals.bootstrap(
                    lambda rows: value(weights, rows) - value(of_live, rows),  # noqa: B023
                    groups,
                    confidence=CONFIDENCE,
                )
            one = replace(
                one,
                value=value(weights),
                low=interval.low,
                high=interval.high,
                better=better,
                ips=ope.per_decision(rewards, weights, mask, gamma=spec.gamma),
            )
        found.append(one)
    return OffPolicy(
        registry.namespace,
        ", ".join(spec.keys),
        "conversation",
        "",
        len(whole),
        float(worth.mean()) if whole else None,
        CONFIDENCE,
        tuple(found),
        {reason: count for reason, count in left_out.items() if count},
    )
