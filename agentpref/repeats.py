"""Whether an update has nothing to train, and why.

It would only repeat what was tried before, or bring back what people took back: then nothing is
new, though there are examples that the live revision has not learned, and the report names the
command that trains on them all the same. Or people said something new that cannot be trained.
"""

from __future__ import annotations

import sqlite3
from dataclasses import replace

from agentpref.learn.data import Available
from agentpref.models.reasons import LEFT_OUT
from agentpref.prefer.votes import Reason
from agentpref.printable import in_namespace
from agentpref.record import journal
from agentpref.record.updates import Attempt, Updates, used
from agentpref.serve.decisions import digests_of, explain_taken_back
from agentpref.types import UpdateReport

_FURTHER = 1.05
"""By how much more examples an update must get further to be repeated."""


_SPOILED: frozenset[Reason | str] = frozenset(
    {
        "contradicted", "identical_answers", "different_prompts", "judge_flipped", "unknown_scale",
        "unknown_run", "incomplete_answer", "incomplete_prompt",
    }
)  # fmt: skip
"""Reasons why somebody's preference makes no example. Others are no loss: a tie, words without a
score, what was said before, was taken back, or gave way to what others said."""


def without_examples(
    connection: sqlite3.Connection, report: UpdateReport, available: Available
) -> UpdateReport:
    """The report of an update that trains nothing, with what came in and makes no example to train.

    It is ``nothing_usable`` where preferences came in that cannot be trained: more than the update
    before counted. Held-out examples alone wait.

    Args:
        connection: to the home.
        report: what is known before any work: namespace, counts, what was left out.
        available: all examples there are.
    """
    last = journal.last_counted(connection, report.namespace)
    before = {} if last is None else last.report.get("left_out", {})
    spoiled = {reason: n for reason, n in report.left_out.items() if reason in _SPOILED}
    if any(n > before.get(reason, 0) for reason, n in spoiled.items()):
        report = replace(report, verdict="nothing_usable")
    if not available.new and available.new_held_out:
        count = _examples(len(available.new_held_out), "wait")
        note = f"held out, to prove what later ones train: {count}"
        return replace(report, notes=[*report.notes, note])
    return report


def stalled(
    connection: sqlite3.Connection, report: UpdateReport, available: Available, *, again: bool
) -> UpdateReport | None:
    """The report of an update that has nothing new to learn; ``None`` if there is something.

    Args:
        connection: to the home.
        report: what is known before any work: namespace, parent, model, settings.
        available: all examples there are.
        again: whether a repetition was asked for.
    """
    if again and not available.new:
        note = "--again finds nothing to repeat: the live revision has learned all there is"
        return replace(report, notes=[*report.notes, note])
    if again or not available.fresh:
        return None
    taken = explain_taken_back(
        connection, report.namespace, available.fresh, report.config, lambda: digests(report)
    )
    if taken is not None:
        return replace(report, notes=[*report.notes, taken])
    last = Updates(connection).last_attempt(report.namespace, report.parent)
    if last is not None and report.config["arm"] == "prompt" and _tried_rules(last, report):
        cure = in_namespace("agentpref update --arm prompt --again", report.namespace)
        note = f"update {last.update_id} tried the same rules on as many examples; `{cure}` repeats"
        return replace(report, notes=[*report.notes, f"{note} it"])
    if last is not None and _is_same(last, report, available):
        return _with_attempt(report, last)
    return None


def _tried_rules(last: Attempt, report: UpdateReport) -> bool:
    """Whether an update put rules to the gate with the same settings and as many new examples."""
    before, now = last.report.get("counts", {}), report.counts
    return (
        last.report.get("config") == report.config
        and all(before.get(name) == now.get(name) for name in ("new", "new_held_out"))
        and digests_of(last.report.get("base") or {}) == digests(report)
    )


def _is_same(last: Attempt, report: UpdateReport, available: Available) -> bool:
    """Whether an update tried just what is new, in the same way, as far as it gets.

    An adoption tried another adapter on it, and trained nothing.
    """
    return (
        "adopted" not in last.report.get("training", {})
        and available.fresh == last.pairs | last.waiting
        and last.report.get("config") == report.config
        and _has_stalled(last)
        and digests_of(last.report.get("base") or {}) == digests(report)
    )


def digests(report: UpdateReport) -> tuple[str, str]:
    """What identifies the base model of an update. All of its weights are read for it."""
    from agentpref.models.base import base_digests, find_base

    return base_digests(find_base(report.model), report.config["chat_template_kwargs"])


def _has_stalled(last: Attempt) -> bool:
    """Whether to repeat an update on the same examples would get no further.

    One that had time for all of them would do the same again. One that had not finds its scores
    stored the next time, and so may use more of them; that comes to an end.
    """
    if last.report["verdict"] == "nothing_usable" or not last.waiting:
        return True
    resumed = last.report.get("training", {}).get("resumed_at")
    if last.serves or last.before is None or resumed:
        return False
    same = last.before.get("config") == last.report.get("config")
    return same and last.used <= _FURTHER * used(last.before)


def _with_attempt(report: UpdateReport, tried: Attempt) -> UpdateReport:
    """The report that says which update tried all of this before."""
    left_out = {k: n for k, n in tried.report.get("left_out", {}).items() if k in LEFT_OUT}
    why = "had no time, and would have none again: raise max_minutes"
    if tried.report["verdict"] == "nothing_usable":
        why = "are held out, and prove nothing until something can be trained"
    again = in_namespace("agentpref update --again", report.namespace)
    which = f"update {tried.update_id} ({tried.report['verdict'].replace('_', ' ')})"
    cure = f"change one of these to try them again, or repeat it with `{again}`"
    notes = []
    if tried.pairs - tried.left_out:
        notes.append(
            f"{_examples(len(tried.pairs - tried.left_out), 'remain')} from {which}, which tried "
            f"them with the same settings, model and chat template; {cure}"
        )
    if tried.left_out:
        notes.append(
            f"{_examples(len(tried.left_out), 'remain')} that {which} could not use "
            f"({', '.join(name.replace('_', ' ') for name in left_out)}); the settings, the model "
            f"and the chat template are still the same; {cure}"
        )
    if tried.waiting:
        notes.append(f"{len(tried.waiting)} more {why}")
    if tried.report["verdict"] == "cut_short":
        notes.append("its training was cut short: raise max_minutes")
    if tried.report["verdict"] == "passed":
        name = tried.report["revision"]
        promote = in_namespace(f"agentpref adapters promote {name}", report.namespace)
        notes.append(f"{name} passed then and is not live; `{promote}` makes it live")
    return replace(report, left_out={**report.left_out, **left_out}, notes=[*report.notes, *notes])


def _examples(count: int, verb: str) -> str:
    return f"1 example {verb}s" if count == 1 else f"{count} examples {verb}"
