"""What is done to an entry between the host and the disk: checks, redaction, pseudonyms.

Runs on the thread that writes, so that the host's own call stays short; nothing that has not come
through here reaches the database or the spill. Whether the runs that feedback names exist, only the
store can tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import orjson

from agentpref.errors import InvalidMessage
from agentpref.record.judgement import as_output
from agentpref.record.messages import Node, answer, chain
from agentpref.record.pseudonyms import Pseudonyms
from agentpref.record.redaction import Redact, redacted
from agentpref.record.snapshot import PARTS, Snapshot
from agentpref.types import Comparison, Feedback, Prompt, Run

_NAMES = ("model", "revision", "thread_id", "trace_id", "user_id")
_TEXTS = ("messages", "output", "tools", "params", "metadata")


@dataclass(frozen=True, slots=True)
class LinkedRun:
    """A run with its messages as a chain that ends in its answer."""

    run: Run
    nodes: tuple[Node, ...]


Said: TypeAlias = "Snapshot | Feedback | Comparison"
Entry: TypeAlias = "LinkedRun | Feedback | Comparison"


@dataclass(frozen=True, slots=True)
class Intake:
    """Makes entries of what the host said in one namespace."""

    namespace: str
    pseudonyms: Pseudonyms
    redact: Redact | None = None

    def admit(self, said: Said) -> Entry:
        """Check, redact and pseudonymise.

        Raises:
            InvalidMessage: it is no run that can be stored; what is wrong is named.
            RedactionFailed: the host's ``redact`` raised, or gave no text.
        """
        if isinstance(said, Snapshot):
            return self._run(said)
        said = replace(said, user_id=self._pseudonym(said.user_id))
        return said if self.redact is None else _redacted(said, self.redact)

    def _run(self, snapshot: Snapshot) -> LinkedRun:
        parts = dict(zip(PARTS, orjson.loads(snapshot.body), strict=True))
        parts["output"] = as_output(parts["output"])
        parts |= {name: () for name in ("tools", "tags") if parts[name] is None}
        _check_details(parts)
        if self.redact is not None:
            parts = _redacted_parts(parts, self.redact)
        names = {name: None if parts[name] is None else str(parts[name]) for name in _NAMES}
        names["user_id"] = self._pseudonym(names["user_id"])
        return _linked(snapshot.run_id, self.namespace, snapshot.created_at, parts | names)

    def _pseudonym(self, user_id: str | None) -> str | None:
        return None if user_id is None else self.pseudonyms.name(user_id)


def link(run: Run) -> LinkedRun:
    """Make the chain of a run; the prompt's id is computed, never taken on trust.

    Raises:
        InvalidMessage: a message cannot be stored.
    """
    nodes, prompt = chain(run.prompt.messages, run.prompt.tools)
    if prompt != run.prompt.id:
        run = replace(run, prompt=replace(run.prompt, id=prompt))
    return LinkedRun(run, (*nodes, answer(prompt, run.output)))


def _linked(run_id: str, namespace: str, at: float, parts: Mapping[str, Any]) -> LinkedRun:
    messages, tools = parts["messages"], parts["tools"]
    nodes, prompt = chain(messages, tools)
    output = answer(prompt, parts["output"])
    run = Run(
        run_id,
        namespace,
        at,
        Prompt(prompt, tuple(messages), tuple(tools)),
        parts["output"],
        **{name: parts[name] for name in _NAMES},
        params=parts["params"] or {},
        token_ids=_tuple(parts["token_ids"]),
        logprobs=_tuple(parts["logprobs"]),
        tags=tuple(parts["tags"]),
        metadata=parts["metadata"] or {},
    )
    return LinkedRun(run, (*nodes, output))


def _redacted_parts(parts: Mapping[str, Any], redact: Redact) -> dict[str, Any]:
    """Redact the texts of a run; tokens spell the answer out, and go where it was changed."""
    clean = {name: redacted(parts[name], redact) for name in _TEXTS}
    tokens = {} if clean["output"] == parts["output"] else {"token_ids": None, "logprobs": None}
    return {**parts, **clean, **tokens}


def _redacted(said: Feedback | Comparison, redact: Redact) -> Feedback | Comparison:
    comment = redacted(said.comment, redact)
    if isinstance(said, Comparison):
        return replace(said, comment=comment)
    value, correction = redacted(said.value, redact), redacted(said.correction, redact)
    return replace(said, comment=comment, value=value, correction=correction)


def _check_details(parts: Mapping[str, Any]) -> None:
    for name in ("params", "metadata"):
        if parts[name] is not None and not isinstance(parts[name], dict):
            raise _wrong(name, parts[name], "a mapping")
    if not _are(parts["tags"], (str,)):
        raise _wrong("tags", parts["tags"], "a list of strings")
    if parts["token_ids"] is not None and not _are(parts["token_ids"], (int,)):
        raise _wrong("token_ids", parts["token_ids"], "a list of int (arrays have .tolist())")
    if parts["logprobs"] is not None and not _are(parts["logprobs"], (float, int, type(None))):
        raise _wrong("logprobs", parts["logprobs"], "a list of float (arrays have .tolist())")


def _are(values: object, kinds: Iterable[type]) -> bool:
    return isinstance(values, (list, tuple)) and {*map(type, values)} <= {*kinds}


def _wrong(name: str, value: object, wanted: str) -> InvalidMessage:
    return InvalidMessage(f"{name} is {repr(value)[:80]}; pass {wanted}")


def _tuple(values: list[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)
