"""Feedback over HTTP: three shapes, by keys and by tokens, and what is refused."""

from __future__ import annotations

import hashlib
import time

import httpx
import langfuse.api as langfuse
import langfuse.api.scores as langfuse_scores
import pytest

from agentpref_adapters.gateway import Keys

ASK = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def ask(url):
    def ask(**more):
        headers = more.pop("headers", {})
        answer = httpx.post(f"{url}/v1/chat/completions", json={**ASK, **more}, headers=headers)
        return answer.json()["id"]

    return ask


@pytest.fixture
def post(url):
    def post(path, body, status=200, **more):
        answer = httpx.post(f"{url}{path}", json=body, **more)
        assert answer.status_code == status, answer.text
        return answer.json()

    return post


@pytest.fixture
def said(home):
    def said(namespace="default"):
        return [*home.feedback(namespace=namespace)]

    return said


def test_tensorzero_feedback_is_a_thumb_a_score_a_comment_or_a_correction(ask, post, said):
    run = ask()
    for metric, value in (
        ("thumbs", False), ("stars", 4), ("comment", "too long"), ("demonstration", "hi"),
        ("demonstration", [{"type": "text", "text": "hey"}]),
    ):  # fmt: skip
        body = {"inference_id": run, "metric_name": metric, "value": value}
        assert post("/feedback", body)["feedback_id"]
    thumb, stars, comment, first, second = said()
    assert (thumb.key, thumb.score, thumb.source) == ("thumbs", 0.0, "human")
    assert (stars.key, stars.score) == ("stars", 4.0)
    assert (comment.key, comment.comment) == ("comment", "too long")
    assert [one.correction["content"] for one in (first, second)] == ["hi", "hey"]
    assert {one.run_id for one in said()} == {run}


def test_an_episode_is_a_trace_and_null_takes_back(ask, post, said):
    run = ask(metadata={"trace_id": "task-1"})
    by_trace = {"episode_id": "task-1", "metric_name": "thumbs", "user_id": "ana"}
    post("/feedback", {**by_trace, "value": True})
    post("/feedback", {**by_trace, "value": None})
    thumb, back = said()
    assert (thumb.run_id, back.run_id) == (run, run)
    assert (back.key, back.value, back.user_id) == ("retraction", {"key": "thumbs"}, thumb.user_id)


def test_a_thumb_twice_keeps_both_and_the_last_counts(ask, post, said, home):
    run = ask()
    for value in (True, False):
        post("/feedback", {"inference_id": run, "metric_name": "thumbs", "value": value})
    assert [one.score for one in said()] == [1.0, 0.0]


def test_a_comparison_names_two_answers_to_one_prompt(ask, post, home):
    a, b = ask(), ask()
    found = post("/v1/comparisons", {"run_a": a, "run_b": b, "winner": "b", "comment": "shorter"})
    (one,) = home.comparisons()
    assert (one.comparison_id, one.run_a, one.run_b, one.winner) == (
        found["comparison_id"], a, b, "b",
    )  # fmt: skip


def test_librechats_thumb_is_recorded_replaced_and_withdrawn(ask, post, url, said):
    message = "5f1c9e0a-6d64-4a3b-9d5e-6a9a2b7f0c11"
    run = ask(headers={"X-LibreChat-Message-Id": message, "X-LibreChat-Conversation-Id": "c-1"})
    score = {
        "id": f"feedback-{message}",
        "traceId": hashlib.sha256(message.encode()).hexdigest()[:32],
        "name": "user-feedback",
        "dataType": "BOOLEAN",
        "metadata": {"messageId": message, "conversationId": "c-1"},
    }
    keys = ("pk-any", "sk-any")
    assert httpx.get(f"{url}/api/public/health").json()["status"] == "OK"
    post("/api/public/scores", {**score, "value": 1, "comment": "helpful: yes"}, auth=keys)
    post("/api/public/scores", {**score, "value": 0}, auth=keys)
    gone = httpx.delete(f"{url}/api/public/scores/{score['id']}", auth=keys)
    assert gone.status_code == 204
    up, down, back = said()
    assert {up.run_id, down.run_id, back.run_id} == {run}
    assert (up.key, up.score, up.comment, down.score) == ("thumbs", 1.0, "helpful: yes", 0.0)
    assert up.user_id == down.user_id == back.user_id
    assert back.value == {"key": "thumbs"}
    assert httpx.delete(f"{url}/api/public/scores/never-was").status_code == 404


def test_the_langfuse_client_itself_can_score_a_run(ask, url, said):
    run = ask()
    session = httpx.Client()
    client = langfuse.LangfuseAPI(
        base_url=url, username="pk", password="sk", httpx_client=session,
    )  # fmt: skip
    score = langfuse_scores.CreateScoreRequest
    rows = [
        score(id="s1", trace_id=run, name="helpfulness", value=0.5, comment="so so"),
        score(id="s2", trace_id="nobody", name="helpfulness", value=1),
    ]
    assert client.scores.create(request=rows[:1]).message == "Accepted"
    mixed = client.scores.create(request=rows)
    assert (mixed.accepted, mixed.rejected) == (1, 1)
    assert "nobody" in mixed.errors[0].message
    first, again = said()
    assert (first.run_id, first.key, first.score, first.comment) == (
        run, "helpfulness", 0.5, "so so",
    )  # fmt: skip
    assert first.user_id == again.user_id
    client.scores.delete("s1")
    assert [one.key for one in said()] == ["helpfulness", "helpfulness", "retraction"]
    session.close()


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/feedback", {"metric_name": "thumbs", "value": True}, 400, "inference_id"),
        ("/feedback", {"inference_id": "RUN", "value": True}, 400, "metric_name is missing"),
        ("/feedback", {"inference_id": "RUN", "metric_name": "thumbs"}, 400, "value is missing"),
        ("/feedback", {"inference_id": "nobody", "metric_name": "thumbs", "value": 1}, 404, "run"),
        ("/feedback", {"episode_id": "nobody", "metric_name": "thumbs", "value": 1}, 404, "run"),
        ("/feedback", {"inference_id": "RUN", "metric_name": "thumbs", "value": 5}, 400, "thumb"),
        ("/feedback", {"inference_id": "RUN", "metric_name": "comment", "value": 5}, 400, "text"),
        (
            "/feedback",
            {"inference_id": "RUN", "metric_name": "demonstration", "value": [3]},
            400,
            "demonstration",
        ),
        ("/feedback", {"inference_id": 7, "metric_name": "thumbs", "value": 1}, 400, "text"),
        ("/v1/comparisons", {"run_a": "RUN", "run_b": "RUN", "winner": "a"}, 400, "itself"),
        ("/v1/comparisons", {"run_a": "RUN", "run_b": "x", "winner": "z"}, 404, "run"),
        ("/api/public/scores", {"name": "x", "value": 1}, 400, "traceId"),
        ("/api/public/scores", {"traceId": "RUN", "value": 1}, 400, "name is missing"),
    ],
)
def test_bad_feedback_is_refused_by_name_and_leaves_no_row(
    ask, post, said, path, body, status, message
):
    run = ask()
    body = {key: run if value == "RUN" else value for key, value in body.items()}
    assert message in post(path, body, status)["error"]["message"]
    assert said() == []


def test_a_key_speaks_for_its_namespace_and_knows_nothing_of_others(start, home, runs):
    keys = Keys(home)
    shop, bank = keys.add("shop", "shop"), keys.add("bank", "bank")
    url = start()

    def bearer(key):
        return {"Authorization": f"Bearer {key}"}

    answer = httpx.post(f"{url}/v1/chat/completions", json=ASK, headers=bearer(shop))
    run = answer.json()["id"]
    assert [one.run_id for one in runs("shop")] == [run]
    thumb = {"inference_id": run, "metric_name": "thumbs", "value": True}
    for headers, status in (
        ({}, 401),
        (bearer("apk-shop-" + "x" * 43), 401),
        (bearer("sk-other"), 401),
        ({"Authorization": "Basic !!"}, 401),
        (bearer(bank), 404),
        ({"x-api-key": shop}, 200),
    ):
        assert httpx.post(f"{url}/feedback", json=thumb, headers=headers).status_code == status
    keys.remove("shop")
    assert httpx.post(f"{url}/feedback", json=thumb, headers=bearer(shop)).status_code == 401
    assert shop.rpartition("-")[2] not in keys.path.read_text()
    assert keys.path.stat().st_mode & 0o077 == 0


def test_a_page_judges_one_run_by_a_token_until_it_expires(start, home, said):
    page = "https://shop.example"
    url = start(origins=(page,), token_seconds=1)
    first, second = (
        httpx.post(f"{url}/v1/chat/completions", json=ASK).json()["id"] for _ in range(2)
    )
    made = httpx.post(f"{url}/v1/feedback_tokens", json={"run_id": first, "user_id": "ana"}).json()
    headers = {"Authorization": f"Bearer {made['token']}", "Origin": page}
    asked_first = httpx.options(
        f"{url}/feedback",
        headers={"Origin": page, "Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization,content-type"},
    )  # fmt: skip
    assert asked_first.headers["access-control-allow-origin"] == page

    def thumb(run, value=True, headers=headers):
        body = {"inference_id": run, "metric_name": "thumbs", "value": value}
        return httpx.post(f"{url}/feedback", json=body, headers=headers)

    assert thumb(first).status_code == 200
    assert thumb(first, False).status_code == 200, "people change their minds"
    assert thumb(second).status_code == 403
    wrong = {**headers, "Authorization": headers["Authorization"][:-3] + "abc"}
    assert thumb(first, headers=wrong).status_code == 401
    time.sleep(2.1)
    late = thumb(first)
    assert (late.status_code, late.json()["error"]["code"]) == (401, "token_expired")
    assert [(one.run_id, one.score) for one in said()] == [(first, 1.0), (first, 0.0)]
    assert said()[0].user_id == said()[1].user_id is not None


def test_a_page_that_was_not_allowed_may_not_ask(url, ask, said):
    run = ask()
    thumb = {"inference_id": run, "metric_name": "thumbs", "value": True}
    answer = httpx.post(f"{url}/feedback", json=thumb, headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    assert said() == []


def test_too_much_feedback_by_tokens_is_told_to_wait(start):
    url = start(token_rate="2/minute")
    run = httpx.post(f"{url}/v1/chat/completions", json=ASK).json()["id"]
    token = httpx.post(f"{url}/v1/feedback_tokens", json={"run_id": run}).json()["token"]
    thumb = {"inference_id": run, "metric_name": "thumbs", "value": True}
    headers = {"Authorization": f"Bearer {token}"}
    found = [httpx.post(f"{url}/feedback", json=thumb, headers=headers) for _ in range(3)]
    assert [one.status_code for one in found] == [200, 200, 429]
    assert found[-1].headers["retry-after"]


def test_the_last_key_that_is_removed_opens_nothing(start, home):
    keys = Keys(home)
    key = keys.add("only")
    url = start()
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx.post(f"{url}/v1/chat/completions", json=ASK, headers=headers).is_success
    keys.remove("only")
    for given in ({}, headers):
        answer = httpx.post(f"{url}/v1/chat/completions", json=ASK, headers=given)
        assert answer.status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example:8100", "rebound.test", "a.b.c.", "evil:8100", "evil.local", "x.internal"]
)
def test_without_keys_a_name_that_a_page_can_point_here_is_refused(url, host):
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models")):
        answer = httpx.request(method, f"{url}{path}", json=ASK, headers={"Host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
    for own in ("localhost:8100", "127.0.0.1", "[::1]:8100", "x.localhost"):
        assert httpx.get(f"{url}/v1/models", headers={"Host": own}).is_success


def test_a_page_votes_in_its_own_name_only(start, said):
    url = start()
    run = httpx.post(f"{url}/v1/chat/completions", json=ASK).json()["id"]
    token = httpx.post(f"{url}/v1/feedback_tokens", json={"run_id": run, "user_id": "ana"}).json()
    headers = {"Authorization": f"Bearer {token['token']}"}
    for name in ("bob", "eve"):
        thumb = {"inference_id": run, "metric_name": "thumbs", "value": True, "user_id": name,
                 "source": "code"}  # fmt: skip
        assert httpx.post(f"{url}/feedback", json=thumb, headers=headers).is_success
    score = {"traceId": run, "name": "user-feedback", "value": 1}
    refused = httpx.post(f"{url}/api/public/scores", json=score, headers=headers)
    assert refused.status_code == 403
    assert len({one.user_id for one in said()}) == 1
    assert {one.source for one in said()} == {"human"}


def test_an_observations_score_with_an_unknown_observation_judges_its_trace(ask, post, said):
    run = ask(metadata={"trace_id": "t-9"})
    body = {"traceId": "t-9", "observationId": "o-1", "name": "thumbs", "value": 1, "comment": "",
            "metadata": {"source": "web"}}  # fmt: skip
    post("/api/public/scores", body)
    assert [(one.run_id, one.source) for one in said()] == [(run, "human")]


@pytest.mark.parametrize("value", ["down", "true", "", [1], {"a": 1}])
def test_a_thumb_that_is_no_thumb_is_refused_and_the_one_before_still_counts(
    ask, post, said, value
):
    run = ask()
    post("/feedback", {"inference_id": run, "metric_name": "thumbs", "value": True})
    wrong = {"inference_id": run, "metric_name": "thumbs", "value": value}
    assert "true or false" in post("/feedback", wrong, status=400)["error"]["message"]
    score = {"traceId": run, "name": "user-feedback", "value": value, "dataType": "CATEGORICAL"}
    assert "true or false" in post("/api/public/scores", score, status=400)["error"]["message"]
    assert [one.score for one in said()] == [1.0]


@pytest.mark.parametrize("moves_to", ["another run", "another name"])
def test_a_score_that_moves_takes_its_old_thumb_along(ask, post, url, said, moves_to):
    first, second = ask(), ask()
    score = {"id": "s/2", "traceId": first, "name": "user-feedback", "value": 1}
    post("/api/public/scores", score)
    moved = {"traceId": second} if moves_to == "another run" else {"name": "quality"}
    post("/api/public/scores", {**score, **moved, "value": 0})
    up, down, back = said()
    assert (up.run_id, back.run_id, back.value) == (first, first, {"key": "thumbs"})
    assert (down.run_id, down.key) == (moved.get("traceId", first), moved.get("name", "thumbs"))
    assert httpx.delete(f"{url}/api/public/scores/s/2").status_code == 204
    *_, last = said()
    assert (last.run_id, last.value) == (down.run_id, {"key": down.key})
    assert httpx.delete(f"{url}/api/public/scores/s/2").status_code == 404


def test_a_score_that_is_refused_leaves_its_old_thumb(ask, post, said):
    first, second = ask(), ask()
    score = {"id": "s3", "traceId": first, "name": "user-feedback", "value": 1}
    post("/api/public/scores", score)
    post("/api/public/scores", {**score, "traceId": second, "value": "up"}, status=400)
    assert [(one.run_id, one.score) for one in said()] == [(first, 1.0)]


def test_a_thumb_on_an_answer_that_is_being_written_is_told_to_wait(url, upstream, post):
    body = {"messages": [{"role": "user", "content": "slow one"}], "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        thumb = {"inference_id": answer.headers["x-agentpref-run-id"], "metric_name": "thumbs",
                 "value": True}  # fmt: skip
        early = httpx.post(f"{url}/feedback", json=thumb)
        assert (early.status_code, early.headers["retry-after"]) == (409, "1")
        assert early.json()["error"]["code"] == "answer_not_ended"
        upstream.go_on.set()
        answer.read()
    assert post("/feedback", thumb)["feedback_id"]


def test_scores_of_a_list_are_counted_as_they_were_taken(ask, url, post):
    run = ask()
    good = {"traceId": run, "name": "user-feedback", "value": 1}
    found = post("/api/public/scores", [good, {**good, "value": "up"}, 3], status=207)
    assert (found["accepted"], found["rejected"]) == (1, 2)
    assert 'agentpref_judgements_total{kind="score"} 1.0' in httpx.get(f"{url}/metrics").text


def test_a_name_without_end_is_refused(ask, post):
    wrong = {"inference_id": ask(), "metric_name": "x" * 201, "value": 1}
    assert "200 characters at most" in post("/feedback", wrong, status=400)["error"]["message"]
