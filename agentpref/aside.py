"""What earlier updates set aside, and what brings it back.

The new examples of a refused update are set aside, and of one that passed those that it shows no
gain in: they neither train nor block the updates after it. They come back

- if somebody asks for them (``agentpref update --again``),
- if the settings (but seed and limits) or the base model are others than they were refused with,
- one by one, if a newer judgement of the same prompt says the same,
- all of a tag, if live has since learned newer judgements in that tag and agrees with them, or if
  people changed their minds and they say so too (``changes.py``); not where most of the chosen
  answers of that tag were such as nobody can have meant.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentpref.learn.data import Available
from agentpref.prefer.strata import Listed
from agentpref.printable import in_namespace
from agentpref.record import asides
from agentpref.record.asides import Refusal
from agentpref.serve.decisions import digests_of
from agentpref.types import Example, UpdateReport

MOST_TAGS, MOST_TOLD = 5, 3
"""How many tags of a group, and how many groups, are told in words."""


def still_aside(
    connection: sqlite3.Connection,
    report: UpdateReport,
    find: Callable[[Collection[str]], Sequence[Example]],
    digests: Callable[[], tuple[str, str]],
    *,
    again: bool,
) -> list[Refusal]:
    """What is set aside before any work, without what comes back already.

    Args:
        connection: to the home.
        report: what is known of the update before any work: namespace, settings.
        find: reads the examples of some ids, as far as there are any now.
        digests: identify the base model; to compute them reads all of its weights.
        again: whether everything was asked for.
    """
    if again:
        return []
    refused = asides.set_aside(connection, report.namespace)
    refused = [one for one in refused if _agree(one.report.get("config", {}), report.config)]
    if refused:
        base = digests()
        refused = [one for one in refused if digests_of(one.report.get("base") or {}) == base]
    return [
        one._replace(examples=one.examples - _confirmed(connection, one, find)) for one in refused
    ]


def _agree(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two settings are the same where both are known: a later version has new ones.

    What makes no other candidate does not count: a limit of time, a canary's share, or the seed,
    which a job may draw anew every night.
    """
    for name in (then.keys() & now.keys()) - {"seed", "max_minutes", "canary"}:
        old, new = then[name], now[name]
        both = isinstance(old, Mapping) and isinstance(new, Mapping)
        if not (_agree(old, new) if both else old == new):
            return False
    return True


def _confirmed(
    connection: sqlite3.Connection,
    refusal: Refusal,
    find: Callable[[Collection[str]], Sequence[Example]],
) -> set[str]:
    """Ids of the examples that a newer judgement agrees with; their ids are the same then."""
    judged = asides.judged_since(connection, refusal.examples, refusal.finished_at)
    if not judged:
        return set()
    known = asides.sources(connection, judged)
    return {
        one.example_id
        for one in find(judged)
        if not known.get(one.example_id, set()).issuperset(one.provenance)
    }


def with_aside(
    report: UpdateReport,
    refusals: Sequence[Refusal],
    available: Available,
    groups: Mapping[str, Sequence[Listed]] | None = None,
) -> UpdateReport:
    """The report with all that is set aside after an update, by which one, and what brings it back.

    Args:
        report: of the update.
        refusals: what was set aside before it.
        available: the examples as its last attempt sorted them.
        groups: those of :func:`agentpref.accounting.account`; none if nothing was trained.
    """
    now = {one.example_id: one for one in available.aside}
    found = []
    for one in refusals:
        theirs = [now[name] for name in sorted(one.examples) if name in now]
        told = [e["why"] for e in one.report["set_aside"] if e["update_id"] == one.update_id]
        found.append(_entry(one.update_id, theirs, "; ".join(told), one.report))
    own = report.to_mapping()
    of_this = list((groups or {}).get("set_aside", ()))
    if of_this:
        without = report.attempts[-1]["without"] if report.attempts else []
        why = f"the last attempt was without {'; '.join(without)}"
        found.append(_entry(report.update_id, of_this, why, own))
    no_gain = list((groups or {}).get("idle", ()))
    if no_gain:
        why = f"trained with the rest, {'; '.join(report.attempts[-1]['no_gain'])}"
        found.append(_entry(report.update_id, no_gain, why, own))
    if groups is not None and report.verdict == "refused":
        theirs = [*groups["trained"], *groups["new_evaluated"]]
        why = f"failed: {', '.join(_failed(own))}"
        found.append(_entry(report.update_id, theirs, why, own))
    found = [one for one in found if one["examples"]]
    notes = [_sentence(one, report.update_id) for one in reversed(found)]
    if len(notes) > MOST_TOLD:
        more = sum(one["examples"] for one in found[:-MOST_TOLD])
        notes = [*notes[:MOST_TOLD], f"{more} more examples are set aside since older updates"]
    return replace(report, set_aside=found, notes=[*report.notes, *notes])


def _entry(
    update_id: str, examples: Sequence[Listed], why: str, report: Mapping[str, Any]
) -> dict[str, Any]:
    """One group of examples that an update set aside, with its report."""
    tags = Counter(example.tag for example in examples)
    in_tag = "" if all(asides.is_odd(report, tag) for tag in tags) else "or in the same tag "
    again = in_namespace("agentpref update --again", report["namespace"])
    return {
        "update_id": update_id,
        "examples": len(examples),
        "held_out": sum(example.held_out for example in examples),
        "tags": dict(tags.most_common(MOST_TAGS)),
        "why": why,
        "back": f"newer judgements that agree on the same prompts {in_tag}bring them back, and so "
        f"do other settings or another model, or `{again}`",
    }


def _sentence(entry: Mapping[str, Any], this: str) -> str:
    count, tags = entry["examples"], ", ".join(entry["tags"])
    since = "now" if entry["update_id"] == this else f"since update {entry['update_id']}"
    were = "examples are" if count > 1 else "example is"
    return f"{count} {were} set aside {since} ({tags}; {entry['why']}); {entry['back']}"


def _failed(report: Mapping[str, Any]) -> list[str]:
    return [one["name"] for one in report.get("checks", ()) if not one["passed"]]
