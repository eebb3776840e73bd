"""Entries of a log as rows of plain JSON: what logs send one another, and what segments hold.

A row names what it is by ``type``: ``run``, ``feedback`` or ``comparison``. It has the ``id`` that
the log gave to it, so that it is kept once, however often it comes. A row from elsewhere is checked
as an app's own call is, and then by the ingest like every other entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from agentpref.errors import AgentprefError, InvalidFeedback, InvalidMessage, described
from agentpref.record.finding import named_trace, of_trace
from agentpref.record.ingest import DETAILS, FromApp, RawRun, freeze
from agentpref.record.ingest.checks import as_output, checked, checked_id, require_answer, tidy
from agentpref.record.messages import EMPTY_JSON, TOOLS, RunRow, StoredRecord, check_output
from agentpref.types import Comparison, Feedback

Row = Mapping[str, Any]

_RUN = ("messages", "output", "tools", *DETAILS)
_FEEDBACK = ("key", "score", "value", "comment", "source", "user_id", "correction", "scale")
_COMPARISON = ("run_a", "run_b", "winner", "source", "user_id", "comment")
_TOOLS = b'{"' + TOOLS.encode() + b'":'


def row_of(entry: StoredRecord) -> dict[str, Any]:
    """Write a record as a row for ``orjson.dumps``. What was not given is left out."""
    if isinstance(entry, RunRow):
        *prompt, output = (orjson.Fragment(node.body) for node in entry.nodes)
        values: dict[str, Any] = {name: getattr(entry, name) for name in DETAILS}
        values["namespace"] = entry.namespace or None
        for name, empty in EMPTY_JSON.items():
            text = values[name]
            values[name] = None if text in (None, empty) else orjson.Fragment(text)
        first = entry.nodes[0].body
        head = orjson.loads(first) if first.startswith(_TOOLS) else {}
        if head.keys() == {TOOLS}:
            prompt, values["tools"] = prompt[1:], head[TOOLS]
        values |= {"messages": prompt, "output": output}
        return _row("run", entry.run_id, entry.created_at, values)
    if isinstance(entry, Feedback):
        trace_id = named_trace(entry.run_id)
        place = {"run_id": entry.run_id} if trace_id is None else {"trace_id": trace_id}
        values = place | {name: getattr(entry, name) for name in _FEEDBACK}
        return _row("feedback", entry.feedback_id, entry.created_at, values)
    values = {name: getattr(entry, name) for name in _COMPARISON}
    return _row("comparison", entry.comparison_id, entry.created_at, values)


def _row(kind: str, name: str, at: float, values: Mapping[str, Any]) -> dict[str, Any]:
    said = {name: value for name, value in values.items() if value is not None}
    return {"type": kind, "id": name, "created_at": at, **said}


def entry_of(row: Any, namespace: str) -> FromApp:
    """Read a row that came from elsewhere.

    Args:
        row: what :func:`row_of` wrote, or anybody's JSON. Fields that are not known are left out.
        namespace: where a judged trace is looked up.

    Raises:
        InvalidMessage, InvalidFeedback: it is none that a log would have written; the message names
            the field, and quotes nothing.
    """
    if not isinstance(row, Mapping):
        raise InvalidMessage(f"a row is {described(row)}; send an object with a type and an id")
    kind, name, at = (row.get(field) for field in ("type", "id", "created_at"))
    wrong = InvalidMessage if kind == "run" else InvalidFeedback
    if kind not in ("run", "feedback", "comparison"):
        what = described(kind)
        raise InvalidMessage(f"type is {what}; use 'run', 'feedback' or 'comparison'")
    if not isinstance(name, str) or not name or not name.isprintable():
        raise wrong(f"id is {described(name)}; send a non-empty string of printable text")
    if isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at):
        raise wrong(f"created_at is {described(at)}; send seconds since 1970, as a number")
    try:
        if kind == "run":
            return _run(row, name, float(at))
        if kind == "feedback":
            return _feedback(row, name, float(at), namespace)
        said = {field: row.get(field) for field in _COMPARISON[:3]}
        return checked(Comparison(name, float(at), **said, **_who(row)))  # type: ignore[arg-type]  # ``checked`` looks at each
    except AgentprefError:
        raise
    except (TypeError, ValueError, AttributeError) as error:  # a shape that no check has met
        raise wrong(
            f"{kind} {name!r} is not as a log writes one ({type(error).__name__})"
        ) from None


def _run(row: Row, name: str, at: float) -> RawRun:
    values = {field: row.get(field) for field in _RUN}
    values["tools"] = values["tools"] or ()
    body, _ = freeze(*values.values())
    return RawRun(name, at, body)


def _feedback(row: Row, name: str, at: float, namespace: str) -> Feedback:
    run_id, trace_id, output = (row.get(field) for field in ("run_id", "trace_id", "correction"))
    if (run_id is None) == (trace_id is None):
        raise InvalidFeedback("send run_id or trace_id, and not both")
    place = (
        checked_id("run_id", run_id)
        if trace_id is None
        else of_trace(namespace, checked_id("trace_id", trace_id))
    )
    if output is not None:
        output = tidy(as_output(output))
        check_output(output)
        require_answer(output)
    said = {field: row.get(field) for field in ("key", "score", "value")}
    given = checked(Feedback(name, place, at, **said, **_who(row), correction=output))  # type: ignore[arg-type]  # ``checked`` looks at each
    scale = row.get("scale")
    return given if scale is None else replace(given, scale=_scale(scale))


def _who(row: Row) -> dict[str, Any]:
    said = {field: row.get(field) for field in ("comment", "user_id")}
    return {**said, "source": row.get("source", "human")}


def _scale(value: Any) -> tuple[float, float]:
    ends = value if isinstance(value, list) and len(value) == 2 else [True, True]
    low, high = (
        end if n is None else n for n, end in zip(ends, (-math.inf, math.inf), strict=True)
    )
    if isinstance(low, bool) or isinstance(high, bool) or not low < high:
        raise InvalidFeedback(f"scale is {described(value)}; send the lowest and the highest score")
    return float(low), float(high)
