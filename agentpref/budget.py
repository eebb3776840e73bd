"""How much of what is new an update has time for.

An update with a limit of time learns and proves the oldest of the new examples, as many as fit; the
others wait. What an example costs is counted in tokens scored, and how long these take is measured.
Scores that an earlier update stored cost nothing, so an update that was ended, or that proved too
little, gets further the next time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

from agentpref.config import UpdateConfig
from agentpref.learn.data import Available, UpdateRows, prepare, replay_size
from agentpref.learn.schedule import ORDINARY_SHARE
from agentpref.prefer.strata import Listed, sample
from agentpref.types import Verdict

if TYPE_CHECKING:
    from agentpref.learn.adapter import Policy
    from agentpref.learn.encode import EncodedExample
    from agentpref.learn.learner import Learner

COST_OF_TRAINING = 4
"""How many tokens are scored in the time that one is trained once, with its share of the KL."""

COST_OF_DRAWING = 2
"""How many tokens are scored for each one replayed, to find what live gets most wrong."""

_SHARE = 0.9
"""What is planned for; the rest of the time is for what the estimates miss."""

_SHARE_OF_OLD = 0.25
"""What of the time may go into evaluating old examples."""

_AT_ONCE = 64

_FROZEN: tuple[Policy, Policy] = ("base", "live")


@dataclass(frozen=True, slots=True)
class Budget:
    """The time of one update: its limit in seconds (``None``: no limit), from its start on."""

    limit: float | None = None
    clock: Callable[[], float] = field(default_factory=lambda: time.monotonic)
    started: float = field(default_factory=lambda: time.monotonic())

    def spent(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started

    def left(self) -> float:
        """Seconds that are left; below 0 when there are none."""
        return float("inf") if self.limit is None else self.limit - self.spent()

    def for_training(self, learner: Learner, rows: Sequence[EncodedExample]) -> float | None:
        """Seconds for training: what is left, less what the evaluation of some rows will take."""
        if self.limit is None:
            return None
        from agentpref.prove import evaluate

        known = sum(_known_tokens(learner, policy, rows) for policy in _FROZEN)
        needed = evaluate.tokens_needed(rows) - known
        return max(0.0, self.left() - needed / learner.scoring_speed(rows))

    def notes(self, groups: Mapping[str, Sequence[Listed]], verdict: Verdict) -> list[str]:
        """Says what the limit did: how many examples wait, and whether it was not enough.

        ``groups`` are those of :func:`agentpref.accounting.account`, ``verdict`` is the gate's.
        """
        if self.limit is None:
            return []
        minutes = f"{self.limit / 60:g}"
        notes = []
        waiting, proving = len(groups["waiting"]), len(groups["new_evaluated"])
        if waiting and groups["trained"]:
            notes.append(
                f"{waiting} new examples wait for the next update: there was no time for them in "
                f"max_minutes {minutes}"
            )
            if verdict == "insufficient":
                notes.append(
                    f"{proving} new held-out examples fitted into max_minutes {minutes}, and do "
                    "not prove a gain: raise max_minutes unless the next update, which finds the "
                    "scores of this one, gets far enough"
                )
        if self.spent() > 1.1 * self.limit:
            notes.append(
                f"the update took {self.spent() / 60:.2g} minutes instead of {minutes}: to load "
                "the model, to train one batch and to evaluate takes that long; raise max_minutes"
            )
        return notes


def choose(
    learner: Learner,
    available: Available,
    config: UpdateConfig,
    budget: Budget,
    *,
    replay: int | None = None,
) -> UpdateRows:
    """Choose and encode what there is time for; ``replay`` is that of :func:`prepare`.

    Where nothing of it can be trained, the examples that cannot be encoded are put aside, and
    others are chosen in their place.
    """
    while True:
        chosen = affordable(learner, available, config, budget)
        rows = prepare(learner, chosen, None, config, replay=replay)
        left = tuple(one for one in available.new if one.example_id not in learner.objections)
        if rows.new or not left or len(left) == len(available.new):
            return rows
        available = replace(available, new=left)


def affordable(
    learner: Learner, available: Available, config: UpdateConfig, budget: Budget
) -> Available:
    """The part of what is available that there is time to learn and to prove.

    These are the oldest new examples, trained and held out alike, at least one batch of them, and
    of the old held-out ones as many as fit into a quarter of the time. Without a limit it is
    everything. Examples that cannot be encoded take no time, and are left out under a reason later.
    """
    if budget.limit is None:
        return available
    fresh = [*available.new, *available.new_held_out]
    queue = iter(sorted(fresh, key=lambda one: (one.created_at, one.example_id)))
    bill, chosen, old = _Bill(config, len(available.old)), set[str](), [*available.old_held_out]
    is_full = is_crowded = False  # crowded: there is room for nothing but the rest of a batch
    while not is_full and (some := list(islice(queue, _AT_ONCE))):
        if bill.trained and budget.left() <= 0:
            break
        some = [one for one in some if not (is_crowded and one.held_out)]
        rows = {row.example.example_id: row for row in learner.measure(available.read(some))}
        encoded = [*rows.values()]
        room = 0.0
        if encoded:
            speed = learner.scoring_speed(encoded)
            if bill.is_empty:
                old = bill.start(encoded, old, _SHARE_OF_OLD * budget.left() * speed)
                anchors = available.ordinary([row.example for row in encoded])
                bill.anchor(learner.measure(anchors))
            room = _SHARE * budget.left() * speed
        scored = {
            policy: dict(zip(rows, learner.is_scored(policy, encoded), strict=True))
            for policy in _FROZEN
        }
        for one in some:
            row = rows.get(one.example_id)
            if row is not None and is_crowded and one.held_out:
                continue
            if row is not None:
                bill.add(row, {policy for policy in _FROZEN if scored[policy][one.example_id]})
                is_crowded = bill.total() > room
                is_full = is_crowded and bill.trained > config.batch_size
                if is_full:
                    break
            chosen.add(one.example_id)
    return replace(
        available,
        new=tuple(one for one in available.new if one.example_id in chosen),
        new_held_out=tuple(one for one in available.new_held_out if one.example_id in chosen),
        old_held_out=tuple(old),
    )


class _Bill:
    """What an update costs, in tokens scored, as rows are added to it."""

    def __init__(self, config: UpdateConfig, old: int) -> None:
        self.trained = 0
        self._config, self._old = config, old
        self._rows, self._width, self._total, self._limit = 0, 0, 0.0, 0
        self._beside = 0.0  # the mean width of the ordinary answers that are trained

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added yet."""
        return self._rows == 0

    def start(
        self, rows: Sequence[EncodedExample], old: Sequence[Listed], tokens: float
    ) -> list[Listed]:
        """Choose old held-out examples, as wide as some rows, whose evaluation takes so much."""
        each = 3 * sum(row.width for row in rows) / len(rows)
        most = min(self._config.gate.max_old_pairs, max(0, int(tokens / each)))
        chosen = sample(old, most)
        self._total += each * len(chosen)
        return chosen

    def anchor(self, rows: Sequence[EncodedExample]) -> None:
        """Add ordinary answers: some are trained beside the others, some are scored and asked."""
        from agentpref.prove import evaluate, probes

        held_out = [row for row in rows if row.example.held_out]
        trained = [row.width for row in rows if not row.example.held_out]
        self._beside = sum(trained) / len(trained) if trained else 0.0
        self._total += 2 * sum(row.width for row in held_out)
        if held_out:
            asked = min(evaluate.ORDINARY_PROBES, len(held_out))
            self._total += evaluate.COST_OF_WRITING * 2 * asked * probes.token_limit(held_out)

    def add(self, row: EncodedExample, scored: Container[str]) -> None:
        """Add a row, of which some frozen policies have scores already."""
        from agentpref.prove import evaluate, probes

        self._rows += 1
        self._width += row.width
        self._limit = max(self._limit, probes.token_limit([row]))
        if row.example.held_out:
            passes = sum(policy not in scored for policy in _FROZEN) + 1
            passes += self._rows - self.trained <= evaluate.KL_ROWS
        else:
            self.trained += 1
            needed = _FROZEN if self._config.loss.wpo else _FROZEN[:1]
            passes = sum(policy not in scored for policy in needed) + COST_OF_TRAINING
        self._total += passes * row.width

    def total(self) -> float:
        """The cost of all rows, of what is trained beside them, and of the answers to probes."""
        from agentpref.prove import evaluate, probes

        replayed = min(self._old, replay_size(self.trained, self._config.replay))
        each = (COST_OF_TRAINING + COST_OF_DRAWING) * self._width / self._rows
        beside = COST_OF_TRAINING * self._beside * ORDINARY_SHARE * (self.trained + replayed)
        asked = min(probes.PROBES, self._rows) + min(probes.SAMPLED, self._rows)
        written = 2 * asked * self._limit
        return self._total + replayed * each + beside + evaluate.COST_OF_WRITING * written


def _known_tokens(learner: Learner, policy: Policy, rows: Sequence[EncodedExample]) -> int:
    known = learner.is_scored(policy, rows)
    return sum(row.width for row, is_known in zip(rows, known, strict=True) if is_known)
