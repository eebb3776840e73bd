"""OpenTelemetry's traces and logs in OTLP JSON, as the collector's file exporter writes them.

A span of a model call becomes a run, if the instrumentation captured its messages: on the span, in
its events, or in a log record with the details of its operation. ``gen_ai.evaluation.result``, an
event of the span or a log record, is a score of the span that it is on.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any

from agentpref.prefer.formats import Fields, require
from agentpref.prefer.formats.chat import a_score, an_id, mapping, parsed
from agentpref.prefer.formats.spans import Span, at, nested, runs_of
from agentpref.prefer.logged import LeftOut, LogFormat, Logged, LoggedScore

EVALUATION = "gen_ai.evaluation.result"
_DETAILS = "gen_ai.client.inference.operation.details"
_FAILED = (2, "2", "STATUS_CODE_ERROR")


def parts(row: Fields) -> Iterator[tuple[str, Fields]]:
    """Yield the spans and log records of one export, each with the resource that it is from."""
    kinds = (("resourceSpans", "scopeSpans", "spans"), ("resourceLogs", "scopeLogs", "logRecords"))
    for outer, scope, inner in kinds:
        number = 0
        for resource in _objects(row.get(outer), outer):
            of = mapping(resource.get("resource")).get("attributes")
            for scoped in _objects(resource.get(scope), scope):
                records = _objects(scoped.get(inner), inner)
                for record in _grouped(records) if inner == "logRecords" else records:
                    number += 1
                    yield f"{inner[:-1]} {number}", {**record, "resource": of, "is": inner}


def read(row: Fields) -> Iterator[Logged]:
    """Read a span or a log record."""
    attributes = _attributes(row.get("attributes"))
    trace_id = _hex(row.get("traceId"), "'traceId'")
    span_id = _hex(row.get("spanId"), "'spanId'")
    resource = _attributes(row.get("resource"))
    events: list[tuple[str, Mapping[str, Any], float]] = []
    if row["is"] == "spans":
        started = _seconds(row.get("startTimeUnixNano"), "'startTimeUnixNano'")
        for event in _objects(row.get("events") or [], "events"):
            at_event = _seconds(event.get("timeUnixNano") or 0, "'timeUnixNano'")
            events.append((str(event.get("name")), _attributes(event.get("attributes")), at_event))
    else:
        started = _seconds(row.get("timeUnixNano") or row.get("observedTimeUnixNano"), "its time")
        events += row["events"]
        attributes = {**attributes, "gen_ai.operation.name": "chat"} if row["call"] else {}
    span = Span(
        trace_id, span_id, started, str(row.get("name") or ""), attributes,
        [event[:2] for event in events],
        failed=mapping(row.get("status")).get("code") in _FAILED,
        metadata={"service": resource.get("service.name")},
        thread_id=resource.get("session.id"),
        user_id=resource.get("user.id") or resource.get("enduser.id"),
    )  # fmt: skip
    scores = [
        _score(span, *event[1:], n) for n, event in enumerate(events) if event[0] == EVALUATION
    ]
    found = [*runs_of(span)] if row["is"] == "spans" or row["call"] else []
    if scores:
        found = [one for one in found if not isinstance(one, LeftOut)]
    yield from found or ([] if scores else [LeftOut("log record")])
    yield from scores


def _grouped(records: list[Mapping[str, Any]]) -> Iterator[Fields]:
    """Yield one record for the messages of each span, which older conventions log one by one."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        attributes = _attributes(record.get("attributes"))
        name = str(record.get("eventName") or attributes.get("event.name") or "")
        body = _value(record.get("body"))
        said = {**attributes, **body} if isinstance(body, Mapping) else attributes
        is_call = name == _DETAILS or (name.startswith("gen_ai.") and name != EVALUATION)
        where = (str(record.get("traceId")), str(record.get("spanId")))
        time = _seconds(record.get("timeUnixNano") or record.get("observedTimeUnixNano") or 0, "")
        event = (name, said, time)
        if not is_call:
            yield {**record, "call": False, "events": [event]}
            continue
        group = groups.setdefault(where, {**record, "call": True, "events": []})
        group["events"].append(event)
        if name == _DETAILS:
            group["attributes"] = record.get("attributes")
    yield from groups.values()


def _score(span: Span, attributes: Mapping[str, Any], at_event: float, number: int) -> LoggedScore:
    tree = nested(attributes)
    name = an_id(at(tree, "gen_ai.evaluation.name"), "'gen_ai.evaluation.name'")
    score, scale, other = a_score(at(tree, "gen_ai.evaluation.score.value"))
    require(other is None, "'gen_ai.evaluation.score.value'", other, "write a number")
    return LoggedScore(
        id=f"{span.id}/{name}/{number}",
        created_at=at_event or span.started_at,
        run_id=span.id,
        trace_id=None,
        key=name,
        score=score,
        value=at(tree, "gen_ai.evaluation.score.label"),
        comment=at(tree, "gen_ai.evaluation.explanation"),
        source="model",
        scale=scale,
    )


def _objects(value: Any, name: str) -> list[Mapping[str, Any]]:
    fits = isinstance(value, list) and all(isinstance(one, Mapping) for one in value)
    require(fits or value is None, repr(name), value, "write OTLP JSON: a list of objects")
    return value or []


def _attributes(value: Any) -> dict[str, Any]:
    """Attributes as names and values, from OTLP's list of keys or an object."""
    if isinstance(value, Mapping):
        return {**value}
    found = _objects(value, "attributes")
    return {str(one.get("key")): _value(one.get("value")) for one in found}


def _value(value: Any) -> Any:
    """A value as OTLP writes it, with its type before it."""
    if not isinstance(value, Mapping):
        return value
    if "arrayValue" in value:
        return [
            _value(one) for one in _objects(mapping(value["arrayValue"]).get("values"), "values")
        ]
    if "kvlistValue" in value:
        return _attributes(mapping(value["kvlistValue"]).get("values"))
    if "intValue" in value:
        return int(value["intValue"]) if str(value["intValue"]).lstrip("-").isdigit() else None
    for kind in ("stringValue", "boolValue", "doubleValue", "bytesValue"):
        if kind in value:
            return value[kind]
    return None


def _hex(value: Any, name: str) -> str:
    """An id, in the hexadecimal of OTLP JSON, or in the base64 that some exporters write."""
    text = an_id(value, name)
    if len(text) in (16, 32) and not set(text.lower()) - set("0123456789abcdef"):
        return text.lower()
    try:
        return base64.b64decode(text, validate=True).hex()
    except ValueError:
        return text


def _seconds(value: Any, name: str) -> float:
    number = parsed(value)
    fits = isinstance(number, int) or (isinstance(number, str) and number.isdigit())
    require(fits, name, value, "write nanoseconds since 1970")
    return int(number) / 1e9


_NO_ANSWER = ("kind", "parentSpanId", "endTimeUnixNano", "traceState", "flags", "links",
              "droppedAttributesCount", "droppedEventsCount", "droppedLinksCount",
              "severityNumber", "severityText", "schemaUrl")  # fmt: skip
"""Keys of spans and log records that say nothing of an answer."""

OTLP = LogFormat(
    shapes=(("resourceSpans",), ("resourceLogs",)),
    read=read,
    parts=parts,
    optional=(
        "traceId", "spanId", "name", "startTimeUnixNano", "timeUnixNano", "observedTimeUnixNano",
        "attributes", "events", "status", "body", "eventName", "resource", "is", "call",
        *_NO_ANSWER,
    ),
)  # fmt: skip
