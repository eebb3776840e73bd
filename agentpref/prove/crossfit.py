"""Lets trained prompts give evidence on a small night, and decides with it.

A fifth of the prompts is held out, so a hundred comparisons leave twenty to prove a gain by. Here
the trained prompts give evidence too: they are dealt into parts by hash, and for every part but the
first a model is trained on the parts before it, from live and in as many steps as the candidate,
and judges the part. Why these signs may be added to those of the held-out prompts is in
``signs.py``. Held-out prompts train none of the models.

They are signs of what such a training learns, and count for a candidate that learned it: one that
is right about fewer of the prompts that it trained on than models that had not seen these was
trained too little, and then nothing is added.

It is done last, where it can still decide: if every guard passes, and more held-out prompts are
better than worse, but alone prove no gain. The candidate stays as it is, bit for bit; an update
that is interrupted here resumes after its training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from agentpref.config import GateSettings, UpdateConfig
from agentpref.errors import TrainingDiverged
from agentpref.prove import gate
from agentpref.prove.bootstrap import Paired
from agentpref.prove.evidence import Evidence
from agentpref.prove.metrics import accuracy
from agentpref.prove.results import GateResult, dot
from agentpref.prove.signs import Signs

if TYPE_CHECKING:
    from agentpref.learn.data import UpdateRows
    from agentpref.learn.encode import EncodedExample
    from agentpref.learn.learner import Learner
    from agentpref.learn.trainer import Limits, TrainingReport

Part = Sequence["EncodedExample"]

_SHARE = 0.8
"""Of the time that is left, what the models may take; they are evaluated in the rest."""


def decide(
    learner: Learner,
    rows: UpdateRows,
    evidence: Evidence,
    *,
    training: TrainingReport,
    config: UpdateConfig,
    limits: Limits,
) -> tuple[Evidence, GateResult]:
    """Judge the candidate, with the evidence of trained prompts if it takes that to decide.

    Args:
        learner: holds live and candidate.
        rows: what the candidate was trained on.
        evidence: what was measured of the candidate; it is returned with what was added.
        training: the candidate's training, which says how long one takes.
        config: the seed and the settings.
        limits: the seconds that are left, and signals.
    """
    parts = deal(rows.new, config.gate) if _is_small(evidence, config.gate) else []
    obstacle = _obstacle(parts, training, limits)
    if obstacle is not None:
        evidence = replace(evidence, notes=(*evidence.notes, obstacle))
    if obstacle is None and not evidence.cut_short:
        evidence = replace(evidence, to_cross_fit=sum(map(_prompts, parts[1:])))
    result = gate.judge(evidence, config.gate, seed=config.seed)
    held_out = Signs.of(evidence.new)
    is_open = result.verdict == "insufficient" and held_out.better > held_out.worse
    if not evidence.to_cross_fit or not is_open:
        return evidence, result
    from agentpref.prove import evaluate

    try:
        found = cross_fit(learner, parts, [*rows.old, *rows.ordinary], training, limits)
    except TrainingDiverged as error:
        note = f"cross-fitting was left out, since one of its models diverged: {error}"
        return replace(evidence, notes=(*evidence.notes, note)), result
    judged = [row for part in parts[1:] for row in part]
    own = accuracy(evaluate.score(learner, judged).paired(matched=True).candidate)
    theirs = accuracy(found.candidate)
    if own < theirs:
        note = (
            f"trained prompts gave no evidence: models that had not seen them are right about "
            f"{dot(theirs)}, and the candidate, which trained on them, about {dot(own)}; train "
            "longer (epochs) or with a higher rate"
        )
        return replace(evidence, notes=(*evidence.notes, note)), result
    evidence = replace(evidence, cross_fitted=found)
    return evidence, gate.judge(evidence, config.gate, seed=config.seed)


def deal(rows: Part, settings: GateSettings) -> list[Part]:
    """Deal rows into ``gate.folds`` parts of about as many prompts, by hash; none if too few."""
    by_prompt: dict[str, list[EncodedExample]] = {}
    for row in rows:
        by_prompt.setdefault(row.example.prompt.id, []).append(row)
    order = sorted(by_prompt, key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(order) < settings.folds:
        return []
    bounds = [round(n * len(order) / settings.folds) for n in range(settings.folds + 1)]
    return [
        [row for name in order[start:end] for row in by_prompt[name]]
        for start, end in pairwise(bounds)
    ]


def cross_fit(
    learner: Learner,
    parts: Sequence[Part],
    replayed: Part,
    training: TrainingReport,
    limits: Limits,
) -> Paired:
    """Judge every part but the first by a model trained on the parts before it.

    Old rows are replayed as for the candidate, but those on a prompt that is to be judged. All take
    about as many steps as the candidate did in its ``training``: one that saw a third of the rows
    once where the candidate saw all of them would have learned nothing, and prove nothing.

    Raises:
        TrainingDiverged: the loss of one of the models is no longer finite.
        KeyboardInterrupt: a signal came.
    """
    from agentpref.prove import evaluate

    rows, found = sum(map(len, parts)) + len(replayed), list[Paired]()
    if limits.seconds is not None:
        limits = replace(limits, seconds=_SHARE * limits.seconds / (len(parts) - 1))
    for number in range(1, len(parts)):
        judged = parts[number]
        prompts = {row.example.prompt.id for row in judged}
        before = [row for part in parts[:number] for row in part]
        old = [row for row in replayed if row.example.prompt.id not in prompts]
        epochs = math.ceil(training.epochs * rows / (len(before) + len(old)))
        with learner.trial(
            [*before, *old], epochs=epochs, imitation=training.imitation, limits=limits
        ):
            found.append(evaluate.score(learner, judged).paired(matched=True))
    return Paired.pooled(found)


def _is_small(evidence: Evidence, settings: GateSettings) -> bool:
    return 0 < len(set(evidence.new.prompts)) < settings.cross_fit_below


def _obstacle(parts: Sequence[Part], training: TrainingReport, limits: Limits) -> str | None:
    """Say what keeps a small night from being cross-fitted."""
    if not parts:
        return None
    if training.processes > 1:
        return (
            "trained prompts gave no evidence (gate.cross_fit_below): several processes trained "
            "together; train in one"
        )
    needed = training.seconds * (len(parts) - 1)
    left = math.inf if limits.seconds is None else _SHARE * limits.seconds
    if needed > left:
        return (
            "trained prompts gave no evidence (gate.cross_fit_below): there was no time to train "
            f"{len(parts) - 1} more models on parts of them; raise max_minutes"
        )
    return None


def _prompts(part: Part) -> int:
    return len({row.example.prompt.id for row in part})
