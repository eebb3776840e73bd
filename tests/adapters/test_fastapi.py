"""The feedback routes inside an app of FastAPI."""

from __future__ import annotations

import fastapi
import pytest
from fastapi.testclient import TestClient

import agentpref
from agentpref_adapters.fastapi import HttpError, feedback_router

ASK = [{"role": "user", "content": "hello"}]


@pytest.fixture
def log(tmp_path):
    with agentpref.Log(tmp_path / "home") as log:
        yield log


def test_a_page_of_the_app_judges_its_runs_in_the_name_of_its_user(log):
    async def user(request):
        if "session" not in request.cookies:
            raise HttpError(401, "sign in first")
        return request.cookies["session"]

    app = fastapi.FastAPI()
    app.include_router(feedback_router(log, user=user))
    run = log.record(ASK, "hi")
    thumb = {"inference_id": run, "metric_name": "thumbs", "value": True}
    with TestClient(app) as client:
        refused = client.post("/feedback", json=thumb)
        assert (refused.status_code, refused.json()["error"]["message"]) == (401, "sign in first")
        client.cookies.set("session", "ana")
        assert client.post("/feedback", json=thumb).json()["feedback_id"]
        assert client.post("/feedback", json={**thumb, "value": None}).status_code == 200
        unknown = client.post("/feedback", json={**thumb, "inference_id": "nobody"})
        assert unknown.status_code == 404
    given, back = log.home.feedback()
    assert (given.run_id, given.score, back.key) == (run, 1.0, "retraction")
    assert given.user_id == back.user_id is not None


def test_without_a_user_it_takes_what_comes(log):
    app = fastapi.FastAPI()
    app.include_router(feedback_router(log), prefix="/ours")
    run = log.record(ASK, "hi")
    thumb = {"inference_id": run, "metric_name": "thumbs", "value": False}
    with TestClient(app) as client:
        assert client.post("/ours/feedback", json=thumb).status_code == 200
        assert client.get("/ours/api/public/health").json()["status"] == "OK"
    assert [one.score for one in log.home.feedback()] == [0.0]
