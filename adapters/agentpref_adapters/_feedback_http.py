"""Feedback over HTTP: the routes by which pages, apps and other products judge runs.

Three shapes end in the same calls of a log. ``POST /feedback`` is TensorZero's: a metric and its
value on an inference or an episode, which are a run and a trace here. ``POST /v1/comparisons`` says
which of two runs is better. ``POST`` and ``DELETE /api/public/scores`` are Langfuse's, which
LibreChat and many apps speak already: a score has an id of its own, is replaced by the next one
with that id, and withdrawn when it is deleted.

Who asks is told by a function that the app brings. A caller may be bound to a single run, as the
page of a user is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agentpref import __version__
from agentpref.errors import AgentprefError, UnknownRun
from agentpref.record.database import connect, translated
from agentpref.record.finding import find, of_trace, unknown_run
from agentpref.record.keys import registered
from agentpref.record.log import Log
from agentpref.types import RETRACTION, SOURCES, THUMBS, WINNERS
from agentpref_adapters._http import (
    BAD_REQUEST,
    CONFLICT,
    FORBIDDEN,
    NOT_FOUND,
    HttpError,
    answering,
    as_json,
    read_json,
    read_object,
)

MAX_BYTES = 1 << 20
"""The most bytes of one judgement."""

THUMB_NAMES = frozenset({THUMBS, "thumb", "user-feedback", "user_feedback"})
"""Names of scores that are thumbs: LibreChat's, and those of Langfuse's and LangSmith's guides."""

COMMENT, DEMONSTRATION = "comment", "demonstration"
"""TensorZero's reserved metrics: words, and what the answer should have been."""

_FLUSH_SECONDS = 5.0
_LONGEST_NAME = 200


@dataclass(frozen=True, slots=True)
class Caller:
    """Who judges: by which log, and if its token says so, which run only and in whose name.

    A page judges for the person before it alone: not in another's name, and not as a program.
    """

    log: Log
    run_id: str | None = None
    user_id: str | None = None
    is_page: bool = False
    is_open: Callable[[str], bool] = lambda run_id: False
    """Whether the answer of a run is still being written."""

    def by(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """In whose name, and as what, a judgement is."""
        if self.is_page:
            return {"source": "human", "user_id": self.user_id}
        return {"source": _source(body), "user_id": self.user_id or _text(body, "user_id")}


Authenticate = Callable[[Request], Awaitable[Caller]]
"""Tells who asks, or raises an ``HttpError``."""

Counted = Callable[[str], object]
"""Called with the kind of every judgement that was taken in."""


def feedback_routes(
    authenticate: Authenticate, counted: Counted = lambda kind: None
) -> list[BaseRoute]:
    """The routes, for any Starlette or FastAPI app.

    Args:
        authenticate: tells who asks.
        counted: called with ``"feedback"``, ``"comparison"``, ``"score"`` or ``"withdrawal"``.
    """

    def judging(kind: str, judge: Callable[[Caller, Mapping[str, Any]], dict[str, Any]]) -> Any:
        async def endpoint(request: Request) -> Response:
            caller = await authenticate(request)
            body = await read_object(request, limit=MAX_BYTES)
            found = await to_thread.run_sync(partial(judge, caller, body))
            counted(kind)
            return as_json(found)

        return answering(endpoint)

    async def score(request: Request) -> Response:
        caller = await authenticate(request)
        body = await read_json(request, limit=MAX_BYTES)
        status, found, kept = await to_thread.run_sync(partial(_scores, caller, body))
        for _ in range(kept):
            counted("score")
        return as_json(found, status)

    async def delete(request: Request) -> Response:
        caller = await authenticate(request)
        await to_thread.run_sync(partial(_withdraw, caller, request.path_params["score_id"]))
        counted("withdrawal")
        return Response(status_code=204)

    async def healthy(request: Request) -> Response:
        return as_json({"status": "OK", "version": __version__})

    return [
        Route("/feedback", judging("feedback", _feedback), methods=["POST"]),
        Route("/v1/comparisons", judging("comparison", _comparison), methods=["POST"]),
        Route("/api/public/scores", answering(score), methods=["POST"]),
        Route("/api/public/scores/{score_id:path}", answering(delete), methods=["DELETE"]),
        Route("/api/public/health", healthy, methods=["GET"]),
    ]


def _feedback(caller: Caller, body: Mapping[str, Any]) -> dict[str, Any]:
    """Take in TensorZero's feedback; a value of null takes back what was said before."""
    run_id, trace_id = _text(body, "inference_id"), _text(body, "episode_id")
    if (run_id is None) == (trace_id is None):
        raise _bad("give inference_id (the reply's id) or episode_id (a trace), and not both")
    run_id = _place(caller, run_id, trace_id)
    name, value = _required(body, "metric_name"), body.get("value")
    if "value" not in body:
        raise _bad("value is missing; null takes the feedback back", "value")
    by = caller.by(body)
    log = caller.log
    if body.get("dryrun"):
        return {"feedback_id": None}
    if value is None:
        key = {COMMENT: COMMENT, DEMONSTRATION: "correction"}.get(name, _key(name))
        return {"feedback_id": log.retract(run_id, key, **by)}
    if name == COMMENT:
        return {"feedback_id": log.feedback(run_id, comment=_of_text(value), **by)}
    if name == DEMONSTRATION:
        return {"feedback_id": log.correct(run_id, _demonstration(value), **by)}
    return _judged(caller, run_id, _key(name), value, comment=_text(body, "comment"), **by)


def _comparison(caller: Caller, body: Mapping[str, Any]) -> dict[str, Any]:
    runs = [_place(caller, _required(body, name), None) for name in ("run_a", "run_b")]
    winner = body.get("winner")
    if winner not in WINNERS:
        raise _bad(f"winner is one of {', '.join(WINNERS)}", "winner")
    comparison_id = caller.log.compare(
        *runs,
        winner=winner,
        comment=_text(body, "comment"),
        **caller.by(body),
    )
    return {"comparison_id": comparison_id}


def _scores(caller: Caller, body: Any) -> tuple[int, dict[str, Any], int]:
    """Take in one score, or a list of them as Langfuse's client sends it: each by itself.

    Returns the status, the answer, and how many were kept.
    """
    if not isinstance(body, list):
        if not isinstance(body, dict):
            raise _bad("the body is no score, and no list of scores")
        return 200, _score(caller, body), 1
    refusals = [_refusal(caller, one) for one in body]
    errors = [{"index": n, "message": why} for n, why in enumerate(refusals) if why is not None]
    if not errors:
        return 202, {"message": "Accepted"}, len(body)
    kept = len(body) - len(errors)
    return 207, {"accepted": kept, "rejected": len(errors), "errors": errors}, kept


def _refusal(caller: Caller, one: Any) -> str | None:
    """Take in one score of a list; why it was refused, if it was."""
    try:
        if not isinstance(one, dict):
            return "it is no object"
        _score(caller, one)
    except (HttpError, AgentprefError) as error:
        return str(error)
    return None


def _score(caller: Caller, body: Mapping[str, Any]) -> dict[str, Any]:
    """Take in a Langfuse score. Each id is a voter of its own, so the next one replaces it."""
    _refuse_page(caller)
    name, value = _required(body, "name"), body.get("value")
    run_id, trace_id = _text(body, "observationId"), _text(body, "traceId")
    if run_id is None and trace_id is None:
        raise _bad("give traceId (a run's, or the trace that it was logged with)", "traceId")
    run_id = _place(caller, run_id, trace_id)
    is_flag = body.get("dataType") == "BOOLEAN" and value in (0, 1)
    score_id = _text(body, "id") or f"{run_id}-{name}"
    about = body.get("metadata")
    given = about.get("source") if isinstance(about, Mapping) else None
    source = given if given in SOURCES else "human"  # anything may stand there
    by = {"source": source, "user_id": _voter(score_id)}
    _judged(
        caller, run_id, _key(name), bool(value) if is_flag else value,
        comment=_text(body, "comment"), **by,
    )  # fmt: skip
    for place, key, by_whom in _kept_scores(caller.log, score_id):
        if (place, key) != (run_id, _key(name)):  # it was of another run, or had another name
            caller.log.retract(place, key, source=by_whom, user_id=by["user_id"])
    return {"id": score_id}


def _withdraw(caller: Caller, score_id: str) -> None:
    """Take back the score of an id; 404 for one that is unknown."""
    _refuse_page(caller)
    found = _kept_scores(caller.log, score_id)
    if not found:
        raise HttpError(NOT_FOUND, f"no score {score_id!r} is known here", code="unknown_score")
    for run_id, key, source in found:
        caller.log.retract(run_id, key, source=source, user_id=_voter(score_id))


def _kept_scores(log: Log, score_id: str) -> list[tuple[str, str, Any]]:
    """What was said under a score's id and not taken back: run, key and source."""
    with translated(log.home), closing(connect(log.home, readonly=True)) as connection:
        rows = connection.execute(  # CROSS JOIN: few rows are the voter's, and many runs there
            """SELECT run_id, key, source, value FROM feedback CROSS JOIN run USING (run_id)
                WHERE feedback.user_id = ? AND namespace = ?
                ORDER BY feedback.created_at, feedback.rowid""",
            (registered(connection).name(_voter(score_id)), log.namespace),
        ).fetchall()
    found: dict[tuple[str, str], Any] = {}
    for run_id, key, source, value in rows:
        if key == RETRACTION:
            found.pop((run_id, orjson.loads(value)["key"]), None)
        else:
            found[run_id, key] = source
    return [(run_id, key, source) for (run_id, key), source in found.items()]


def _judged(
    caller: Caller, run_id: str, key: str, value: Any, *, comment: str | None, **by: Any
) -> dict[str, Any]:
    """Record a number or a bool as a score, and anything else as a value."""
    is_number = isinstance(value, bool | int | float) and math.isfinite(value)
    if key == THUMBS and not is_number:
        raise _bad("a thumb is true or false, 1 or 0; null takes it back", "value")
    if is_number:
        score: Any = bool(value) if key == THUMBS and value in (0, 1) else value
        named = {"score": score}
    else:
        named = {"value": value}
    feedback_id = caller.log.feedback(run_id, key=key, comment=comment, **named, **by)
    return {"feedback_id": feedback_id}


def _place(caller: Caller, run_id: str | None, trace_id: str | None) -> str:
    """The run that is meant, in this namespace; a trace is its last answer.

    Raises:
        HttpError: 403 for a run of another namespace, or another one than the token's.
        UnknownRun: there is none.
    """
    if not all(name.isprintable() for name in (run_id, trace_id) if name):
        raise _bad("ids are printable text")
    log = caller.log

    def look() -> str:
        with translated(log.home), closing(connect(log.home, readonly=True)) as connection:
            names = [run_id] if run_id is not None else []
            if trace_id is not None:  # apps name a run so, too
                names += [of_trace(log.namespace, trace_id), trace_id]
            for name in names[:-1]:
                with suppress(UnknownRun):
                    return find(connection, name, math.inf)
            return find(connection, names[-1], math.inf)

    try:
        found = look()
    except UnknownRun:
        if run_id is not None and caller.is_open(run_id):
            raise HttpError(
                CONFLICT,
                "the answer is still being written; judge it once it has ended",
                code="answer_not_ended",
                headers={"Retry-After": "1"},
            ) from None
        if not log.flush(_FLUSH_SECONDS):
            raise
        found = look()  # it was recorded a moment ago
    _require_own(caller, found)
    return found


def _require_own(caller: Caller, run_id: str) -> None:
    if caller.run_id not in (None, run_id):
        raise HttpError(FORBIDDEN, "this token is for another run", code="wrong_run")
    log = caller.log
    with translated(log.home), closing(connect(log.home, readonly=True)) as connection:
        query = "SELECT namespace FROM run WHERE run_id = ?"
        (namespace,) = connection.execute(query, (run_id,)).fetchone()
    if namespace != log.namespace:
        raise unknown_run(run_id)  # as if it was not there: that is for the other app to know


def _refuse_page(caller: Caller) -> None:
    """Scores have ids, and whoever knows one may change it: that is between servers."""
    if caller.is_page:
        raise HttpError(FORBIDDEN, "pages judge by POST /feedback", code="not_for_pages")


def _key(name: str) -> str:
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise _bad(f"the name of a metric is printable text of {_LONGEST_NAME} characters at most")
    return THUMBS if name in THUMB_NAMES else name


def _voter(score_id: str) -> str:
    """The voter whom a score of this id belongs to."""
    return f"score {hashlib.sha256(score_id.encode()).hexdigest()[:32]}"


def _source(body: Mapping[str, Any]) -> Any:
    source = body.get("source", "human")
    if source not in SOURCES:
        raise _bad(f"source is one of {', '.join(SOURCES)}", "source")
    return source


def _demonstration(value: Any) -> Any:
    """What an answer should have been: text, an assistant's message, or blocks of text."""
    if isinstance(value, list):
        texts = [block.get("text") for block in value if isinstance(block, Mapping)]
        known = [text for text in texts if isinstance(text, str)]
        if len(known) == len(value):
            return "".join(known)
        raise _bad("a demonstration is a text, a message, or a list of blocks of text", "value")
    return value


def _of_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _bad("a comment is a text", "value")
    return value


def _required(body: Mapping[str, Any], name: str) -> str:
    if (text := _text(body, name)) is None:
        raise _bad(f"{name} is missing", name)
    return text


def _text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise _bad(f"{name} is a text", name)
    return value or None


def _bad(message: str, param: str | None = None) -> HttpError:
    return HttpError(BAD_REQUEST, message, param=param, code="bad_feedback")
