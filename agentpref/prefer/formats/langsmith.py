"""LangSmith's runs and feedback, as its client, its API and its bulk export give them.

A run of type ``llm`` becomes a run here. Its thread is the one that LangSmith shows: the
``session_id``, ``thread_id`` or ``conversation_id`` of its metadata; the column ``session_id`` is a
project. Feedback judges its run; on the root of a trace, it judges the last answer of the trace.

A thumb is feedback under ``user_score``, of 0 or 1, or -1 or 1. Feedback given in the app is by
people, that of evaluators by models; what came through the API is counted as by programs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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

THUMB_NAMES = ("user_score", "user-score")
"""The keys that LangSmith's guides give to the thumbs of users."""

_SOURCES: dict[str, Source] = {
    "app": "human", "model": "model", "auto_eval": "model", "evaluator": "model", "api": "code",
}  # fmt: skip
_THREAD = ("session_id", "thread_id", "conversation_id")


def read(row: Fields) -> Iterator[Logged]:
    """Read a run or feedback."""
    if "run_type" in row:
        yield from _run(row)
    else:
        yield _feedback(row)


def parts(row: Fields) -> Iterable[tuple[str, Fields]]:
    """Yield a run, and the runs below it if they were loaded with it."""
    yield "", {key: value for key, value in row.items() if key != "child_runs"}
    below = row.get("child_runs")
    for number, child in enumerate(below if isinstance(below, list) else (), start=1):
        for place, fields in parts(child if isinstance(child, dict) else {}):
            yield f"child run {number}" + (f", {place}" if place else ""), fields


def _run(row: Fields) -> Iterator[Logged]:
    kind = str(row["run_type"])
    if kind != "llm":
        yield LeftOut(f"run of type {kind}")
        return
    asked, answered = parsed(row.get("inputs")), parsed(row.get("outputs"))
    if not asked or not answered:
        yield LeftOut("llm run without inputs or outputs")
        return
    extra = mapping(row.get("extra"))
    params = mapping(extra.get("invocation_params"))
    metadata = mapping(extra.get("metadata"))
    sent = asked if isinstance(asked, Mapping) else {}
    tools = params.pop("tools", None) or sent.get("tools")
    tags = parsed(row.get("tags") or [])
    require(isinstance(tags, list), "'tags'", tags, "write a list of texts")
    run_id = an_id(row["id"], "'id'")
    models = (params.pop("model", None), params.pop("model_name", None))
    model = next(filter(None, (*models, metadata.pop("ls_model_name", None))), None)
    thread = next((metadata.pop(key) for key in _THREAD if metadata.get(key)), None)
    user = next((metadata.pop(key) for key in ("user_id", "user") if metadata.get(key)), None)
    for number, answer in enumerate(answers_of(answered, "'outputs'")):
        reason = INCOMPLETE if row.get("error") else answer.finish_reason
        yield LoggedRun(
            id=f"{run_id}:{number}" if number else run_id,
            created_at=when(row.get("start_time"), "'start_time'"),
            messages=messages_of(asked, "'inputs'"),
            output=answer.message,
            tools=tools_of(tools),
            model=model,
            thread_id=maybe_id(thread, "the thread id"),
            trace_id=maybe_id(row.get("trace_id"), "'trace_id'"),
            user_id=maybe_id(user, "the user id"),
            params={key: value for key, value in params.items() if not key.startswith("_")},
            tags=tuple(map(str, tags)),
            metadata=kept(
                **{str(key): value for key, value in metadata.items()}
                | {
                    "finish_reason": reason,
                    "usage": _usage(row),
                    "name": row.get("name"),
                    "error": row.get("error"),
                    "end_time": row.get("end_time"),
                    "project": row.get("session_name") or row.get("session_id"),
                }
            ),
        )


def _usage(row: Fields) -> dict[str, Any]:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {name: row[name] for name in names if isinstance(row.get(name), int)}


def _feedback(row: Fields) -> Logged:
    run, trace = row.get("run_id"), row.get("trace_id")
    if not run:
        return LeftOut("feedback on a project")
    key = an_id(row["key"], "'key'")
    score, scale, value = a_score(row.get("score"))
    require(value is None, "'score'", value, "write a number or a bool, and words as 'value'")
    origin = mapping(row.get("feedback_source"))
    source = _SOURCES.get(str(origin.get("type") or "").lower())
    if key in THUMB_NAMES and is_thumb(score):
        key, scale = THUMBS, scale or thumb_scale(score or 0)
        source = "human" if source == "code" else source
    correction = _correction(row.get("correction"))
    told = row.get("value")
    if row.get("correction") and correction is None:
        told = {"value": told, "correction": row["correction"]}
    return LoggedScore(
        id=an_id(row["id"], "'id'"),
        created_at=when(row.get("modified_at") or row.get("created_at"), "'modified_at'"),
        run_id=an_id(run, "'run_id'"),
        trace_id=str(run) if trace in (None, run) else None,
        key="correction" if correction else key,
        score=None if correction else score,
        value=None if correction else told,
        comment=row.get("comment") or None,
        source=source,
        user_id=maybe_id(origin.get("user_id"), "the user id"),
        correction=correction,
        scale=_bounds(row) or scale,
    )


def _correction(given: Any) -> Message | None:
    """The answer as it should have been; other corrections, such as of a label, are values."""
    found = parsed(given)
    if isinstance(found, str) and found.strip():
        return answers_of(found, "'correction'")[0].message
    keys = {"role", "content", "messages", "output", "text", "generations", "choices"}
    if isinstance(found, Mapping) and keys & found.keys():
        return answers_of(found, "'correction'")[0].message
    return None


def _bounds(row: Fields) -> tuple[float, float] | None:
    """The scale of a key, where the row has its configuration."""
    config = mapping(row.get("feedback_config"))
    ends = config.get("min"), config.get("max")
    if config.get("type") == "categorical" and isinstance(config.get("categories"), list):
        values = [mapping(one).get("value") for one in config["categories"]]
        numbers = [one for one in values if isinstance(one, int | float)]
        ends = (min(numbers), max(numbers)) if numbers else (None, None)
    low, high = ends
    known = isinstance(low, int | float) and isinstance(high, int | float) and low < high
    return (float(low), float(high)) if known else None  # type: ignore[arg-type]


_NO_ANSWER = (
    "app_path", "dotted_order", "parent_run_id", "parent_run_ids", "child_run_ids", "status",
    "manifest_id", "first_token_time", "last_queued_at", "is_root", "tenant_id",
    "feedback_group_id", "comparative_experiment_id",
)  # fmt: skip
"""Fields that say nothing of an answer."""

LANGSMITH = LogFormat(
    shapes=(
        ("id", "run_type", "start_time"),
        ("id", "key", "run_id"),
        ("id", "key", "session_id"),
    ),
    read=read,
    parts=parts,
    optional=(
        "inputs", "outputs", "extra", "tags", "trace_id", "name", "error", "end_time",
        "session_name", "prompt_tokens", "completion_tokens", "total_tokens", "score", "value",
        "comment", "correction", "feedback_source", "feedback_config", "created_at",
        "modified_at", "child_runs", *_NO_ANSWER,
    ),
)  # fmt: skip
