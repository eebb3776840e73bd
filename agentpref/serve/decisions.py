"""Decisions of people that every update respects: what they took back, and holds.

A revision is taken back while it is in quarantine, and once somebody rolled back from it or
promoted the base or an older revision over it. Nothing like it is then made live by an update:
neither the same weights under another number, nor what the same settings train from the same parent
and base on nothing else. It takes a person's word: ``promote`` of it, or of another revision with
its weights, lifts it.

A rollback takes back the canary of then, too, and an update trains nothing until there is something
new. To promote the base or an older revision is also a new start: an update learns again from
there. To leave a tainted revision is no judgement of its weights, and takes nothing back.

While a namespace is held, nothing of it is promoted, and no canary begins. What agentpref may do by
itself when people's thumbs prove something is a decision of people too, and the history keeps it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import orjson

from agentpref.config import WatchSettings
from agentpref.errors import RevisionError
from agentpref.learn.checkpoint import training_part
from agentpref.printable import in_namespace
from agentpref.record.updates import Updates
from agentpref.serve import status
from agentpref.serve.backend import Revision
from agentpref.serve.folders import WEIGHTS_FILE, contents
from agentpref.serve.status import ServingState


class TakenBack(NamedTuple):
    """A revision that people took back, and why.

    ``fit`` says whether it may still serve. ``settled`` says that people promoted the base or an
    older revision since: what it learned may then be learned again, from there.
    """

    revision: str
    why: str
    fit: bool
    settled: bool
    parent: str | None
    manifest: Mapping[str, Any]

    @property
    def weights(self) -> str | None:
        """The digest of its weights."""
        return _weights(self.manifest)

    def has_settings(self, config: Mapping[str, Any]) -> bool:
        """Whether it was trained with these settings; gate and limit of time do not count."""
        settings = self.manifest.get("training", {}).get("config")
        return settings is not None and training_part(settings) == training_part(config)


def taken_back(connection: sqlite3.Connection, namespace: str) -> list[TakenBack]:
    """Name the revisions of a namespace that people took back, the oldest first."""
    query = (
        "SELECT revision_id, parent, manifest, tainted_at, quarantined_at, quarantine_reason,"
        " pruned_at FROM revision WHERE namespace = ? ORDER BY seq"
    )
    rows = {row[0]: row[1:] for row in connection.execute(query, (namespace,))}
    history = status.read_history(connection, namespace)
    if not history and not any(row[3] for row in rows.values()):
        return []
    manifests = {name: orjson.loads(row[1]) for name, row in rows.items()}
    weights = {name: _weights(manifest) for name, manifest in manifests.items()}
    back: dict[str, str] = {}
    settled: set[str] = set()
    promoted_at: dict[str | None, float] = {}
    live: str | None = None
    canary: str | None = None
    were_live: set[str | None] = {None}
    for entry in history:
        is_rollback = entry.action == "rollback"
        returns = entry.action == "promote" and entry.live in were_live  # no update does that
        if is_rollback or returns:
            why = "was rolled back" if is_rollback else "was replaced by an older one"
            for name in (live, canary) if is_rollback else (live,):
                if name is not None and name in rows and not _is_before(rows[name][2], entry.at):
                    back.setdefault(name, why)
                    settled.discard(name)
        if returns:
            settled |= back.keys()
        if (is_rollback or entry.action == "promote") and entry.live is not None:
            own = weights.get(entry.live)
            promoted_at[own] = entry.at
            back = {name: why for name, why in back.items() if weights[name] != own}
        live, canary = entry.live, entry.canary
        were_live.add(live)
    found = []
    for name, (parent, _, tainted_at, quarantined_at, reason, pruned_at) in rows.items():
        is_settled = name in settled
        if quarantined_at is not None and quarantined_at > promoted_at.get(weights[name], 0.0):
            back[name], is_settled = f"is in quarantine ({reason})", False
        if name in back:
            fit = tainted_at is None and quarantined_at is None and pruned_at is None
            found.append(TakenBack(name, back[name], fit, is_settled, parent, manifests[name]))
    return found


def taken_back_before(
    connection: sqlite3.Connection, candidate: Revision, trained: Collection[str]
) -> str | None:
    """Say which revision that people took back a candidate repeats; ``None`` if it is none.

    ``trained`` are the ids of the new examples that it was trained on; of an adapter that was
    trained elsewhere there are none, and nothing but its weights repeats another.
    """
    manifest = candidate.manifest
    settings = manifest.get("training", {}).get("config") or {}
    for found in reversed(taken_back(connection, candidate.namespace)):
        if found.revision == candidate.revision_id:
            continue
        if found.weights == _weights(manifest):
            return f"it has the weights of {found.revision}, which {found.why}"
        is_from_the_same = (
            found.parent == candidate.parent
            and found.has_settings(settings)
            and digests_of(found.manifest.get("base", {})) == digests_of(manifest["base"])
        )
        if is_from_the_same and trained:
            query = (
                "SELECT pair_id FROM updates JOIN update_pair USING (update_id)"
                " WHERE candidate = ? AND role IN ('new', 'trained_aside')"
            )
            before = {pair for (pair,) in connection.execute(query, (found.revision,))}
            if before.issuperset(trained):
                return (
                    f"it learned nothing that {found.revision} had not learned from the same "
                    f"parent with the same settings, and {found.revision} {found.why}"
                )
    return None


def explain_taken_back(
    connection: sqlite3.Connection,
    namespace: str,
    fresh: Collection[str],
    config: Mapping[str, Any],
    digests: Callable[[], tuple[str, str]],
) -> str | None:
    """Say that all of ``fresh`` was learned by revisions that people took back, with the cure.

    ``None`` if something of it was not, or not with these settings and this base, whose ``digests``
    are asked for last: to compute them reads its weights.
    """
    updates = Updates(connection)
    taken = [
        one
        for one in taken_back(connection, namespace)
        if not one.settled and one.has_settings(config)
    ]
    tried = {one.revision: updates.tried_by(one.revision) for one in taken}
    if not fresh or not set().union(*tried.values()).issuperset(fresh):
        return None
    base = digests()
    taken = [one for one in taken if digests_of(one.manifest.get("base", {})) == base]
    if not set().union(*(tried[one.revision] for one in taken)).issuperset(fresh):
        return None
    some = [one for one in reversed(taken) if not tried[one.revision].isdisjoint(fresh)]
    found = next((one for one in some if one.fit), some[0])
    cures = [f"`{in_namespace('agentpref update --again', namespace)}` trains on them again"]
    if found.fit:
        command = in_namespace(f"agentpref adapters promote {found.revision}", namespace)
        cures.append(f"`{command}` makes it live again")
    elif found.why.startswith("is in quarantine"):
        command = in_namespace(f"agentpref adapters release {found.revision}", namespace)
        cures.append(f"`{command}` ends the quarantine")
    count = f"{len(fresh)} examples were" if len(fresh) > 1 else "1 example was"
    return f"{count} learned by {found.revision}, which {found.why}; {', '.join(cures)}"


def digests_of(base: Mapping[str, Any]) -> tuple[Any, Any]:
    """What identifies a base model, of how a report or a manifest names it."""
    return base.get("digest"), base.get("template_digest")


def _weights(manifest: Mapping[str, Any]) -> str | None:
    """What tells revisions apart: the digest of the weights, and of instructions beside them."""
    if "files" not in manifest:
        return None
    found = contents(manifest)
    digests = [found[name] for name in (WEIGHTS_FILE, "instructions") if name in found]
    return "+".join(digests) or None


def _is_before(tainted_at: float | None, at: float) -> bool:
    return tainted_at is not None and tainted_at <= at


# Holds


class Hold(NamedTuple):
    """Since when a namespace is held, in seconds since 1970, and why (``""``: nobody said)."""

    at: float
    reason: str


def read_hold(connection: sqlite3.Connection, namespace: str) -> Hold | None:
    """Read the hold of a namespace, or return ``None``."""
    query = (
        "SELECT at, coalesce(reason, ''), action FROM serving_history"
        " LEFT JOIN hold_reason USING (namespace, generation)"
        " WHERE namespace = ? AND action IN ('hold', 'lift') ORDER BY id DESC LIMIT 1"
    )
    row = connection.execute(query, (namespace,)).fetchone()
    return Hold(row[0], row[1]) if row is not None and row[2] == "hold" else None


def hold(connection: sqlite3.Connection, state: ServingState, reason: str) -> ServingState:
    """Hold a namespace from now on; one that is held already keeps its time and reason."""
    if read_hold(connection, state.namespace) is not None:
        return state
    return status.change(connection, state, "hold", reason)


def lift(connection: sqlite3.Connection, state: ServingState) -> ServingState:
    """End the hold of a namespace, if there is one."""
    if read_hold(connection, state.namespace) is None:
        return state
    return status.change(connection, state, "lift")


def require_not_held(connection: sqlite3.Connection, namespace: str) -> None:
    """Refuse to change what serves while a namespace is held.

    Raises:
        RevisionError: the message says why, and names the cure.
    """
    found = read_hold(connection, namespace)
    if found is not None:
        raise RevisionError(f"{explain_hold(found, namespace)}; a rollback works")


def explain_hold(found: Hold, namespace: str) -> str:
    """Say that a namespace is held, why, and how to end that."""
    reason = f" ({found.reason})" if found.reason else ""
    command = in_namespace("agentpref adapters hold --end", namespace)
    return f"{namespace!r} is held{reason}: nothing is promoted until `{command}`"


# What thumbs may do by themselves


def read_watch(connection: sqlite3.Connection, namespace: str) -> WatchSettings:
    """Read what may be done when thumbs prove something; the defaults, if nobody decided."""
    query = (
        "SELECT reason FROM serving_history JOIN hold_reason USING (namespace, generation)"
        " WHERE namespace = ? AND action = 'watch' ORDER BY id DESC LIMIT 1"
    )
    row = connection.execute(query, (namespace,)).fetchone()
    return WatchSettings() if row is None else WatchSettings(**orjson.loads(row[0]))


def set_watch(
    connection: sqlite3.Connection, state: ServingState, settings: WatchSettings
) -> ServingState:
    """Decide what may be done from now on."""
    if settings == read_watch(connection, state.namespace):
        return state
    return status.change(connection, state, "watch", orjson.dumps(asdict(settings)).decode())
