"""Langfuse's observations and scores, as its API, its pages and its blob storage export them.

Keys are in camel case from the API and the pages, in snake case in blob storage; both are read, and
so is the JSON of one trace. A generation becomes a run, its session a thread. A score judges its
observation, or else the last answer of its trace.

A thumb is a score by the name of Langfuse's own guides, ``user-feedback``, of 0 or 1, or -1 or 1.
Annotations are by people, evaluations by models; other scores that came through the API are counted
as by programs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from agentpref.errors import ExchangeError
from agentpref.prefer.formats import Fields, require
from agentpref.prefer.formats.chat import (
    a_score,
    an_id,
    answers_of,
    is_thumb,
    kept,
    mapping,
    maybe_id,
    messages_of,
    parsed,
    thumb_scale,
    tools_of,
    when,
)
from agentpref.prefer.logged import LeftOut, LogFormat, Logged, LoggedRun, LoggedScore
from agentpref.types import INCOMPLETE, THUMBS, Message, Source

THUMB_NAMES = ("user-feedback", "user_feedback")
"""The names that Langfuse's guides give to the thumbs of users."""

_USAGE = {"input": "prompt_tokens", "output": "completion_tokens", "total": "total_tokens"}
_SOURCES: dict[str, Source] = {"ANNOTATION": "human", "EVAL": "model", "API": "code"}


def read(row: Fields) -> Iterator[Logged]:
    """Read an observation, a score, or a trace, which holds nothing that its observations lack."""
    if _at(row, "data_type") is not None or "source" in row:
        yield _score(row)
    elif "type" in row:
        yield from _observation(row)
    else:
        yield LeftOut("trace")


def parts(row: Fields) -> Iterable[tuple[str, Fields]]:
    """Yield the observations and the scores of a trace that was downloaded as JSON."""
    if not isinstance(row.get("observations"), list):
        yield "", row
        return
    trace = row["trace"] if isinstance(row.get("trace"), dict) else row
    shared = {key: trace.get(key) for key in ("sessionId", "userId", "tags", "session_id")}
    shared["traceId"] = trace.get("id")
    for kind in ("observations", "scores"):
        held_here = row.get(kind)
        for number, inner in enumerate(held_here if isinstance(held_here, list) else (), start=1):
            fields = inner if isinstance(inner, dict) else {}
            more = {key: held for key, held in shared.items() if held and not fields.get(key)}
            yield f"{kind[:-1]} {number}", {**fields, **more}


def _observation(row: Fields) -> Iterator[Logged]:
    kind = str(row["type"]).upper()
    if kind != "GENERATION":
        yield LeftOut(f"observation of type {kind}")
        return
    asked, answered = parsed(row.get("input")), row.get("output")
    if answered in (None, "", "null") or asked in (None, "", "null"):
        yield LeftOut("generation without input or output")
        return
    asked_with = asked if isinstance(asked, dict) else {}
    params = mapping(_at(row, "model_parameters"))
    metadata = mapping(row.get("metadata"))
    offered = _at(row, "tool_definitions") or asked_with.get("tools") or params.pop("tools", None)
    offered = offered or metadata.pop("tools", None)
    failed = row.get("level") == "ERROR"
    used = mapping(_at(row, "usage_details")) or mapping(row.get("usage"))
    usage = {_USAGE.get(name, name): count for name, count in used.items()}
    run_id, tags = an_id(row["id"], "'id'"), parsed(row.get("tags") or _at(row, "trace_tags") or [])
    require(isinstance(tags, list), "'tags'", tags, "write a list of texts")
    for number, answer in enumerate(answers_of(answered, "'output'")):
        reason = answer.finish_reason or metadata.get("finish_reason")
        yield LoggedRun(
            id=f"{run_id}:{number}" if number else run_id,
            created_at=when(_at(row, "start_time"), "the start time"),
            messages=messages_of(asked, "'input'"),
            output=answer.message,
            tools=_tools(offered),
            model=_at(row, "provided_model_name") or row.get("model"),
            thread_id=maybe_id(_at(row, "session_id"), "the session id"),
            trace_id=maybe_id(_at(row, "trace_id"), "the trace id"),
            user_id=maybe_id(_at(row, "user_id"), "the user id"),
            params={name: _number(value) for name, value in params.items()},
            tags=tuple(map(str, tags)),
            metadata=kept(
                **{str(key): value for key, value in metadata.items()}
                | {
                    "finish_reason": INCOMPLETE if failed else reason,
                    "usage": usage,
                    "name": row.get("name"),
                    "environment": row.get("environment"),
                    "prompt": _prompt_name(row),
                    "cost": mapping(_at(row, "cost_details")),
                    "latency": row.get("latency"),
                    "status_message": _at(row, "status_message"),
                }
            ),
        )


def _tools(offered: Any) -> list[dict[str, Any]]:
    """The tools of a call: a list, or as in blob storage the definition of each under its name."""
    found = parsed(offered)
    if isinstance(found, dict):
        defined = [(name, mapping(definition)) for name, definition in found.items()]
        found = [{"name": name, **definition} for name, definition in defined]
    return tools_of(found)


def _prompt_name(row: Fields) -> str | None:
    name, version = _at(row, "prompt_name"), _at(row, "prompt_version")
    return f"{name}:{version}" if name and version else name


def _score(row: Fields) -> Logged:
    kind = str(_at(row, "data_type") or "NUMERIC").upper()
    subject = mapping(row.get("subject"))  # the third version of the API
    of = str(subject.get("type") or subject.get("kind") or "").lower()
    observation = _at(row, "observation_id") or (subject.get("id") if of == "observation" else None)
    trace = _at(row, "trace_id") or _at(subject, "trace_id")
    trace = trace or (subject.get("id") if of == "trace" else None)
    if not (observation or trace):
        return LeftOut("score of a session" if _at(row, "session_id") or of else "score of no run")
    name, source = an_id(row["name"], "'name'"), str(row.get("source") or "").upper()
    score, value, correction, scale = _given(kind, row)
    key: str = name
    by: Source | None = _SOURCES.get(source)
    if name in THUMB_NAMES and is_thumb(score):
        key, scale = THUMBS, scale or thumb_scale(score or 0)
        by = "human" if by == "code" else by
    return LoggedScore(
        id=an_id(row["id"], "'id'"),
        created_at=when(_said_at(row), "the time of the score"),
        run_id=maybe_id(observation, "the observation id"),
        trace_id=None if observation else maybe_id(trace, "the trace id"),
        key="correction" if correction else key,
        score=score,
        value=value,
        comment=row.get("comment") or None,
        source="human" if correction and by == "code" else by,
        user_id=maybe_id(_at(row, "author_user_id"), "the author's id"),
        correction=correction,
        scale=scale,
    )


def _given(
    kind: str, row: Fields
) -> tuple[float | None, Any, Message | None, tuple[float, float] | None]:
    """Score, value, correction and scale, by the type of the score."""
    number, text = row.get("value"), _at(row, "string_value")
    if kind == "CORRECTION":
        said = answers_of(text or number, "the correction")
        return None, None, said[0].message, None
    if kind in ("CATEGORICAL", "TEXT"):
        label = text if text is not None else number
        configured = _at(row, "config_id") is not None  # else every category has the number 0
        score, _, _ = a_score(_number(number)) if configured else (None, None, None)
        return score if kind == "CATEGORICAL" else None, label, None, None
    score, scale, other = a_score(_number(number))
    require(other is None, "'value'", number, f"write a number, as the type {kind} wants")
    return score, None, None, (0.0, 1.0) if kind == "BOOLEAN" else scale


def _number(value: Any) -> Any:
    """A number or a bool, which CSV writes as text."""
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    if word in _FLAGS:
        return _FLAGS[word]
    try:
        return float(value)
    except ValueError:
        return value


_FLAGS = {"true": True, "false": False}


def _said_at(row: Fields) -> Any:
    found = _at(row, "updated_at") or row.get("timestamp") or _at(row, "created_at")
    if found is None:
        raise ExchangeError("the score has no time; export it with 'timestamp' or 'updatedAt'")
    return found


def _at(row: Fields, name: str) -> Any:
    """What a row has under a name in snake case, or the same in camel case."""
    return row[name] if row.get(name) is not None else row.get(_camel(name))


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


_FIELDS = (
    "input", "output", "model", "provided_model_name", "model_parameters", "session_id", "user_id",
    "tags", "trace_tags", "metadata", "usage_details", "usage", "name", "environment", "level",
    "status_message", "prompt_name", "prompt_version", "cost_details", "latency",
    "tool_definitions", "observation_id", "value", "string_value", "comment", "subject",
    "author_user_id", "config_id", "updated_at", "created_at", "timestamp", "scores",
)  # fmt: skip

_NO_ANSWER = (
    "end_time", "completion_start_time", "parent_observation_id", "project_id", "public",
    "bookmarked", "is_root_observation", "internal_model_id", "model_id", "trace_name",
    "time_to_first_token", "input_price", "output_price", "total_price", "prompt_id", "queue_id",
    "dataset_run_id",
)  # fmt: skip
"""Fields that say nothing of an answer."""

LANGFUSE = LogFormat(
    shapes=(
        ("id", "type", "traceId", "startTime"),
        ("id", "type", "trace_id", "start_time"),
        ("id", "name", "source", "dataType"),
        ("id", "name", "source", "data_type"),
        ("trace", "observations"),
        ("id", "timestamp", "observations"),
        ("id", "timestamp", "bookmarked"),
    ),
    read=read,
    parts=parts,
    optional=(*_FIELDS, *map(_camel, _FIELDS), *_NO_ANSWER, *map(_camel, _NO_ANSWER)),
)
