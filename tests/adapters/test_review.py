"""The review page: who may answer, what is shown of what was logged, and what a click writes."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from agentpref.elicitation import Queue, open_queue
from agentpref.home import Home
from agentpref.record.log import Log
from agentpref_adapters.review import Desks, create_app
from agentpref_adapters.review.shown import LONGEST, difference, html_of

TOKENS = {"token-of-ana": "ana", "token-of-ben": "ben"}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    with Log(tmp_path / "home") as log:
        for number in range(30):
            asked = [{"role": "user", "content": f"What about {number}?"}]
            for text in (f"Just {number}.", f"Well, *a long* story about {number}."):
                log.record(asked, text, revision="rev-000007-aaaaaaaaaaaa", tags=["chat"])
    return Home.open(tmp_path / "home")


@pytest.fixture
def desks(home: Home) -> Iterator[Desks]:
    with Desks(home) as desks:
        yield desks


@pytest.fixture
def ana(desks: Desks) -> Iterator[TestClient]:
    yield from logged_in(desks, "token-of-ana")


def logged_in(desks: Desks, token: str) -> Iterator[TestClient]:
    with TestClient(create_app(desks, TOKENS), base_url="http://page") as client:
        assert client.get(f"/login?token={token}").status_code == 200
        yield client


def shown(client: TestClient) -> dict[str, str]:
    """The hidden fields of the page's form."""
    return dict(re.findall(r'name="(secret|question)" value="([^"]*)"', client.get("/").text))


def answer(client: TestClient, choice: str, **more: str) -> Any:
    return client.post("/answer", data={**shown(client), "choice": choice, **more})


def test_a_stranger_sees_nothing(desks: Desks) -> None:
    with TestClient(create_app(desks, TOKENS), base_url="http://page") as client:
        for page in (client.get("/"), client.get("/login?token=guess"), client.get("/login")):
            assert page.status_code == 403
            assert "What about" not in page.text
        assert client.post("/answer", data={"choice": "a"}).status_code == 403


def test_a_session_is_a_cookie_that_no_other_page_sends(desks: Desks) -> None:
    with TestClient(create_app(desks, TOKENS), base_url="http://page") as client:
        sent = client.get("/login?token=token-of-ana", follow_redirects=False)
    assert sent.status_code == 303
    cookie = sent.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie


def test_the_next_questions_are_chosen_while_the_last_ones_are_answered(
    desks: Desks, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[tuple[str, list[str]]] = []
    real = Queue.next

    def noted(self: Queue, count: int, besides: Any = ()) -> Any:
        found = real(self, count, besides)
        chosen.append((threading.current_thread().name, [one.id for one in found]))
        return found

    monkeypatch.setattr(Queue, "next", noted)
    seen = []
    while (question := desks.at("ana", lambda desk: desk.question())) is not None:
        seen.append(question.id)
        desks.at("ana", lambda desk: desk.answer(question.id, "a", None))
        if len(seen) == 11:
            assert desks.at("ana", lambda desk: len(desk.ahead)) == 9
            assert len(chosen) == 1 or len(chosen[1][1]) == 10
    assert len(seen) == len({*seen}) == 30
    assert all(thread.startswith("next-ana") for thread, _ in chosen)
    assert [len(ids) for _, ids in chosen] == [20, 10, 0, 0]


def test_what_was_answered_elsewhere_meanwhile_is_not_asked(home: Home, desks: Desks) -> None:
    first = desks.at("ana", lambda desk: desk.question())
    assert first is not None
    ahead = desks.at("ana", lambda desk: [*desk.ahead])
    with open_queue(home, person="ana") as elsewhere:
        elsewhere.answer(first, "a")
        elsewhere.skip(ahead[1])
    question = desks.at("ana", lambda desk: desk.question())
    assert question is not None
    assert question.id == ahead[2].id


def test_an_answer_is_logged_before_the_next_pair_shows(home: Home, ana: TestClient) -> None:
    first = shown(ana)
    page = answer(ana, "b", comment=" it is longer ")
    (row,) = home.comparisons()
    assert (row.winner, row.comment, row.source) == ("b", "it is longer", "human")
    assert page.status_code == 200
    assert "1 answered" in page.text
    assert shown(ana)["question"] != first["question"]


def test_ties_both_bad_and_skips_are_what_they_say(home: Home, ana: TestClient) -> None:
    for choice in ("tie", "bad", "skip"):
        answer(ana, choice)
    assert [row.winner for row in home.comparisons()] == ["tie", "tie"]
    assert sum(row.key == "thumbs" for row in home.feedback()) == 2
    assert "2 answered, 1 skipped" in ana.get("/").text


def test_a_form_that_is_sent_twice_counts_once(home: Home, ana: TestClient) -> None:
    form = {**shown(ana), "choice": "a"}
    ana.post("/answer", data=form)
    again = ana.post("/answer", data=form)
    assert "was answered already" in again.text
    assert len([*home.comparisons()]) == 1


def test_an_answer_can_be_undone(home: Home, ana: TestClient) -> None:
    before = shown(ana)
    answer(ana, "bad")
    ana.post("/undo", data=shown(ana))
    assert shown(ana)["question"] == before["question"]
    assert [*home.pairs()] == []
    assert "Undo" not in ana.get("/").text


def test_a_form_of_another_page_is_refused(home: Home, ana: TestClient) -> None:
    form = {**shown(ana), "choice": "a"}
    assert ana.post("/answer", data={**form, "secret": "guess"}).status_code == 403
    assert ana.post("/undo", data={"secret": ""}).status_code == 403
    assert ana.post("/answer", data={**form, "comment": "x" * 500_000}).status_code == 413
    assert ana.post("/answer", data={**form, "choice": "c"}).status_code == 400
    assert [*home.comparisons()] == []


def test_two_people_answer_at_once_each_in_their_own_name(
    home: Home, desks: Desks, ana: TestClient
) -> None:
    for ben in logged_in(desks, "token-of-ben"):
        with ThreadPoolExecutor(2) as pool:
            for _ in range(6):
                [*pool.map(lambda client: answer(client, "a"), (ana, ben))]
    rows = [*home.comparisons()]
    assert len(rows) == 12
    assert len({row.user_id for row in rows}) == 2


def test_the_end_is_said(home: Home, ana: TestClient) -> None:
    for _ in range(30):
        answer(ana, "skip")
    assert "nothing more to ask" in ana.get("/").text


def test_the_page_is_blind(ana: TestClient) -> None:
    assert "rev-000007" not in ana.get("/").text
    assert "<em>a long</em>" in ana.get("/").text


@pytest.mark.parametrize("path", ["/", "/static/keys.js", "/login?token=x", "/nowhere"])
def test_every_answer_forbids_what_the_page_does_not_need(ana: TestClient, path: str) -> None:
    headers = ana.get(path).headers
    assert headers["content-security-policy"].startswith("default-src 'none';")
    assert "unsafe" not in headers["content-security-policy"]
    assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")


HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](http://evil.example/pixel)",
    "[x](javascript:alert(1))",
    "<a href='javascript:alert(1)'>x</a>",
    "```html\n</pre><script>alert(1)</script>\n```",
    "\x1b[31mred\x1b[0m",
    "user\u202etxt.exe",
    "<form action=/undo method=post><button data-key=1>",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_runs_nothing_and_fetches_nothing(text: str) -> None:
    html = html_of({"role": "assistant", "content": text})
    tags = {*re.findall(r"<\s*/?([a-zA-Z][\w-]*)", html)}
    assert tags <= {"p", "pre", "code", "a", "em"}
    assert 'href="javascript' not in html
    assert not {"\x1b", "\u202e"} & {*html}
    assert not re.search(r"<[^>]+\son\w+=", html)


def test_a_huge_answer_is_cut_and_counted() -> None:
    html = html_of({"role": "assistant", "content": "word " * 1_000_000})
    assert len(html) < 2 * LONGEST
    assert "4,980,000 characters more" in html


def test_tool_calls_are_readable() -> None:
    call = {"function": {"name": "book<", "arguments": '{"day": "Monday & Friday"}'}}
    html = html_of({"role": "assistant", "content": None, "tool_calls": [call, "odd"]})
    assert "<code>book&lt;</code>" in html
    assert "Monday &amp; Friday" in html
    assert "(nothing)" in html_of({"role": "assistant", "content": ""})


def test_parts_of_a_message_are_shown_or_named() -> None:
    parts = [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": "x"}}, "y"]
    html = html_of({"role": "user", "content": parts})
    assert "See" in html
    assert "[image_url]" in html


def test_what_differs_is_marked_word_by_word() -> None:
    one, other = ({"role": "assistant", "content": text} for text in ("a <b> c", "a d c"))
    assert difference(one, other) == "a <del>&lt;b&gt;</del><ins>d</ins> c"
    long = {"role": "assistant", "content": "x" * (LONGEST + 1)}
    assert difference(one, long) == ""
