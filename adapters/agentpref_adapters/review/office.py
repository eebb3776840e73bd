"""The owner's pages: runs, updates, revisions, and what the people who compare answers did.

Who only compares has no way here. What serves is changed by a form that says what it will do, and
by a second one that does it, unless something else changed it in between.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

from markupsafe import Markup

from agentpref.elicitation.people import annotators
from agentpref.errors import ConfigError, RevisionError
from agentpref.home import Home
from agentpref.overview import standing
from agentpref.prefer.lineage import lineage
from agentpref.record import journal
from agentpref.record.database import connect, translated
from agentpref.record.finding import Wanted, find_prefix
from agentpref.record.judges import Judges
from agentpref.record.store import Store
from agentpref.serve.registry import Registry
from agentpref.types import BASE, HELD_OUT, Run
from agentpref_adapters.review.shown import plain_of, turn_of

AT_ONCE = 50
"""So many runs or updates are listed on a page."""

_CUT = 160

ACTIONS = {
    "promote": "make {revision} live",
    "rollback": "roll back: {revision} serves again",
    "canary": "let {revision} serve {share} % of the threads",
    "end": "end the canary {revision}",
}


class Office:
    """What the owner's pages show and do.

    Args:
        home: whose runs, updates and revisions.
        namespace: of the home.
        people: the annotators' names, to be shown instead of what the home keeps of them.
        report: makes the page of an update, by its id.
    """

    def __init__(
        self,
        home: Home,
        namespace: str,
        people: Sequence[str],
        report: Callable[[str], str],
    ) -> None:
        self._home, self._namespace, self._people = home, namespace, people
        self.report = report
        self._registry = Registry(home, namespace=namespace)

    def runs(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """The newest runs that a search finds: by ``tag``, ``thread`` and ``text``."""
        given = {name: asked.get(name, "").strip() for name in ("tag", "thread", "text")}
        wanted = Wanted(
            self._namespace,
            thread_id=given["thread"] or None,
            tag=given["tag"] or None,
            text=given["text"] or None,
        )
        with self._reading() as connection:
            found = [*Store(connection).newest_runs(wanted, AT_ONCE + 1)]
        rows = [_line(run) for run in found[:AT_ONCE]]
        return {"runs": rows, "more": len(found) > AT_ONCE, "asked": given}

    def run(self, run_id: str) -> dict[str, Any]:
        """One run: its conversation, what was said of it, and the others of its thread."""
        with self._reading() as connection:
            name = find_prefix(connection, run_id)
            found = lineage(connection, name, held_out=HELD_OUT)
            thread = found.run.thread_id
            wanted = Wanted(self._namespace, thread_id=thread)
            others = Store(connection).newest_runs(wanted, AT_ONCE) if thread else ()
            beside = [_line(run) for run in others if run.run_id != name]
        turns = map(turn_of, (*found.run.prompt.messages, found.run.output))
        said = [
            {"at": row.created_at, "what": row.key, "said": _said(row), "who": row.user_id,
             "words": row.comment}
            for row in found.feedback
        ]  # fmt: skip
        said += [
            {"at": row.created_at, "what": "comparison", "who": row.user_id, "words": row.comment,
             "said": _compared(row.winner, is_a=row.run_a == name)}
            for row in found.comparisons
        ]  # fmt: skip
        return {
            "run": _line(found.run) | {"revision": found.run.revision or BASE},
            "turns": [(role, Markup(html)) for role, html in turns],
            "said": sorted(said, key=lambda one: float(one["at"] or 0)),
            "thread": beside,
        }

    def updates(self) -> dict[str, Any]:
        """The newest updates, with what they came to."""
        with self._reading() as connection:
            found = journal.listed(connection, self._namespace, limit=AT_ONCE)
        return {
            "updates": [
                {"id": one.update_id, "at": one.created_at, "verdict": _words(one.verdict),
                 "revision": one.revision, "gain": _gain(one.report), "times": one.times}
                for one in found
            ]
        }  # fmt: skip

    def revisions(self) -> dict[str, Any]:
        """The revisions, what serves, and what may be done."""
        state, held = self._registry.state(), self._registry.held()
        serves = {state.canary: "canary", state.live: "live"}
        return {
            "revisions": [
                {"id": one.revision_id, "at": one.created_at, "parent": one.parent or BASE,
                 "serves": serves.get(one.revision_id), "standing": standing(one),
                 "instructions": one.instructions}
                for one in reversed(self._registry.list())
            ],
            "live": state.live or BASE,
            "canary": state.canary,
            "can_roll_back": self._can_roll_back(),
            "generation": state.generation,
            "held": None if held is None else held.reason or "nobody said why",
        }  # fmt: skip

    def _can_roll_back(self) -> bool:
        try:
            self._registry.previous()
        except RevisionError:
            return False
        return True

    def ask(self, form: Mapping[str, str]) -> dict[str, Any]:
        """What a click on the page of revisions would do, to be confirmed.

        Raises:
            AgentprefError: there is no such revision, or nothing to roll back.
            ConfigError: the action is none, or the share is no number.
        """
        action, revision = form.get("action", ""), form.get("revision", "")
        share = _share(form) if action == "canary" else 0.0
        if action == "rollback":
            revision = self._registry.previous() or BASE
        elif action == "end":
            revision = self._registry.state().canary or ""
            if not revision:
                raise ConfigError("there is no canary to end")
        elif action not in ACTIONS:
            raise ConfigError(f"action is {action[:40]!r}, but must be {', '.join(ACTIONS)}")
        elif revision != BASE or action == "canary":
            revision = self._registry.get(revision).revision_id
        words = ACTIONS[action].format(revision=revision, share=f"{100 * share:.4g}")
        return {
            "words": words, "action": action, "revision": revision,
            "share": f"{100 * share:.4g}", "generation": self._registry.state().generation,
        }  # fmt: skip

    def act(self, form: Mapping[str, str]) -> None:
        """Do what was confirmed, unless what serves has changed since.

        Raises:
            GenerationConflict: it has.
            AgentprefError: the revision must not serve, or the namespace is held.
        """
        wanted = self.ask(form)
        try:
            expected = int(form.get("generation", ""))
        except ValueError as error:
            raise ConfigError("the form names no generation; open the page again") from error
        registry, action = self._registry, wanted["action"]
        if action == "promote":
            registry.promote(wanted["revision"], expected_generation=expected, reason="review page")
        elif action == "rollback":
            registry.rollback(expected_generation=expected)
        elif action == "canary":
            registry.canary(wanted["revision"], _share(form), expected_generation=expected)
        else:
            registry.canary(None, 0.0, expected_generation=expected)

    def people(self) -> dict[str, Any]:
        """What each annotator did."""
        with self._reading() as connection:
            found = annotators(connection, self._namespace)
            names = {Judges(connection).voter_of(name): name for name in self._people}
        return {
            "people": [
                one._asdict() | {"name": names.get(one.voter or "", one.voter or "nobody named")}
                for one in found
            ]
        }

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with translated(self._home), closing(connect(self._home, readonly=True)) as connection:
            yield connection


def _line(run: Run) -> dict[str, Any]:
    return {
        "id": run.run_id, "at": run.created_at, "tag": run.tag, "thread": run.thread_id,
        "prompt": _short(plain_of(run.prompt.messages[-1])), "answer": _short(plain_of(run.output)),
    }  # fmt: skip


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _CUT else f"{text[:_CUT]}…"


def _said(row: Any) -> str:
    if row.correction is not None:
        return f"should be: {_short(plain_of(row.correction))}"
    return "" if row.score is None else f"{row.score:g}"


def _compared(winner: str, *, is_a: bool) -> str:
    if winner == "tie":
        return "as good as another answer"
    return "better than another answer" if (winner == "a") is is_a else "worse than another answer"


def _share(form: Mapping[str, str]) -> float:
    try:
        share = float(form.get("share", "")) / 100
    except ValueError as error:
        raise ConfigError(
            f"share is {form.get('share', '')[:40]!r}, but must be a number"
        ) from error
    if not 0 < share <= 1:
        raise ConfigError(f"share is {100 * share:g} %, but must be above 0 and at most 100")
    return share


def _words(verdict: str) -> str:
    return verdict.replace("_", " ")


def _gain(report: Mapping[str, Any]) -> str:
    """Held-out accuracy before and after, over all tags."""
    rows = [one for one in (report.get("accuracy") or {}).values() if one.get("pairs")]
    total = sum(one["pairs"] for one in rows)
    if not total:
        return ""
    before, after = (
        sum(one["pairs"] * one[k] for one in rows) / total for k in ("before", "after")
    )
    return f"{before:.2f} → {after:.2f}"
