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
from agentpref.record.ingest.redaction import Redact, redacted, redacted_data
from agentpref.record.ingest.salvage import PASSING, Described, Salvage, describe, is_finite
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
_PLACES_OF_NUMBERS = [3 + DETAILS.index(name) for name in ("params", "metadata")]


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


def freeze(*parts: Any) -> tuple[bytes, Mapping[str, int]]:
    """Dump messages, output, tools and the :data:`DETAILS` of a run, in this order, as JSON.

    Objects in params and metadata that JSON cannot hold are kept by their ``repr``, because they
    only describe the run; how many is the second part of what is returned. For any other such part,
    for numbers that are not finite, and for an object as an id, ``InvalidMessage`` names it, with
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
        if all(is_finite(parts[place]) for place in _PLACES_OF_NUMBERS):
            return orjson.dumps(parts, default=plain), {}
    except (TypeError, RecursionError):
        pass
    messages, output, tools = parts[:3]
    try:
        Linker().conversation(messages, tools, as_output(output))  # names a message that is wrong
        if not all(is_finite(parts[place]) for place in _PLACES_OF_NUMBERS):
            raise ValueError("a number is not finite")
        objects = Described()
        return orjson.dumps(parts, default=objects), objects.changes
    except (InvalidMessage, *PASSING):
        raise
    except BaseException as error:  # the app's own classes: whatever their methods raise
        raise InvalidMessage(
            f"the run's ids, tags, params or metadata are not JSON in UTF-8: {describe(error)}; "
            "keep to strings, numbers, lists and mappings, and clean text with "
            ".encode('utf-8', 'replace').decode()"
        ) from error


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
    except (InvalidMessage, *PASSING):
        raise
    except BaseException:  # the app's own classes: they are judged by what is kept of them
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
            texts = {"comment": redacted_data(given.comment, self.redact)}
            if isinstance(given, Feedback):
                texts["correction"] = redacted(given.correction, self.redact)
                if given.key != RETRACTION:  # whose value is a key and an id, not anybody's words
                    texts["value"] = redacted_data(given.value, self.redact)
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
                details[name] = redacted_data(details[name], self.redact)
            if output != original:  # the tokens spell the answer out
                details |= {"token_ids": None, "logprobs": None}
        for name, empty in EMPTY_JSON.items():
            details[name] = as_json(details[name]) if details[name] else empty
        if details["user_id"] is not None:
            details["user_id"] = self.pseudonyms.name(details["user_id"])
        nodes = self._linker.conversation(messages, tools, output)
        head = (raw.run_id, self.namespace, raw.said_at(), nodes[-2].id, nodes[-1].id)
        return RunRow._make((*head, *details.values(), nodes))
