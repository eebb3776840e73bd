"""After the swap: do people like what serves now as much as what served before?

The canary is compared with the live revision while both serve, and the live revision with what a
rollback would make live. ``thumbs`` reads the votes and ``sequential`` tests them. What is proven
is told, and done as far as people allow.

Votes count on what was answered since the revision began to serve, or was promoted by hand again:
so nothing that was released from quarantine and promoted falls over the same votes. A change is
made by compare-and-swap in one transaction, so of two processes that decide at once, one does.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from math import ceil, log, sqrt
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from agentpref.config import WatchSettings
from agentpref.errors import RevisionError
from agentpref.printable import in_namespace
from agentpref.record.database import connect, transaction, translated
from agentpref.record.store import Store
from agentpref.serve import decisions, status
from agentpref.serve.quarantine import intact_previous
from agentpref.serve.sequential import Rate, e_value, lower_in_time, lower_together
from agentpref.serve.status import HistoryEntry, ServingState
from agentpref.serve.thumbs import ThumbVote, votes_on
from agentpref.types import BASE

if TYPE_CHECKING:
    from agentpref.serve.registry import Registry

Verdict: TypeAlias = Literal["worse", "better", "open"]

DROP = 0.1
"""The drop of the share of likes by which the number of votes that are needed is told."""

_POWER = 0.84  # the quantile of 80 %


@dataclass(frozen=True, slots=True)
class Finding:
    """What people's thumbs say of one revision that serves.

    Attributes:
        namespace: whose revision.
        role: ``"canary"`` or ``"live"``.
        revision: which one.
        against: what it is compared with, ``"base"`` for the bare base model: the live revision, of
            a canary; what a rollback makes live, of the live one.
        since: votes count from then on, in seconds since 1970.
        now: likes and votes of the revision.
        before: those of what it is compared with.
        worse: the e-value for "worse than the other by more than the margin".
        better: the e-value for "better than the other".
        verdict: ``"worse"`` or ``"better"`` where the e-value is 1/α or more, else ``"open"``.
        needed: at how many votes a drop by a tenth shows in four of five cases, roughly; ``None``
            if the other one has too few.
        action: what was done: ``"rolled_back"``, ``"ended"`` (of a canary), ``"promoted"``; or
            ``None``.
        why_not: why nothing was done about what is proven; else empty.
    """

    namespace: str
    role: Literal["canary", "live"]
    revision: str
    against: str
    since: float
    now: Rate
    before: Rate
    worse: float
    better: float
    verdict: Verdict
    needed: int | None
    action: Literal["rolled_back", "ended", "promoted"] | None = None
    why_not: str = ""

    @property
    def thumbs(self) -> str:
        """The two shares, as in ``thumbs .81 -> .70 on 212 votes``."""
        return f"thumbs {_share(self.before)} -> {_share(self.now)} on {self.now.votes:,} votes"

    @property
    def message(self) -> str:
        """One line for people."""
        if self.verdict == "open":
            after = "shows after about" if self.needed else "cannot show:"
            needed = f"{self.needed:,}" if self.needed else f"{self.against} has too few votes"
            return (
                f"{self.revision} ({self.role}): thumbs {_share(self.now)} on {self.now.votes:,} "
                f"votes, {self.against} {_share(self.before)} on {self.before.votes:,}: nothing is "
                f"proven; a drop of {_point(DROP)} {after} {needed}"
            )
        what = {
            "rolled_back": f"rolled back; {self.against} serves",
            "ended": "the canary is ended",
            "promoted": "proven better and promoted",
            None: f"proven {self.verdict}; {self.why_not}",
        }[self.action]
        return f"{self.revision} ({self.role}): {self.thumbs}: {what}"

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rates = {name: getattr(self, name)._asdict() for name in ("now", "before")}
        return asdict(self) | rates | {"message": self.message}


def check(registry: Registry, *, act: bool = True) -> list[Finding]:
    """Look at the thumbs, and act; see :meth:`agentpref.Registry.check_thumbs`."""
    home, namespace = registry.home, registry.namespace
    with (
        translated(home),
        closing(connect(home, readonly=True)) as connection,
        Store(connection).one_state(),
    ):
        state = status.read_state(connection, namespace)
        held = decisions.read_hold(connection, namespace)
        settings = decisions.read_watch(connection, namespace)
        found = look(connection, state, settings)
    done: list[Finding] = []
    for finding in found:
        changed = any(one.action for one in done)
        if finding.verdict != "open":
            finding = _acted(registry, finding, state, held, settings, act and not changed)
        done.append(finding)
    return done


def tell(registry: Registry, *, act: bool = True) -> list[str]:
    """Look at the thumbs, act, and say what was proven worse or was done."""
    found = check(registry, act=act)
    return [one.message for one in found if one.verdict == "worse" or one.action]


def look(
    connection: sqlite3.Connection, state: ServingState, settings: WatchSettings
) -> list[Finding]:
    """Compare what serves: the live revision first, then the canary."""
    history = status.read_history(connection, state.namespace)
    found = []
    if state.live is not None:  # the base model is what people go back to, and has no quarantine
        found.append(_look_at_live(connection, state.live, state, history, settings))
    if state.canary is not None:
        found.append(_look_at_canary(connection, state.canary, state, history, settings))
    return found


def _look_at_live(
    connection: sqlite3.Connection,
    live: str,
    state: ServingState,
    history: Sequence[HistoryEntry],
    settings: WatchSettings,
) -> Finding:
    against = status.previous(connection, state.namespace)
    other = against or BASE
    last = max(i for i, entry in enumerate(history) if entry.action in ("promote", "rollback"))
    since = history[last].at
    # The bare base model served before anybody promoted anything.
    first = 0.0 if against is None else min(e.at for e in history if e.live == against)
    votes = votes_on(connection, state.namespace, [other], since=first, until=since)
    votes += votes_on(connection, state.namespace, [live], since=since)
    now, before = _rate(votes, live), _rate(votes, other)
    room = 1 / _pairs_needed(before, settings.alpha) - 1 / max(before.votes, 0.5)
    return Finding(
        state.namespace,
        "live",
        live,
        other,
        since,
        now,
        before,
        *_weighed(
            lower_in_time(before, now, margin=settings.margin),
            lower_in_time(before.disliked(), now.disliked()),
            settings,
        ),
        needed=ceil(1 / room) if room > 0 else None,
    )


def _look_at_canary(
    connection: sqlite3.Connection,
    canary: str,
    state: ServingState,
    history: Sequence[HistoryEntry],
    settings: WatchSettings,
) -> Finding:
    live, since = state.live or BASE, 0.0
    for entry in reversed(history):
        if (entry.canary, entry.live) != (canary, state.live):
            break
        since = entry.at
    votes = votes_on(connection, state.namespace, [canary, live], since=since, only_threads=True)
    likes = [(vote.revision == canary, vote.liked) for vote in votes]
    dislikes = [(is_canary, not liked) for is_canary, liked in likes]
    now, before = _rate(votes, canary), _rate(votes, live)
    pairs = _pairs_needed(before, settings.alpha)
    return Finding(
        state.namespace,
        "canary",
        canary,
        live,
        since,
        now,
        before,
        *_weighed(
            [0.0, *lower_together(likes, margin=settings.margin)][-1],
            [0.0, *lower_together(dislikes)][-1],
            settings,
        ),
        needed=ceil(pairs / (1 - state.weight)) if state.weight < 1 else None,
    )


def _rate(votes: Sequence[ThumbVote], revision: str) -> Rate:
    liked = [vote.liked for vote in votes if vote.revision == revision]
    return Rate(sum(liked), len(liked))


def _weighed(worse: float, better: float, settings: WatchSettings) -> tuple[float, float, Verdict]:
    """Both e-values of their logarithms, and what they prove."""
    enough = -log(settings.alpha)
    verdict: Verdict = "worse" if worse >= enough else "better" if better >= enough else "open"
    return e_value(worse), e_value(better), verdict


def _pairs_needed(before: Rate, alpha: float) -> float:
    """How many votes of each of two revisions show a drop of :data:`DROP` in four of five cases.

    By the normal approximation, with 2·log(1/α) for the square of the bound; roughly what
    ``benchmarks/rollback.py`` finds.
    """
    p = (before.likes + 1) / (before.votes + 2)
    low = max(0.0, p - DROP)
    spread = (p * (1 - p) + low * (1 - low)) / 2
    return max(1.0, spread * ((sqrt(-2 * log(alpha)) + _POWER) / DROP) ** 2)


def _acted(
    registry: Registry,
    finding: Finding,
    state: ServingState,
    held: decisions.Hold | None,
    settings: WatchSettings,
    act: bool,
) -> Finding:
    """Do what a proof asks for, or say why not and what would do it."""
    name, namespace = finding.revision, registry.namespace
    is_live, is_worse = finding.role == "live", finding.verdict == "worse"
    if is_live and not is_worse:
        return replace(finding, why_not="it serves already")
    command = "rollback" if is_live else "canary --end" if is_worse else f"promote {name}"
    cure = f"`{in_namespace(f'agentpref adapters {command}', namespace)}` does it"
    if held is not None:
        lift = in_namespace("agentpref adapters hold --end", namespace)
        return replace(finding, why_not=f"the namespace is held (`{lift}`); {cure}")
    if (settings.live if is_live else settings.canary) == "report":
        switch = in_namespace(f"agentpref watch --set {finding.role}=act", namespace)
        return replace(finding, why_not=f"{cure}; `{switch}` lets agentpref do it by itself")
    if not act:
        return replace(finding, why_not=f"nothing was to be changed; {cure}")
    try:
        if not is_worse:
            registry.promote(
                name, expected_generation=state.generation, reason=f"{finding.thumbs}: promoted"
            )
            return replace(finding, action="promoted")
        withdraw(registry, finding, state)
    except RevisionError as error:  # somebody changed what serves, or the revision is unfit
        return replace(finding, why_not=f"it could not be done: {error}")
    return replace(finding, action="rolled_back" if is_live else "ended")


def withdraw(registry: Registry, finding: Finding, state: ServingState) -> ServingState:
    """Take a revision out of service and put it into quarantine, in one transaction.

    Raises:
        GenerationConflict: another process changed what is served since ``state`` was read.
        RevisionError: no promotion is left to undo.
    """
    is_live = finding.role == "live"
    what = f"{finding.thumbs}: {'rolled back' if is_live else 'the canary was ended'}"
    home, namespace = registry.home, registry.namespace
    while True:
        live = intact_previous(registry) if is_live else state.live
        with translated(home), closing(connect(home)) as connection, transaction(connection):
            now = status.read_state(connection, namespace, state.generation)
            if is_live and status.previous(connection, namespace) != live:
                continue  # it went into quarantine in between, and another one is before it
            new = now._replace(live=live, canary=None, weight=0.0)
            changed = status.change(connection, new, "rollback" if is_live else "canary", what)
            status.quarantine(connection, finding.revision, time.time(), what)
            return changed


def _share(rate: Rate) -> str:
    return _point(rate.likes / rate.votes) if rate.votes else "-"


def _point(share: float) -> str:
    return f"{share:.2f}".removeprefix("0")
