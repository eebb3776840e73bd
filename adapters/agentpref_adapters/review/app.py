"""The web app: who asks, the question at hand, and what is done with a click.

A token opens a session; it is a cookie that only this page sends (``SameSite=Strict``), and each
form carries a second secret that is made of it, so that no other page can answer in somebody's
name. The policy for content allows no script but the page's own file, and no request elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Container, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from agentpref.errors import (
    AgentprefError,
    GenerationConflict,
    MissingDependency,
    RecordError,
    ServingError,
    UnknownRun,
    UpdateError,
)

try:
    import markdown_it  # noqa: F401
    import nh3  # noqa: F401
    from anyio import to_thread
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, RedirectResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles
except ImportError as error:
    raise MissingDependency(
        f"the review page needs {error.name}; install it with: pip install 'agentpref[review]'"
    ) from error

from agentpref.elicitation import Question
from agentpref_adapters.review.desk import Desk, Desks
from agentpref_adapters.review.office import Office
from agentpref_adapters.review.shown import (
    LONGEST,
    difference,
    html_of,
    plain_of,
    turn_of,
    without_controls,
)

COOKIE = "agentpref_review"
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
POLICY_OF_REPORTS = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""A report is one file with its styles in it, and has nothing that could run."""

_MOST_BYTES = 400_000  # of a form: two corrections of 20,000 characters, written as %F0%9F…
_TOO_LONG = "too long"
_CHOICES = ("a", "b", "tie", "bad", "skip", "correct-a", "correct-b")
_NOTES = {
    "late": "That question was answered already; this is the next one.",
    "empty": "A correction has to say something; nothing was logged.",
    "done": "Done.",
}
_FOLDER = Path(__file__).parent


def create_app(
    desks: Desks,
    tokens: Mapping[str, str],
    *,
    office: Office | None = None,
    owners: Container[str] = (),
) -> Starlette:
    """The page of a namespace, as an ASGI app.

    Args:
        desks: where the questions are; closing them stays with the caller.
        tokens: the name of the annotator that each token opens a session for.
        office: what the owners' pages show; there are none without it.
        owners: the names of those who may see them, and change what serves.
    """
    page = _Page(desks, tokens, office, owners)
    return Starlette(
        routes=[
            Route("/runs", page.runs),
            Route("/runs/{name:path}", page.run),
            Route("/updates", page.updates),
            Route("/updates/{name:path}", page.update),
            Route("/revisions", page.revisions, methods=["GET"]),
            Route("/revisions", page.ask, methods=["POST"]),
            Route("/revisions/do", page.act, methods=["POST"]),
            Route("/people", page.people),
            Route("/", page.show),
            Route("/login", page.login),
            Route("/answer", page.answer, methods=["POST"]),
            Route("/undo", page.undo, methods=["POST"]),
            Mount("/static", StaticFiles(directory=_FOLDER / "static")),
        ],
        middleware=[Middleware(_Guarded)],
        exception_handlers={AgentprefError: _told},
    )


class _Page:
    """The endpoints."""

    def __init__(
        self,
        desks: Desks,
        tokens: Mapping[str, str],
        office: Office | None,
        owners: Container[str],
    ) -> None:
        self._desks, self._tokens, self._office, self._owners = desks, tokens, office, owners
        self._templates = Environment(
            loader=FileSystemLoader(_FOLDER / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters["moment"] = _moment

    async def login(self, request: Request) -> Response:
        """Open a session for who has a token."""
        token = request.query_params.get("token", "")
        if self._person(token) is None:
            return self._stranger()
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", path="/")
        return answer

    async def show(self, request: Request) -> Response:
        """Show the question at hand."""
        token, person = self._session(request)
        if person is None:
            return self._stranger()
        note = _NOTES.get(request.query_params.get("note", ""), "")
        values = await to_thread.run_sync(self._desks.at, person, _values)
        return self._render(
            "review.html", **values, person=person, secret=_secret(token), note=note,
            is_owner=self._office is not None and person in self._owners,
            whom=self._desks.gold or "somebody else", namespace=self._desks.namespace,
        )  # fmt: skip

    async def answer(self, request: Request) -> Response:
        """Log an answer, and go on to the next question once it is on disk."""
        form, person = await self._form(request)
        if person is None:
            return self._stranger(form)
        choice, question = form.get("choice", ""), form.get("question", "")
        if choice not in _CHOICES:
            return HTMLResponse(f"choice is none of {', '.join(_CHOICES)}", 400)
        comment = form.get("comment", "").strip() or None
        correction = without_controls(form.get(choice, "")).strip()
        if len(correction) > LONGEST:
            return self._stranger({_TOO_LONG: _TOO_LONG})
        if choice.startswith("correct") and not correction:
            return RedirectResponse("/?note=empty", 303)
        known: Any = choice
        done = await to_thread.run_sync(
            self._desks.at, person, lambda desk: desk.answer(question, known, comment, correction)
        )
        return RedirectResponse("/" if done else "/?note=late", 303)

    async def undo(self, request: Request) -> Response:
        """Take back the last answer."""
        form, person = await self._form(request)
        if person is None:
            return self._stranger(form)
        await to_thread.run_sync(self._desks.at, person, Desk.undo)
        return RedirectResponse("/", 303)

    async def runs(self, request: Request) -> Response:
        """The runs that a search finds."""
        asked = dict(request.query_params)
        return await self._shown(request, "runs.html", lambda office: office.runs(asked))

    async def run(self, request: Request) -> Response:
        """One run, with its conversation."""
        name = request.path_params["name"]
        return await self._shown(request, "run.html", lambda office: office.run(name))

    async def updates(self, request: Request) -> Response:
        """The updates."""
        return await self._shown(request, "updates.html", Office.updates)

    async def update(self, request: Request) -> Response:
        """The report of an update: a page of its own, with plots and without a script."""
        _, person = self._session(request)
        if self._office is None or person not in self._owners:
            return self._stranger()
        made = await to_thread.run_sync(self._office.report, request.path_params["name"])
        return HTMLResponse(made, headers={"content-security-policy": POLICY_OF_REPORTS})

    async def revisions(self, request: Request) -> Response:
        """The revisions, and what may be done with them."""
        return await self._shown(request, "revisions.html", Office.revisions)

    async def ask(self, request: Request) -> Response:
        """Say what a click would do, and ask whether to."""
        form, person = await self._form(request)
        return await self._shown(
            request, "confirm.html", lambda office: office.ask(form), person=person
        )

    async def act(self, request: Request) -> Response:
        """Change what serves, as it was confirmed."""
        form, person = await self._form(request)
        if self._office is None or person not in self._owners:
            return self._stranger(form)
        await to_thread.run_sync(self._office.act, form)
        return RedirectResponse("/revisions?note=done", 303)

    async def people(self, request: Request) -> Response:
        """What the annotators did."""
        return await self._shown(request, "people.html", Office.people)

    async def _shown(
        self,
        request: Request,
        template: str,
        values: Callable[[Office], Mapping[str, Any]],
        *,
        person: str | None = "",
    ) -> Response:
        """A page for owners; ``person`` is who sent a form, where it was one."""
        token, visitor = self._session(request)
        person = visitor if person == "" else person
        if self._office is None or person not in self._owners:
            return self._stranger()
        found = await to_thread.run_sync(values, self._office)
        note = _NOTES.get(request.query_params.get("note", ""), "")
        return self._render(
            template, **found, namespace=self._desks.namespace, secret=_secret(token), note=note
        )

    def _person(self, token: str) -> str | None:
        found = [
            name
            for known, name in self._tokens.items()
            if hmac.compare_digest(known.encode(), token.encode())
        ]
        return found[0] if found else None

    def _session(self, request: Request) -> tuple[str, str | None]:
        token = request.cookies.get(COOKIE, "")
        return token, self._person(token)

    async def _form(self, request: Request) -> tuple[dict[str, str], str | None]:
        """What was sent, and by whom; nobody where the form is not of this page."""
        token, person = self._session(request)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MOST_BYTES:
                return {_TOO_LONG: _TOO_LONG}, None
        read = parse_qs(body.decode(errors="replace"), keep_blank_values=True)
        form = {name: values[-1] for name, values in read.items()}
        is_ours = hmac.compare_digest(form.get("secret", "").encode(), _secret(token).encode())
        return form, person if is_ours else None

    def _stranger(self, form: Mapping[str, str] | None = None) -> Response:
        """Who has no session; or whose ``form`` was too long, or of a page of another session."""
        if form and _TOO_LONG in form:
            return HTMLResponse("<p>That is too long; nothing was logged.</p>", 413)
        return self._render("stranger.html", status=403, is_form=form is not None)

    def _render(self, name: str, status: int = 200, **values: Any) -> Response:
        return HTMLResponse(self._templates.get_template(name).render(**values), status)


def _values(desk: Desk) -> dict[str, Any]:
    """What a desk shows."""
    queue, question = desk.queue, desk.question()
    return {
        "question": None if question is None else _shown(question),
        "answered": queue.answered,
        "corrected": queue.corrected,
        "skipped": queue.skipped,
        "agreed": sum(queue.agreed),
        "repeated": len(queue.agreed),
        "can_undo": bool(desk.behind),
        "notes": [*dict.fromkeys((*queue.notes, *desk.notes))],
    }


def _shown(question: Question) -> dict[str, Any]:
    first, second = question.first.output, question.second.output
    return {
        "id": question.id,
        "tag": question.first.tag,
        "turns": [(role, Markup(html)) for role, html in map(turn_of, question.prompt)],
        "answers": [Markup(html_of(first)), Markup(html_of(second))],
        "texts": [plain_of(first)[:LONGEST], plain_of(second)[:LONGEST]],
        "difference": Markup(difference(first, second)),
    }


def _secret(token: str) -> str:
    """What the forms of a session carry."""
    return hmac.new(token.encode(), b"agentpref review form", hashlib.sha256).hexdigest()


async def _told(request: Request, error: Exception) -> Response:
    if isinstance(error, GenerationConflict):
        text = "Somebody changed what serves meanwhile; open the page of revisions again."
        return HTMLResponse(f"<p>{text}</p><p><a href='/revisions'>Revisions</a></p>", 409)
    if isinstance(error, UnknownRun | UpdateError):
        status = 404
    else:
        status = 503 if isinstance(error, RecordError | ServingError) else 409
    return HTMLResponse(f"<p>{Markup.escape(str(error))}</p><p><a href='/'>Back</a></p>", status)


def _moment(at: float) -> str:
    """A time as people read it, in the time zone of the machine."""
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


class _Guarded:
    """Puts the headers that keep browsers from doing more than the page needs on each answer."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                name = b"content-security-policy"
                is_set = name in {known for known, _ in message["headers"]}
                policy = [] if is_set else [(name, POLICY.encode())]
                message["headers"] = [
                    *message["headers"],
                    *policy,
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                    (b"cache-control", b"no-store"),
                ]
            await send(message)

        await self._app(scope, receive, guarded if scope["type"] == "http" else send)
