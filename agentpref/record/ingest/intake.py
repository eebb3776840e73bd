"""What is done to an entry between the host and the disk: checks, redaction, pseudonyms.

Runs on the thread that writes, so that the host's own call stays short; nothing that has not come
through here reaches the database or the spill. Whether the runs that feedback names exist, only the
store can tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from agentpref.errors import InvalidMessage
from agentpref.record.ingest.judgement import as_output
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.ingest.redaction import Redact, redacted
from agentpref.record.ingest.snapshot import Parts, Snapshot
from agentpref.record.messages import Linker
from agentpref.record.rows import RunRow, as_json, as_json_or_null
from agentpref.types import Comparison, Feedback

_TEXTS = ("messages", "output", "tools", "params", "metadata")

Said: TypeAlias = "Snapshot | Feedback | Comparison"
Entry: TypeAlias = "RunRow | Feedback | Comparison"


@dataclass(frozen=True, slots=True)
class Intake:
    """Makes entries of what the host said in one namespace. Has one user at a time."""

    namespace: str
    pseudonyms: Pseudonyms
    redact: Redact | None = None
    _linker: Linker = field(default_factory=Linker, repr=False)

    def admit(self, said: Said) -> Entry:
        """Check, redact and pseudonymise.

        Raises:
            InvalidMessage: it is no run that can be stored; what is wrong is named.
            RedactionFailed: the host's ``redact`` raised, or gave no text.
        """
        if isinstance(said, Snapshot):
            return self._run(said)
        if said.user_id is not None:
            said = replace(said, user_id=self.pseudonyms.name(said.user_id))
        return said if self.redact is None else _redacted(said, self.redact)

    def _run(self, snapshot: Snapshot) -> RunRow:
        parts = snapshot.thaw()
        _check_details(parts)
        if self.redact is not None:
            parts = _redacted_parts(parts, self.redact)
        nodes = self._linker.conversation(parts.messages, parts.tools, as_output(parts.output))
        return RunRow(
            snapshot.run_id,
            self.namespace,
            snapshot.created_at,
            nodes[-2].id,
            nodes[-1].id,
            _name(parts.model),
            _name(parts.revision),
            _name(parts.thread_id),
            _name(parts.trace_id),
            self._pseudonym(_name(parts.user_id)),
            as_json(parts.params) if parts.params else "{}",
            as_json_or_null(parts.token_ids),
            as_json_or_null(parts.logprobs),
            as_json(parts.tags) if parts.tags else "[]",
            as_json(parts.metadata) if parts.metadata else "{}",
            nodes,
        )

    def _pseudonym(self, user_id: str | None) -> str | None:
        return None if user_id is None else self.pseudonyms.name(user_id)


def _name(given: Any) -> str | None:
    """Ids that the host gave as UUIDs or numbers become strings."""
    return given if given is None or isinstance(given, str) else str(given)


def _redacted_parts(parts: Parts, redact: Redact) -> Parts:
    """Redact the texts of a run; tokens spell the answer out, and go where it was changed."""
    clean = {name: redacted(getattr(parts, name), redact) for name in _TEXTS}
    if clean["output"] != parts.output:
        clean |= {"token_ids": None, "logprobs": None}
    return parts._replace(**clean)


def _redacted(said: Feedback | Comparison, redact: Redact) -> Feedback | Comparison:
    comment = redacted(said.comment, redact)
    if isinstance(said, Comparison):
        return replace(said, comment=comment)
    value, correction = redacted(said.value, redact), redacted(said.correction, redact)
    return replace(said, comment=comment, value=value, correction=correction)


_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "tags": ((str,), "a list of strings"),
    "token_ids": ((int,), "a list of int (arrays have .tolist())"),
    "logprobs": ((float, int, type(None)), "a list of float (arrays have .tolist())"),
}


def _check_details(parts: Parts) -> None:
    if not any((parts.params, parts.token_ids, parts.logprobs, parts.tags, parts.metadata)):
        return
    for name, wanted in (("params", "a mapping"), ("metadata", "a mapping")):
        given = getattr(parts, name)
        if given is not None and not isinstance(given, dict):
            raise _wrong(name, given, wanted)
    for name, (kinds, wanted) in _KINDS.items():
        given = getattr(parts, name)
        if given and not _are(given, kinds):
            raise _wrong(name, given, wanted)


def _are(values: object, kinds: Iterable[type]) -> bool:
    return isinstance(values, list) and {*map(type, values)} <= {*kinds}


def _wrong(name: str, value: object, wanted: str) -> InvalidMessage:
    return InvalidMessage(f"{name} is {repr(value)[:80]}; pass {wanted}")
