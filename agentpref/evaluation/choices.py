"""Which revisions and which examples an evaluation is asked for, by the names that people give."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeAlias

from agentpref.errors import ConfigError, EvaluationError, UnknownRevision
from agentpref.prefer.exchange import file_examples
from agentpref.prefer.strata import ANY, stratify
from agentpref.prefer.walk import walk_pairs
from agentpref.printable import in_namespace
from agentpref.reading import last_held_out
from agentpref.record.pages import Selection
from agentpref.serve.backend import Revision
from agentpref.serve.registry import Registry
from agentpref.types import BASE, Example

Where: TypeAlias = "str | os.PathLike[str] | IO[bytes]"
"""A tag, a stratum, or a file."""

LIVE, CANARY = "live", "canary"
_NAMED = 8  # so many tags or revisions are listed in a message


@dataclass
class Found:
    """The examples that were asked for, and in words which they are."""

    examples: list[Example]
    on: str
    from_file: bool
    notes: list[str] = field(default_factory=list)


def named_revisions(
    registry: Registry, names: Sequence[str], *, base_alone: bool = False
) -> list[Revision | None]:
    """The revisions of some names, each once; ``None`` is the base, which may be ``base_alone``."""
    if isinstance(names, str):
        raise ConfigError(f"revisions is the text {names!r}; pass a list of names")
    state, published = registry.state(), registry.list()
    serving = {LIVE: state.live, CANARY: state.canary}
    wanted = [*names] or [BASE, *(name for name, rev in serving.items() if rev is not None)]
    found: dict[str | None, Revision | None] = {}
    for name in wanted:
        if name == CANARY and state.canary is None:
            raise UnknownRevision(
                f"{registry.namespace!r} has no canary; {_listing(registry, published)}"
            )
        name = serving[name] or BASE if name in serving else name
        revision = None if name == BASE else _find(registry, published, name)
        found[None if revision is None else revision.revision_id] = revision
    if [*found] == [None] and not base_alone:
        raise EvaluationError(
            "the base model is right about half by definition, because accuracy is measured "
            f"against it; name a revision to compare with it: {_listing(registry, published)}"
        )
    for revision in found.values():
        if revision is not None:
            registry.require_fit(revision, untainted=False, released=False)
    return [*found.values()]


def _find(registry: Registry, published: Sequence[Revision], name: str) -> Revision:
    """The revision of an id, of its beginning, or of its number."""
    number = f"rev-{int(name):06d}-" if name.isascii() and name.isdigit() else name
    found = [r for r in published if name == r.revision_id]
    found = found or [r for r in published if name and r.revision_id.startswith(number)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UnknownRevision(
            f"{registry.namespace!r} has no revision {name!r}; {_listing(registry, published)}"
        )
    some = ", ".join(revision.revision_id for revision in found[:3])
    raise UnknownRevision(
        f"{len(found)} revisions begin with {name!r}: {some}; give more of the id"
    )


def _listing(registry: Registry, published: Sequence[Revision]) -> str:
    if not published:
        return "none is published yet; run `agentpref update` first"
    names = ", ".join(revision.revision_id for revision in published[-_NAMED:])
    command = in_namespace("agentpref adapters list", registry.namespace)
    more = " the newest are" if len(published) > _NAMED else ""
    return f"`{command}` shows them:{more} {names}"


def find_examples(
    database: sqlite3.Connection, which: Selection, on: Where | None, format: str | None
) -> Found:
    """Read the examples of a tag, a stratum or a file."""
    if on is not None and not isinstance(on, str):
        return _of_file(on, which, format)
    everything = Selection(which.namespace, which.since)
    share = last_held_out(database, which.namespace)
    held_out = [e for e in walk_pairs(database, everything, share, lone=True) if e.held_out]
    if on is None:
        return Found(held_out, "all held-out examples", from_file=False)
    wanted = [
        example
        for example, stratum in zip(held_out, stratify(held_out), strict=True)
        if on in _names_of(stratum)
    ]
    is_path = os.sep in on or Path(on).is_file()
    if not wanted and is_path:
        return _of_file(on, which, format)
    if not wanted:
        tags = Counter(example.tag for example in held_out).most_common(_NAMED)
        there = ", ".join(f"{tag!r} ({count})" for tag, count in tags) or "none at all"
        raise EvaluationError(
            f"no held-out example has the tag or the stratum {on!r}"
            f"{' in that time' if which.since is not None else ''}, and no file here has that "
            f"name; held-out examples by tag: {there}"
        )
    notes = []
    if Path(on).is_file():
        notes.append(f"{on!r} is a tag here, and a file, too: name the file ./{on}")
    return Found(wanted, f"held-out examples of {on!r}", from_file=False, notes=notes)


def _names_of(stratum: Sequence[str]) -> Iterator[str]:
    """All names of the strata that an example of this one is in, as reports write them."""
    namespace, tag, origin, age = stratum
    yield from (tag, f"{tag}/{origin}", f"{tag}/{origin}/{age}")
    for pooled in ((ANY, ANY), (origin, ANY), (origin, age)):
        yield "/".join((namespace, tag, *pooled))


def _of_file(file: Where, which: Selection, format: str | None) -> Found:
    if which.since is not None:
        raise ConfigError(
            "since chooses examples of the home by the time of their judgement, which a file's "
            "rows do not have; leave it out"
        )
    found = file_examples(file, namespace=which.namespace, format=format)
    name = os.fspath(file) if isinstance(file, str | os.PathLike) else "that was given"
    unused = [f"{count} {reason.replace('_', ' ')}" for reason, count in found.left_out.items()]
    notes = [f"rows that make no example: {', '.join(unused)}"] if unused else []
    return Found([*found.examples], f"the file {name}", from_file=True, notes=notes)


def nothing(found: Found, left_out: Mapping[str, int]) -> str:
    """Why there is nothing to score, and what to do."""
    if left_out.get("trained"):
        return (
            f"all {left_out['trained']} examples of {found.on} have prompts that trained a "
            "revision that is scored; --with-trained (with_trained=True) scores them nevertheless"
        )
    if found.from_file:
        return f"{found.on} makes no example; {'; '.join(found.notes) or 'check its rows'}"
    return (
        f"there is nothing to score among {found.on}; log or import comparisons: one prompt in "
        "five is held out, or name a file of preferences"
    )
