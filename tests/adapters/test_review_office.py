"""The owner's pages: runs, updates, revisions, people, and who may see and do what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from agentpref.home import Home
from agentpref.record.log import Log
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter
from agentpref_adapters.review import Desks, Office, create_app

TOKENS = {"token-of-ana": "ana", "token-of-olga": "olga"}
MODEL = {"name": "tiny", "digest": "d", "template_digest": "t"}
HOSTILE = "<script>alert(1)</script>\u202e &amp; <img src=x onerror=alert(2)>"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    with Log(tmp_path / "home") as log:
        for number in range(60):
            asked = [{"role": "user", "content": f"What about {number}?"}]
            for text in (f"Just {number}.", f"A long story about {number}. {HOSTILE}"):
                log.record(asked, text, tags=["chat" if number % 2 else "mail"], thread_id="t1")
    return Home.open(tmp_path / "home")


@pytest.fixture
def registry(home: Home, tmp_path: Path) -> Registry:
    registry = Registry(home)
    for seed in range(2):
        folder = write_adapter(tmp_path / f"adapter{seed}", seed=seed)
        parent = registry.list()[-1].revision_id if seed else None
        registry.publish(folder, parent=parent, model=MODEL, training={})
    return registry


def client_of(home: Home, token: str, owners: Any = ("olga",)) -> Iterator[TestClient]:
    office = Office(home, "default", ["ana", "olga"], lambda name: f"<h1>report of {name}</h1>")
    with Desks(home) as desks:
        page = create_app(desks, TOKENS, office=office, owners=owners)
        with TestClient(page, base_url="http://page") as client:
            client.get(f"/login?token={token}")
            yield client


@pytest.fixture
def olga(home: Home) -> Iterator[TestClient]:
    yield from client_of(home, "token-of-olga")


@pytest.fixture
def ana(home: Home) -> Iterator[TestClient]:
    yield from client_of(home, "token-of-ana")


def fields(text: str) -> dict[str, str]:
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', text))


PAGES = ("/runs", "/runs/x", "/updates", "/updates/x", "/revisions", "/people")


@pytest.mark.parametrize("path", PAGES)
def test_who_only_compares_sees_none_of_it(home: Home, ana: TestClient, path: str) -> None:
    assert ana.get(path).status_code == 403
    assert "Revisions" not in ana.get("/").text
    assert ana.post("/revisions/do", data={"action": "rollback"}).status_code == 403


def test_without_an_office_there_is_none_for_owners_either(home: Home) -> None:
    with Desks(home) as desks, TestClient(create_app(desks, TOKENS, owners=["olga"])) as client:
        client.get("/login?token=token-of-olga")
        assert client.get("/runs").status_code == 403


def test_runs_are_searched_and_hostile_text_is_text(olga: TestClient) -> None:
    page = olga.get("/runs").text
    assert page.count("<tr>") == 51
    assert "There are more" in page
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "\u202e" not in page
    found = olga.get("/runs", params={"text": "Just 7.", "tag": "chat", "thread": "t1"}).text
    assert found.count("<tr>") == 2
    assert "No such runs" in olga.get("/runs", params={"tag": "none"}).text


def test_a_run_shows_its_conversation_what_was_said_and_the_others_of_its_thread(
    home: Home, olga: TestClient
) -> None:
    runs = [*home.runs()]
    with Log(home.path) as log:
        log.thumbs(runs[0].run_id, up=False, comment=HOSTILE, user_id="u")
        log.correct(runs[0].run_id, "Nothing.", user_id="u")
        log.compare(runs[0].run_id, runs[1].run_id, winner="b", user_id="u")
    page = olga.get(f"/runs/{runs[0].run_id}").text
    for text in (
        "What about",
        "should be: Nothing.",
        "worse than another answer",
        "Others of this",
    ):
        assert text in page
    assert "<script>alert" not in page
    assert olga.get("/runs/nothing").status_code == 404


def test_updates_are_listed_and_each_has_its_report(olga: TestClient) -> None:
    assert "No update has run yet" in olga.get("/updates").text
    answer = olga.get("/updates/0123")
    assert answer.text == "<h1>report of 0123</h1>"
    assert "script" not in answer.headers["content-security-policy"]
    assert "style-src 'unsafe-inline'" in answer.headers["content-security-policy"]


def test_a_revision_is_promoted_by_a_second_click(registry: Registry, olga: TestClient) -> None:
    first, second = (one.revision_id for one in registry.list())
    form = fields(olga.get("/revisions").text)
    asked = olga.post("/revisions", data={**form, "action": "promote", "revision": first})
    assert f"This will make {first} live." in asked.text
    assert registry.state().live is None, "nothing is done by the first"
    done = olga.post("/revisions/do", data=fields(asked.text))
    assert registry.state().live == first
    assert "Done." in done.text
    asked = olga.post("/revisions", data={**form, "action": "canary", "revision": second,
                                          "share": "12.5"})  # fmt: skip
    assert f"let {second} serve 12.5 % of the threads" in asked.text
    olga.post("/revisions/do", data=fields(asked.text))
    assert (registry.state().canary, registry.state().weight) == (second, 0.125)
    asked = olga.post("/revisions", data={**form, "action": "end"})
    olga.post("/revisions/do", data=fields(asked.text))
    assert registry.state().canary is None
    asked = olga.post("/revisions", data={**form, "action": "rollback"})
    assert "roll back: base serves again" in asked.text
    olga.post("/revisions/do", data=fields(asked.text))
    assert registry.state().live is None


def test_what_changed_since_it_was_asked_is_not_overruled(
    registry: Registry, olga: TestClient
) -> None:
    first, second = (one.revision_id for one in registry.list())
    form = fields(olga.get("/revisions").text)
    asked = olga.post("/revisions", data={**form, "action": "promote", "revision": first})
    registry.promote(second)
    refused = olga.post("/revisions/do", data=fields(asked.text))
    assert refused.status_code == 409
    assert "Somebody changed what serves meanwhile" in refused.text
    assert registry.state().live == second


def test_without_a_promotion_there_is_nothing_to_roll_back(
    registry: Registry, olga: TestClient
) -> None:
    assert "Roll back" not in olga.get("/revisions").text
    registry.promote(registry.list()[0].revision_id)
    assert "Roll back" in olga.get("/revisions").text


def test_a_form_that_is_too_long_or_of_an_older_page_is_said(home: Home, ana: TestClient) -> None:
    form = {**fields(ana.get("/").text), "choice": "correct-a"}
    assert ana.post("/answer", data={**form, "correct-a": "x" * 20_001}).status_code == 413
    old = ana.post("/answer", data={**form, "secret": "old", "correct-a": "x"})
    assert (old.status_code, "of an older page" in old.text) == (403, True)
    assert [*home.feedback()] == []
    ana.post("/answer", data={**form, "correct-a": "a\x00b\u202ec"})
    assert [row.correction["content"] for row in home.feedback() if row.correction] == ["abc"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"action": "delete"},
        {"action": "promote", "revision": "rev-000009-aaaaaaaaaaaa"},
        {"action": "canary", "share": "much"},
        {"action": "canary", "share": "0"},
        {"action": "canary", "share": "5", "revision": "base"},
        {"action": "end"},
        {"action": "canary", "share": "nan"},
        {"action": "rollback"},
        {"action": "promote", "secret": "guess"},
    ],
)
def test_a_wrong_click_changes_nothing(
    registry: Registry, olga: TestClient, wrong: dict[str, str]
) -> None:
    form = fields(olga.get("/revisions").text)
    revision = registry.list()[0].revision_id
    for path in ("/revisions", "/revisions/do"):
        data = {"revision": revision, "generation": "0", **form, **wrong}
        assert olga.post(path, data=data).status_code in (403, 404, 409)
    assert registry.state().generation == 0


def test_people_are_shown_by_how_many_how_fast_and_how_much_alike(
    home: Home, olga: TestClient
) -> None:
    runs = [*home.runs()]
    with Log(home.path) as log:
        for a, b in zip(runs[:24:2], runs[1:24:2], strict=True):
            log.compare(a.run_id, b.run_id, winner="a", user_id="ana")
            log.compare(a.run_id, b.run_id, winner="a", user_id="stranger")
    page = olga.get("/people").text
    assert "<td>ana</td><td>12</td><td>0</td>" in page
    assert "stranger" not in page, "the home keeps no name of whom nobody named"
    assert "12 of 12 <strong>(not by chance)</strong>" in page
    assert "all: 1.00 of 12" in page
    assert re.search(r"chat: 1\.00 of \d", page)


def test_an_answer_is_corrected_in_place_and_that_can_be_undone(
    home: Home, ana: TestClient
) -> None:
    page = ana.get("/").text
    hidden = fields(page)
    sent = {**hidden, "choice": "correct-b", "correct-a": "A", "correct-b": "As it should be."}
    assert "1 corrected" in ana.post("/answer", data=sent).text
    [row] = [*home.feedback()]
    assert (row.correction, row.source) == (
        {"role": "assistant", "content": "As it should be."}, "human"
    )  # fmt: skip
    assert fields(ana.get("/").text)["question"] != hidden["question"]
    ana.post("/undo", data={"secret": hidden["secret"]})
    assert fields(ana.get("/").text)["question"] == hidden["question"]
    assert "corrected" not in ana.get("/").text.split("</header>")[0]
    with Log(home.path) as log:
        log.flush()
    assert [row.key for row in home.feedback()] == ["correction", "retraction"]


def test_an_empty_correction_logs_nothing(home: Home, ana: TestClient) -> None:
    sent = {**fields(ana.get("/").text), "choice": "correct-a", "correct-a": "  "}
    assert "has to say something" in ana.post("/answer", data=sent).text
    assert [*home.feedback()] == []


def test_what_an_owner_said_is_gold_for_the_others(home: Home) -> None:
    runs = [*home.runs()]
    with Log(home.path) as log:
        for number, (a, b) in enumerate(zip(runs[::2], runs[1::2], strict=True)):
            who = "olga" if number % 2 else "stranger"
            log.compare(a.run_id, b.run_id, winner="a", user_id=who)
    with Desks(home, gold="olga") as desks:
        page = create_app(desks, TOKENS)
        with TestClient(page, base_url="http://page") as client:
            client.get("/login?token=token-of-ana")
            for _ in range(3):
                client.post("/answer", data={**fields(client.get("/").text), "choice": "a"})
            text = client.get("/").text
    assert re.search(r"\d of \d as olga has said|0 answered", text)
