"""examples/open_webui_function.py inside Open WebUI: a rating there is a row in a home here."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx
from conftest import PATIENCE
from open_webui_ratings import ANSWER, OTHER, OTHERWISE, SAID, answer, rating

from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.record.database import connect
from agentpref.record.store import Store


def test_ratings_reach_the_home_change_and_are_taken_back(
    start_receiver: Callable[[], str], open_webui: httpx.Client, home: Home
) -> None:
    start_receiver()
    sent = form(rating(1, others=(answer(OTHER, OTHERWISE),), comment="short"))
    rated = open_webui.post("/evaluations/feedback", json=sent).json()
    wait_for(home, [(SAID, OTHERWISE)])
    sent["data"] |= {"rating": -1}
    changed = open_webui.post(f"/evaluations/feedback/{rated['id']}", json=sent)
    assert changed.status_code == 200, changed.text
    wait_for(home, [(OTHERWISE, SAID)])
    open_webui.delete(f"/evaluations/feedback/{rated['id']}").raise_for_status()
    wait_for(home, [])


def test_all_ratings_that_are_deleted_are_taken_back(
    start_receiver: Callable[[], str], open_webui: httpx.Client, home: Home
) -> None:
    start_receiver()
    other = answer(OTHER, OTHERWISE)
    sent = form(rating(1, others=(other,)))
    open_webui.post("/evaluations/feedback", json=sent).raise_for_status()
    wait_for(home, [(SAID, OTHERWISE)])
    open_webui.delete("/evaluations/feedbacks/all").raise_for_status()
    wait_for(home, [])


def test_a_rating_waits_for_a_receiver_that_is_down(
    start_receiver: Callable[[], str], open_webui: httpx.Client, home: Home
) -> None:
    sent = form(rating(1, others=(answer(OTHER, OTHERWISE),)))
    open_webui.post("/evaluations/feedback", json=sent).raise_for_status()
    start_receiver()
    wait_for(home, [(SAID, OTHERWISE)])


def test_the_api_gives_a_rating_as_the_tests_have_it(open_webui: httpx.Client) -> None:
    ours = rating(1, others=(answer(OTHER, OTHERWISE),))
    made = open_webui.post("/evaluations/feedback", json=form(ours)).json()
    given = open_webui.get(f"/evaluations/feedback/{made['id']}").json()
    [listed] = open_webui.get("/evaluations/feedbacks/all/export").json()
    assert given == listed
    assert given.keys() == ours.keys()
    for part in ("data", "meta", "snapshot", "type"):
        assert given[part] == ours[part]
    assert given["meta"]["message_id"] == ANSWER
    assert open_webui.get("/evaluations/feedback/none").status_code == 404


def form(feedback: dict[str, Any]) -> dict[str, Any]:
    """What Open WebUI's page posts of a rating."""
    return {key: feedback[key] for key in ("type", "data", "meta", "snapshot")}


def wait_for(home: Home, wanted: list[tuple[str, str]]) -> None:
    """Wait until the pairs of the home, chosen and rejected, are these."""
    end = time.monotonic() + PATIENCE
    while (found := pairs(home)) != wanted and time.monotonic() < end:
        time.sleep(0.1)
    assert found == wanted


def pairs(home: Home) -> list[tuple[str, ...]]:
    """The pairs that an update would see."""
    with closing(connect(home, readonly=True)) as connection:
        found = read_examples(Store(connection), "default", held_out=0.0).pairs
    return [tuple(str(c.message["content"]) for c in pair.completions) for pair in found]
