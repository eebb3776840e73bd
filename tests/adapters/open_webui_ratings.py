"""Ratings as Open WebUI 0.12.4 makes them, for tests.

What its page sends (``submitFeedback`` of the response's component) and its server stores is
written down here: ``data`` with the rating and, where the question had several answers, the models
of the others; ``meta`` with the ids; ``snapshot`` with the chat as ``GET /api/v1/chats/{id}`` gives
it. ``tests/open_webui`` sends the same through the code of Open WebUI itself.
"""

from __future__ import annotations

from typing import Any

CHAT = "3f6ef0a5-0d8e-4fd2-a4e2-0d0a1f6f7a10"
QUESTION = "a1d6e6b1-6a9e-4d5c-8c55-1a9b0a0a0001"
ANSWER = "b2d6e6b1-6a9e-4d5c-8c55-1a9b0a0a0002"
OTHER = "c3d6e6b1-6a9e-4d5c-8c55-1a9b0a0a0003"
ASKED = "Is the shop open on Sundays?"
SAID = "No, it is closed on Sundays."
OTHERWISE = "Well, that depends on many things."
USER = "5a7c6f4e-user"


def answer(message_id: str, text: str, **more: Any) -> dict[str, Any]:
    """An assistant's message of a chat's history."""
    return {
        "id": message_id,
        "parentId": QUESTION,
        "childrenIds": [],
        "role": "assistant",
        "content": text,
        "model": "small",
        "modelName": "small",
        "modelIdx": 0,
        "timestamp": 1_795_900_000,
        "done": True,
        **more,
    }


def chat(*answers: dict[str, Any], params: dict[str, Any] | None = None) -> dict[str, Any]:
    """A chat of one question, as ``GET /api/v1/chats/{id}`` gives it."""
    question = {
        "id": QUESTION,
        "parentId": None,
        "childrenIds": [one["id"] for one in answers],
        "role": "user",
        "content": ASKED,
        "models": ["small"],
        "timestamp": 1_795_899_990,
    }
    messages = {one["id"]: one for one in (question, *answers)}
    history = {"messages": messages, "currentId": answers[-1]["id"]}
    return {
        "id": CHAT,
        "user_id": USER,
        "title": "Sundays",
        "chat": {
            "title": "Sundays",
            "models": ["small"],
            "params": params or {},
            "history": history,
        },
        "created_at": 1_795_899_980,
        "updated_at": 1_795_900_010,
        "archived": False,
    }


def rating(
    value: Any = 1,
    *,
    of: dict[str, Any] | None = None,
    others: tuple[dict[str, Any], ...] = (),
    feedback_id: str = "f1",
    at: int = 1_795_900_020,
    snapshot: dict[str, Any] | None = None,
    **data: Any,
) -> dict[str, Any]:
    """A rating as ``GET /api/v1/evaluations/feedback/{id}`` gives it."""
    rated = of or answer(ANSWER, SAID)
    siblings = {"sibling_model_ids": [one["model"] for one in others]} if others else {}
    return {
        "id": feedback_id,
        "user_id": USER,
        "version": 0,
        "type": "rating",
        "data": {
            "rating": value,
            "model_id": rated["model"],
            "sibling_model_ids": None,
            "reason": None,
            "comment": None,
            **siblings,
            **data,
        },
        "meta": {
            "arena": False,
            "model_id": rated["model"],
            "message_id": rated["id"],
            "message_index": 2,
            "chat_id": CHAT,
            "base_models": {rated["model"]: None},
        },
        "snapshot": {"chat": chat(rated, *others) if snapshot is None else snapshot},
        "created_at": 1_795_900_020,
        "updated_at": at,
    }


def event(name: str = "feedback.created", subject: str = "f1", **more: Any) -> dict[str, Any]:
    """An event as Open WebUI gives it to a Function and posts it to a webhook."""
    return {
        "schema": "0.12.4",
        "id": "9d2f",
        "event": name,
        "resource": "feedback",
        "operation": name.split(".")[-1],
        "created_at": 1_795_900_021,
        "instance_id": "i",
        "version": "0.12.4",
        "source": "api",
        "actor": {"id": USER, "name": "Ana", "email": "ana@example.org", "role": "user"},
        "subject": {"type": "feedback", "id": subject},
        "data": {"rating": 1},
        "message": None,
        **more,
    }
