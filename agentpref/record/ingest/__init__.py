"""From the app's call to a record that may be stored: checks, redaction, pseudonyms.

``Log.record`` only makes a :class:`RawRun`, which costs the app one JSON dump. :class:`Ingest`
does the rest on the thread that writes. Everything in the database and in the spill went through
it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any, NamedTuple, TypeAlias

import orjson

from agentpref.errors import InvalidMessage, described
from agentpref.record.ingest.checks import as_id, as_output, check_detail, tidy
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.ingest.redaction import Redact, redacted
from agentpref.record.ingest.salvage import Salvage, describe
from agentpref.record.messages import (
    EMPTY_JSON,
    RUN_COLUMNS,
    Linker,
    RunRow,
    StoredRecord,
    as_json,
    check_output_shape,
    check_shapes,
    check_tool_shapes,
    plain,
)
from agentpref.types import RETRACTION, Comparison, Feedback

DETAILS = RUN_COLUMNS[RUN_COLUMNS.index("model") :]
"""What the app may say of a run beside its messages, in the order in which a body has it."""


CLOCK_STEP_SECONDS = 1.0
"""By how much the clock may go back before it counts as set."""

IDS = ("model", "revision", "thread_id", "trace_id", "user_id")
"""The details that are names: texts, or what :func:`as_id` makes texts of."""

_PLACES_OF_IDS = slice(3, 3 + len(IDS))


class RawRun(NamedTuple):
    """A run as the app gave it; ``body`` is the JSON list that :func:`freeze` makes.

    ``created_at`` is by the clock, ``ticks`` by ``time.monotonic``, which nobody sets.
    """

    run_id: str
    created_at: float
    body: bytes
    ticks: float = math.inf

    def said_at(self) -> float:
        """When the run was recorded; by the present clock, if that was set back since.

        Else a run that waits would be younger than the forgetting of its user, which came later.
        """
        by_now = time.time() - (time.monotonic() - self.ticks)
        return by_now if self.created_at - by_now > CLOCK_STEP_SECONDS else self.created_at


FromApp: TypeAlias = "RawRun | Feedback | Comparison"


def freeze(*parts: Any) -> bytes:
    """Dump messages, output, tools and the :data:`DETAILS` of a run, in this order, as JSON.

    Params and metadata that JSON cannot hold are kept by their ``repr``, because they only describe
    the run. For any other such part, and for an object as an id, ``InvalidMessage`` names it, with
    the cure.
    """
    if not {*map(type, parts[_PLACES_OF_IDS])} <= {str, NoneType}:
        ids = [None if given is None else as_id(given) for given in parts[_PLACES_OF_IDS]]
        for name, given, text in zip(IDS, parts[_PLACES_OF_IDS], ids, strict=True):
            if given is not None and text is None:
                raise InvalidMessage(
                    f"{name} is {described(given)}; pass a string, a number or a UUID"
                )
        parts = (*parts[: _PLACES_OF_IDS.start], *ids, *parts[_PLACES_OF_IDS.stop :])
    try:
        return orjson.dumps(parts, default=plain)
    except TypeError:
        pass
    messages, output, tools = parts[:3]
    try:
        Linker().conversation(messages, tools, as_output(output))  # names a message that is wrong
        return orjson.dumps(parts, default=_described)
    except InvalidMessage:
        raise
    except Exception as error:  # the app's own classes: whatever their methods raise
        raise InvalidMessage(
            f"the run's ids, tags, params or metadata are not JSON in UTF-8: {describe(error)}; "
            "keep to strings, numbers, lists and mappings, and clean text with "
            ".encode('utf-8', 'replace').decode()"
        ) from error


def _described(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return float.__float__(value) if isinstance(value, float) else repr(value)


def freeze_what_can_be_kept(*parts: Any) -> tuple[bytes, Mapping[str, int]]:
    """Dump like :func:`freeze`, and change the values that JSON cannot hold.

    Returns the JSON, and how many values were changed, by kind; see :class:`Salvage`. An id that is
    an object is left out, and counts as one. Messages and tools of the wrong shape are refused as
    by ``freeze``; nothing else is refused or raised.
    """
    salvage = Salvage()
    ids = [salvage.id(given) for given in parts[_PLACES_OF_IDS]]
    parts = (*parts[: _PLACES_OF_IDS.start], *ids, *parts[_PLACES_OF_IDS.stop :])
    copies = [salvage.plain(part) for part in parts]
    try:
        _check_shapes(*parts[:3])
    except InvalidMessage:
        raise
    except Exception:  # the app's own classes: they are judged by what is kept of them
        _check_shapes(*copies[:3])
    for place, name in enumerate(DETAILS, start=3):
        if name in ("params", "metadata") and isinstance(copies[place], str):
            copies[place] = {"value": copies[place]}  # a mapping that could not be read
    return orjson.dumps(copies), salvage.changes


def _check_shapes(messages: Any, output: Any, tools: Any) -> None:
    check_shapes(messages)
    check_output_shape(as_output(output))
    if tools is not None:
        check_tool_shapes(tools)


@dataclass(frozen=True, slots=True)
class Ingest:
    """Prepares the entries of one namespace. Has one user at a time."""

    namespace: str
    pseudonyms: Pseudonyms
    redact: Redact | None = None
    _linker: Linker = field(default_factory=Linker, repr=False)

    def prepare(self, given: FromApp) -> StoredRecord:
        """Check, redact and pseudonymise; raise ``InvalidMessage`` or ``RedactionFailed``."""
        if isinstance(given, RawRun):
            return self._run(given)
        if given.user_id is not None:
            given = replace(given, user_id=self.pseudonyms.name(given.user_id))
        if self.redact is not None:
            is_feedback = isinstance(given, Feedback)
            names = ("comment", "value", "correction") if is_feedback else ("comment",)
            if isinstance(given, Feedback) and given.key == RETRACTION:
                names = ("comment",)  # its value is a key and an id, not anybody's words
            texts = {name: redacted(getattr(given, name), self.redact) for name in names}
            given = replace(given, **texts)
        return given

    def _run(self, raw: RawRun) -> RunRow:
        messages, output, tools, *values = orjson.loads(raw.body)
        output = tidy(as_output(output))
        if isinstance(messages, list):
            messages = [tidy(message) for message in messages]
        details = dict(zip(DETAILS, values, strict=True))
        for name in EMPTY_JSON:
            if details[name]:
                check_detail(name, details[name])
        if self.redact is not None:
            original = output
            messages = redacted(messages, self.redact)
            output = redacted(output, self.redact)
            tools = redacted(tools, self.redact)
            for name in ("params", "metadata"):
                details[name] = redacted(details[name], self.redact)
            if output != original:  # the tokens spell the answer out
                details |= {"token_ids": None, "logprobs": None}
        for name, empty in EMPTY_JSON.items():
            details[name] = as_json(details[name]) if details[name] else empty
        if details["user_id"] is not None:
            details["user_id"] = self.pseudonyms.name(details["user_id"])
        nodes = self._linker.conversation(messages, tools, output)
        head = (raw.run_id, self.namespace, raw.said_at(), nodes[-2].id, nodes[-1].id)
        return RunRow._make((*head, *details.values(), nodes))
