"""MLflow's traces, as ``Trace.to_json`` and the commands ``mlflow traces`` give them.

The spans of chat models become runs, the session of the trace their thread. Feedback on a trace is
a score of its span, or of the last answer of the trace. An expectation says what should have come
out, perhaps not word for word, and is left out.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any

from agentpref.errors import ExchangeError
from agentpref.prefer.formats import Fields, require
from agentpref.prefer.formats.chat import a_score, an_id, kept, mapping, maybe_id, parsed, when
from agentpref.prefer.formats.spans import Span, runs_of
from agentpref.prefer.logged import LeftOut, LogFormat, Logged, LoggedScore
from agentpref.types import Source

_SOURCES: dict[str, Source] = {
    "HUMAN": "human", "LLM_JUDGE": "model", "AI_JUDGE": "model", "CODE": "code",
}  # fmt: skip
_FAILED = ("ERROR", "STATUS_CODE_ERROR", 2)


def parts(row: Fields) -> Iterator[tuple[str, Fields]]:
    """Yield the spans of a trace, and then its assessments."""
    info, data = mapping(row["info"]), mapping(row["data"])
    trace_id = an_id(info.get("trace_id", info.get("request_id")), "'trace_id' of 'info'")
    about = {"trace_id": trace_id, "metadata": _about(info)}
    spans, said = data.get("spans"), info.get("assessments")
    for name, found in (("spans", spans), ("assessments", said)):
        require(found is None or isinstance(found, list), repr(name), found, "write a list")
    for number, span in enumerate(spans or (), start=1):
        yield f"span {number}", {"span": span, **about}
    for number, assessment in enumerate(said or (), start=1):
        yield f"assessment {number}", {"assessment": assessment, **about}


def read(row: Fields) -> Iterator[Logged]:
    """Read a span or an assessment."""
    if "assessment" in row:
        yield _assessment(mapping(row["assessment"]), row["trace_id"])
        return
    span, about = mapping(row["span"]), row["metadata"]
    attributes = {key: parsed(value) for key, value in mapping(span.get("attributes")).items()}
    attributes = {key: _unquoted(value) for key, value in attributes.items()}
    context = mapping(span.get("context"))  # the second version of spans
    yield from runs_of(
        Span(
            row["trace_id"],
            _span_id(span.get("span_id", context.get("span_id"))),
            _seconds(span.get("start_time_unix_nano", span.get("start_time"))),
            str(span.get("name") or ""),
            attributes,
            failed=_code(span) in _FAILED,
            metadata=kept(tags=mapping(about.get("tags"))),
            thread_id=mapping(about.get("metadata")).get("mlflow.trace.session"),
            user_id=mapping(about.get("metadata")).get("mlflow.trace.user"),
        )
    )


def _about(info: Mapping[str, Any]) -> dict[str, Any]:
    tags = mapping(info.get("tags"))
    ours = {key: value for key, value in tags.items() if not key.startswith("mlflow.")}
    return {
        "metadata": mapping(info.get("trace_metadata") or info.get("request_metadata")),
        "tags": ours,
    }


def _assessment(said: Mapping[str, Any], trace_id: str) -> Logged:
    feedback = mapping(said.get("feedback"))
    if not feedback:
        return LeftOut("expectation" if said.get("expectation") else "assessment without a value")
    if said.get("valid") is False:
        return LeftOut("assessment that a later one overrides")
    source = mapping(said.get("source"))
    kind = str(source.get("source_type") or "").upper()
    score, scale, value = a_score(feedback.get("value"))
    span = said.get("span_id")
    created = said.get("last_update_time") or said.get("last_update_time_ms")
    name = an_id(said.get("assessment_name", said.get("name")), "the name of the assessment")
    if score is None and value is None:
        return LeftOut("assessment without a value")
    return LoggedScore(
        id=an_id(said.get("assessment_id"), "'assessment_id'"),
        created_at=when(created or said.get("create_time"), "'last_update_time'"),
        run_id=f"{trace_id}/{_span_id(span)}" if span else None,
        trace_id=None if span else trace_id,
        key=name,
        score=score,
        value=value,
        comment=said.get("rationale") or None,
        source=_SOURCES.get(kind),
        user_id=maybe_id(source.get("source_id"), "'source_id'"),
        scale=scale,
    )


def _unquoted(value: Any) -> Any:
    """MLflow writes each attribute as JSON, also a text."""
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] == '"':
        return parsed(f"[{value}]")[0]
    return value


def _code(span: Mapping[str, Any]) -> Any:
    return mapping(span.get("status")).get("code", span.get("status_code"))


def _span_id(value: Any) -> str:
    """An id in hexadecimal; spans of MLflow 3 write theirs in base64."""
    text = an_id(value, "'span_id'").removeprefix("0x")
    if len(text) == 16:
        return text.lower()
    try:
        return base64.b64decode(text, validate=True).hex()
    except ValueError:
        return text


def _seconds(value: Any) -> float:
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if not isinstance(value, int):
        raise ExchangeError("a span has no start time; export the whole trace")
    return value / 1e9


MLFLOW = LogFormat(
    shapes=(("info", "data"),),
    read=read,
    parts=parts,
    optional=("span", "assessment", "trace_id", "metadata"),
)
