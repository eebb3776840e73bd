"""Phoenix's spans and annotations, as its client and its API export them.

Spans come with their attributes inside one another, in names with dots, or as the columns of
``get_spans_dataframe``. An annotation is a score of its span; those of a trace judge its last
answer. The labels ``thumbs-up`` and ``thumbs-down`` of people are thumbs.
"""

from __future__ import annotations

from collections.abc import Iterator

from agentpref.prefer.formats import Fields, require
from agentpref.prefer.formats.chat import a_score, an_id, mapping, maybe_id, when
from agentpref.prefer.formats.spans import Span, runs_of
from agentpref.prefer.logged import LeftOut, LogFormat, Logged, LoggedScore
from agentpref.types import THUMBS, Source

_SOURCES: dict[str, Source] = {"HUMAN": "human", "LLM": "model", "CODE": "code"}
_THUMBS = {"thumbs-up": 1.0, "thumbs-down": 0.0, "thumbs_up": 1.0, "thumbs_down": 0.0}
_COLUMN = "attributes."


def read(row: Fields) -> Iterator[Logged]:
    """Read a span or an annotation."""
    if "annotator_kind" in row:
        yield _annotation(row)
        return
    context = mapping(row.get("context"))
    spread = {key[len(_COLUMN) :]: row[key] for key in row if key.startswith(_COLUMN)}
    attributes = {**mapping(row.get("attributes")), **spread}
    attributes.setdefault("openinference.span.kind", row.get("span_kind"))
    yield from runs_of(
        Span(
            an_id(context.get("trace_id", row.get("context.trace_id")), "the trace id"),
            an_id(context.get("span_id", row.get("context.span_id")), "the span id"),
            when(row.get("start_time"), "'start_time'"),
            str(row.get("name") or ""),
            attributes,
            failed=row.get("status_code") == "ERROR",
            in_trace=False,
        )
    )


def _annotation(row: Fields) -> Logged:
    result = {key: row.get(key) for key in ("score", "label", "explanation")}
    result |= mapping(row.get("result"))
    name = an_id(row["name"], "'name'")
    score, scale, other = a_score(result.get("score"))
    require(other is None, "'score'", other, "write a number, and words as 'label'")
    label = result.get("label")
    source = _SOURCES.get(str(row["annotator_kind"]).upper())
    thumb = _THUMBS.get(str(label).lower()) if source == "human" else None
    span, trace = row.get("span_id"), row.get("trace_id")
    if not span and not trace:
        return LeftOut("annotation of a session")
    identifier = row.get("identifier") or row.get("id") or ""
    return LoggedScore(
        id=f"{span or trace}/{name}/{identifier}",
        created_at=when(row.get("updated_at") or row.get("created_at"), "'updated_at'"),
        run_id=maybe_id(span, "the span id"),
        trace_id=None if span else maybe_id(trace, "the trace id"),
        key=name if thumb is None else THUMBS,
        score=score if thumb is None else thumb,
        value=label if thumb is None else None,
        comment=result.get("explanation") or None,
        source=source,
        user_id=maybe_id(row.get("user_id"), "'user_id'"),
        scale=scale if thumb is None else (0.0, 1.0),
    )


_ATTRIBUTES = (
    "llm.input_messages", "llm.output_messages", "llm.model_name", "llm.invocation_parameters",
    "llm.tools", "llm.token_count.prompt", "llm.token_count.completion", "llm.finish_reason",
    "openinference.span.kind", "session.id", "user.id", "tag.tags", "metadata",
)  # fmt: skip

PHOENIX = LogFormat(
    shapes=(
        ("context", "span_kind", "start_time"),
        ("context.trace_id", "context.span_id", "start_time"),
        ("span_id", "name", "annotator_kind"),
        ("trace_id", "name", "annotator_kind"),
    ),
    read=read,
    optional=(
        "attributes", "name", "status_code", "result", "score", "label", "explanation",
        "identifier", "id", "updated_at", "created_at", "user_id", "parent_id", "end_time",
        *(_COLUMN + name for name in _ATTRIBUTES),
    ),
)  # fmt: skip
