"""Ratings of Open WebUI, as its server gives them, end as judgements of runs in a home."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import pytest
from open_webui_ratings import (
    ANSWER,
    ASKED,
    CHAT,
    OTHER,
    OTHERWISE,
    SAID,
    USER,
    answer,
    chat,
    event,
    rating,
)
from starlette.testclient import TestClient

import agentpref
from agentpref.errors import ConfigError, ExchangeError, NotKept
from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.prefer.exchange import import_file
from agentpref.record.database import connect
from agentpref.record.store import Store
from agentpref.types import Feedback, Run
from agentpref_adapters.open_webui import (
    keep_only,
    receiver,
    record_feedback,
    withdraw_feedback,
)
from agentpref_adapters.remote import RemoteLog

QUESTION = {"role": "user", "content": ASKED}
SYSTEM = {"role": "system", "content": "You answer for a shop."}
LIKED, DISLIKED = answer(ANSWER, SAID), answer(OTHER, OTHERWISE, model="large")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home")


@pytest.fixture
def log(home: Home) -> Iterator[agentpref.Log]:
    with agentpref.Log(home.path) as opened:
        yield opened


def by_gateway(log: agentpref.Log, text: str, message_id: str | None = ANSWER, **about: Any) -> str:
    """A run as the gateway records it for Open WebUI, with a system prompt that no snapshot has."""
    ids = {"chat_id": CHAT, **({"message_id": message_id} if message_id else {}), **about}
    asked = [SYSTEM, QUESTION]
    return log.record(asked, text, thread_id=CHAT, metadata={"open_webui": ids})


def logged(home: Home) -> tuple[list[Run], list[Feedback]]:
    """The runs and the feedback of a home, oldest first."""
    with closing(connect(home, readonly=True)) as connection:
        store = Store(connection)
        return list(store.runs("default")), list(store.feedback("default"))


def pairs(home: Home) -> list[tuple[str, str, str]]:
    """The pairs that an update would see: chosen, rejected, and what they were made of."""
    with closing(connect(home, readonly=True)) as connection:
        found = read_examples(Store(connection), "default", held_out=0.0).pairs
    return [(*(str(c.message["content"]) for c in p.completions), p.origin) for p in found]


def thumbs(home: Home) -> list[bool]:
    """The lone thumbs that an update would see."""
    with closing(connect(home, readonly=True)) as connection:
        found = read_examples(Store(connection), "default", held_out=0.0).examples
    return [example.completions[0].label == 1 for example in found if example.lone]


def test_a_thumb_finds_the_run_of_the_gateway_by_its_message(
    log: agentpref.Log, home: Home
) -> None:
    by_gateway(log, "Sundays and Shops", None, task="title_generation")
    run = by_gateway(log, SAID)
    by_gateway(log, "Another answer.", "another message")
    done = record_feedback(
        log, rating(1, comment="short and clear", reason="other", tags=["shops"])
    )
    assert (done.run_id, done.source, done.judged) == (run, "log", ("thumbs",))
    [said] = logged(home)[1]
    assert (said.run_id, said.key, said.score) == (run, "thumbs", 1.0)
    assert said.comment == "short and clear"
    assert said.value["open_webui"]["reason"] == "other"
    assert said.value["open_webui"]["tags"] == ["shops"]
    assert len(logged(home)[0]) == 3


def test_of_several_calls_for_one_message_the_last_is_judged(log: agentpref.Log) -> None:
    by_gateway(log, "Let me look.")
    run = by_gateway(log, SAID)
    assert record_feedback(log, rating(-1)).run_id == run


def test_without_the_header_of_the_message_a_run_is_found_by_its_text(log: agentpref.Log) -> None:
    by_gateway(log, OTHERWISE, None)
    run = by_gateway(log, SAID, None)
    assert record_feedback(log, rating(-1)).run_id == run


def test_an_answer_that_no_log_has_is_recorded_from_the_snapshot_once(
    log: agentpref.Log, home: Home
) -> None:
    snapshot = chat(LIKED, params={"system": SYSTEM["content"]})
    done = record_feedback(log, rating(1, snapshot=snapshot))
    assert (done.source, done.judged) == ("snapshot", ("thumbs",))
    record_feedback(log, rating(-1, snapshot=snapshot, at=1_795_900_030))
    [run], said = logged(home)
    assert run.prompt.messages == (SYSTEM, QUESTION)
    assert run.output == {"role": "assistant", "content": SAID}
    assert (run.run_id, run.thread_id, run.model) == (f"open-webui-{ANSWER}", CHAT, "small")
    assert run.user_id not in (None, USER)  # by the name that the home gives
    assert [one.score for one in said] == [1.0, 0.0]
    assert thumbs(home) == [False]


def test_a_thumb_against_other_answers_is_a_comparison(log: agentpref.Log, home: Home) -> None:
    run = by_gateway(log, SAID)
    done = record_feedback(log, rating(1, others=(DISLIKED,)))
    assert done.judged == ("thumbs", "comparison")
    assert pairs(home) == [(SAID, OTHERWISE, "comparison")]
    other = next(one for one in logged(home)[0] if one.run_id != run)
    assert other.prompt.messages == (SYSTEM, QUESTION)  # what the model beside it was asked
    assert other.model == "large"


def test_a_dislike_loses_against_other_answers(log: agentpref.Log, home: Home) -> None:
    record_feedback(log, rating(-1, others=(DISLIKED,)))
    assert pairs(home) == [(OTHERWISE, SAID, "comparison")]


def test_two_liked_answers_are_a_tie_whichever_was_rated_first(
    log: agentpref.Log, home: Home
) -> None:
    record_feedback(log, rating(1, others=(DISLIKED,)))
    first = answer(ANSWER, SAID, annotation={"rating": 1})
    record_feedback(log, rating(1, of=DISLIKED, others=(first,), feedback_id="f2"))
    assert pairs(home) == []


def test_a_later_rating_of_the_other_answer_supersedes(log: agentpref.Log, home: Home) -> None:
    record_feedback(log, rating(1, others=(DISLIKED,)))
    record_feedback(log, rating(-1, others=(DISLIKED,), at=1_795_900_030))
    first = answer(ANSWER, SAID, annotation={"rating": -1})
    record_feedback(log, rating(1, of=DISLIKED, others=(first,), feedback_id="f2"))
    assert pairs(home) == [(OTHERWISE, SAID, "comparison")]


def test_answers_to_different_prompts_are_not_compared_and_it_is_said(
    log: agentpref.Log, home: Home
) -> None:
    by_gateway(log, SAID)
    ids = {"open_webui": {"chat_id": CHAT, "message_id": OTHER}}
    log.record([QUESTION], OTHERWISE, thread_id=CHAT, metadata=ids)
    done = record_feedback(log, rating(1, others=(DISLIKED,)))
    assert done.judged == ("thumbs",)
    assert "different prompts" in done.left_out[f"comparison with {OTHER}"]


def test_the_same_rating_again_changes_nothing_and_an_older_state_neither(
    log: agentpref.Log, home: Home
) -> None:
    by_gateway(log, SAID)
    record_feedback(log, rating(-1, at=1_795_900_030))
    assert record_feedback(log, rating(-1, at=1_795_900_031)).judged == ("unchanged",)
    done = record_feedback(log, rating(1))
    assert (done.judged, done.left_out) == (("unchanged",), {"rating": "a newer state is known"})
    assert [one.score for one in logged(home)[1]] == [0.0]


def test_words_alone_are_kept_and_train_nothing(log: agentpref.Log, home: Home) -> None:
    by_gateway(log, SAID)
    record_feedback(log, rating(1))
    done = record_feedback(log, rating(None, comment="hm", at=1_795_900_030))
    assert done.judged == ("words",)
    assert thumbs(home) == []
    assert logged(home)[1][-1].comment == "hm"


def edited(text: str, before: str = OTHERWISE, **more: Any) -> dict[str, Any]:
    """An answer that a person changed in the page, or an outlet filter: both look the same."""
    return answer(ANSWER, text, originalContent=before, **more)


def test_an_answer_that_was_edited_is_a_correction_of_its_run_if_it_was_asked_for(
    log: agentpref.Log, home: Home
) -> None:
    by_gateway(log, OTHERWISE)
    done = record_feedback(log, rating(1, of=edited(SAID)), edits=True)
    assert done.judged == ("correction", "words")
    assert "edited" in done.left_out["thumbs"]
    assert pairs(home) == [(SAID, OTHERWISE, "correction")]
    withdraw_feedback(log, "f1")
    assert pairs(home) == []


@pytest.mark.parametrize("liked", [True, False])
def test_what_an_outlet_filter_changed_is_no_correction_and_the_thumb_counts(
    log: agentpref.Log, home: Home, liked: bool
) -> None:
    by_gateway(log, "Ask Ana.")
    masked = edited("Ask [name].", "Ask Ana.")
    done = record_feedback(log, rating(1 if liked else -1, of=masked))
    assert (done.judged, "outlet filter" in done.left_out["edit"]) == (("thumbs",), True)
    assert (thumbs(home), pairs(home)) == ([liked], [])


def test_a_footer_is_no_edit_and_a_dislike_is_no_correction(log: agentpref.Log, home: Home) -> None:
    by_gateway(log, SAID)
    footed = edited(f"{SAID}\n\n---\n12 tokens", f"{SAID}\n")
    done = record_feedback(log, rating(1, of=footed), edits=True)
    assert (done.judged, done.left_out) == (("thumbs",), {})
    disliked = rating(-1, of=edited("Closed.", SAID), at=1_795_900_030)
    done = record_feedback(log, disliked, edits=True)
    assert (done.judged, done.left_out) == (("thumbs",), {"edit": "a dislike is no correction"})
    assert thumbs(home) == [False]


def test_the_edit_is_what_the_page_shows_and_not_what_the_model_wrote_at_first(
    log: agentpref.Log, home: Home
) -> None:
    by_gateway(log, OTHERWISE)
    said = {"type": "message", "content": [{"type": "output_text", "text": OTHERWISE}]}
    record_feedback(log, rating(1, of=edited(SAID, output=[said])), edits=True)
    assert pairs(home) == [(SAID, OTHERWISE, "correction")]


def test_a_second_edit_counts_and_one_that_is_undone_is_taken_back(
    log: agentpref.Log, home: Home
) -> None:
    by_gateway(log, OTHERWISE)
    record_feedback(log, rating(1, of=edited("Closed.")), edits=True)
    again = record_feedback(log, rating(1, of=edited(SAID), at=1_795_900_030), edits=True)
    assert again.judged == ("correction", "words")
    assert pairs(home) == [(SAID, OTHERWISE, "correction")]
    undone = rating(1, of=edited(OTHERWISE), at=1_795_900_040)
    assert record_feedback(log, undone, edits=True).judged == ("thumbs",)
    assert (pairs(home), thumbs(home)) == ([], [True])


def test_an_answer_that_was_changed_is_not_taken_for_what_the_model_wrote(
    log: agentpref.Log, home: Home
) -> None:
    for edits in (False, True):
        done = record_feedback(log, rating(1, of=edited(SAID)), edits=edits)
        assert (done.run_id, "it was changed" in done.left_out["rating"]) == (None, True)
    assert logged(home) == ([], [])
    changed = DISLIKED | {"originalContent": "Hm."}
    done = record_feedback(log, rating(1, others=(changed,)))
    assert "it was changed" in done.left_out[f"comparison with {OTHER}"]
    assert [run.output["content"] for run in logged(home)[0]] == [SAID]


def test_an_answer_that_was_changed_is_found_by_what_it_was(log: agentpref.Log) -> None:
    by_gateway(log, SAID, None)
    run = by_gateway(log, OTHERWISE, None)
    assert record_feedback(log, rating(-1, of=edited(SAID))).run_id == run
    footed = rating(1, of=answer(OTHER, f"{OTHERWISE} (1 s)", originalContent=OTHERWISE))
    assert record_feedback(log, {**footed, "id": "f2"}).run_id == run


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"files": [{"type": "file", "id": "x"}]}, "files"),
        ({"sources": [{"source": {"name": "hours.pdf"}}]}, "sources"),
        ({"output": [{"type": "function_call", "name": "hours"}]}, "tools"),
        ({"content": '<details type="tool_calls" done="true"></details> closed'}, "tools"),
        ({"error": {"content": "no"}}, "failed"),
        ({"content": " "}, "empty"),
        ({"parentId": "gone"}, "lacks a message"),
    ],
)
def test_what_the_snapshot_does_not_show_is_not_recorded_and_it_is_said(
    log: agentpref.Log,
    home: Home,
    caplog: pytest.LogCaptureFixture,
    more: dict[str, Any],
    why: str,
) -> None:
    with caplog.at_level(logging.WARNING, "agentpref"):
        done = record_feedback(log, rating(1, of=answer(ANSWER, SAID) | more))
    assert done.run_id is None
    assert why in done.left_out["rating"]
    assert "teaches nothing" in caplog.text
    assert SAID not in caplog.text
    assert logged(home) == ([], [])


def test_what_the_model_thought_is_not_its_answer(log: agentpref.Log, home: Home) -> None:
    thought = (
        '<details type="reasoning" done="true"><summary>…</summary>\n> hm\n</details>\n' + SAID
    )
    items = [
        {"type": "reasoning", "content": [{"type": "output_text", "text": "hm"}]},
        {"type": "message", "content": [{"type": "output_text", "text": OTHERWISE}]},
    ]
    record_feedback(log, rating(1, of=answer(ANSWER, thought)))
    other = answer(OTHER, "shown otherwise", output=items)
    record_feedback(log, rating(1, of=other, feedback_id="f2"))
    assert [run.output["content"] for run in logged(home)[0]] == [SAID, OTHERWISE]


def test_an_answer_that_broke_off_makes_no_example(log: agentpref.Log, home: Home) -> None:
    record_feedback(log, rating(1, of=answer(ANSWER, SAID, done=False)))
    assert thumbs(home) == []
    assert len(logged(home)[1]) == 1


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ([], "the feedback is"),
        ({"type": "note"}, "type is"),
        ({"id": ""}, "id is"),
        ({"meta": {"chat_id": CHAT}}, "meta.message_id is"),
        ({"data": {"rating": 7}}, "data.rating is 7"),
        ({"data": {"rating": True}}, "data.rating is True"),
    ],
)
def test_what_is_no_rating_is_refused_with_the_field(
    log: agentpref.Log, broken: Any, named: str
) -> None:
    with pytest.raises(ExchangeError, match=named):
        record_feedback(log, {**rating(), **broken} if isinstance(broken, dict) else broken)


def test_what_failed_half_way_is_recorded_whole_when_it_is_sent_again(
    log: agentpref.Log, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise NotKept("the disk is full")

    with monkeypatch.context() as for_now:
        for_now.setattr(log, "compare", full)
        with pytest.raises(NotKept):
            record_feedback(log, rating(1, others=(DISLIKED,)))
    done = record_feedback(log, rating(1, others=(DISLIKED,)))
    assert done.judged == ("thumbs", "comparison")
    assert pairs(home) == [(SAID, OTHERWISE, "comparison")]


def test_comparisons_with_answers_that_are_no_more_are_taken_back(
    log: agentpref.Log, home: Home
) -> None:
    record_feedback(log, rating(1, others=(DISLIKED,)))
    alone = record_feedback(log, rating(1, at=1_795_900_030))
    assert alone.judged == ("thumbs",)
    assert (pairs(home), thumbs(home)) == ([], [True])


def test_a_rating_is_looked_up_in_its_chat_only(
    log: agentpref.Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Any]()
    read = Home.feedback

    def noticed(self: Home, namespace: str, **which: Any) -> Any:
        asked.append(which)
        return read(self, namespace, **which)

    monkeypatch.setattr(Home, "feedback", noticed)
    record_feedback(log, rating(1))
    [which] = asked
    assert which["thread"] == CHAT
    assert which["since"] < rating()["created_at"]


def test_a_deleted_rating_is_taken_back_with_its_comparisons(
    log: agentpref.Log, home: Home
) -> None:
    record_feedback(log, rating(1, others=(DISLIKED,)))
    log.thumbs(f"open-webui-{ANSWER}", up=True, user_id="somebody else")
    assert withdraw_feedback(log, "f1").judged == ("withdrawn",)
    assert (pairs(home), thumbs(home)) == ([], [True])
    assert withdraw_feedback(log, "f1").left_out == {"rating": "nothing of it is in the log"}
    assert record_feedback(log, rating(1)).judged == ("thumbs",)


def test_ratings_that_are_no_more_are_taken_back(log: agentpref.Log, home: Home) -> None:
    record_feedback(log, rating(1))
    record_feedback(log, rating(-1, of=answer(OTHER, OTHERWISE), feedback_id="f2"))
    assert keep_only(log, ["f2"]) == ["f1"]
    assert keep_only(log, ["f2"]) == []
    assert keep_only(log, [], until=1.0) == []
    assert thumbs(home) == [False]


# The same ratings, as an administrator exports them


EXPORTED = [
    rating(1, comment="clear", reason="other", others=(DISLIKED,)),
    rating(
        1,
        of=DISLIKED,
        others=(answer(ANSWER, SAID, annotation={"rating": 1}),),
        feedback_id="f2",
        at=1_795_900_030,
    ),
    rating(-1, of=answer("d", f'<details type="reasoning">hm</details>\n{SAID}'), feedback_id="f3"),
    rating(1, of=answer("e", SAID, files=[{"type": "file", "id": "x"}]), feedback_id="f4"),
    rating(1, of=answer("g", SAID, originalContent="Hm."), feedback_id="f5"),
    rating(None, of=answer("h", "Never."), feedback_id="f6", comment="hm"),
    rating(-1, of=answer("i", "It is op", done=False), feedback_id="f7"),
]
LOSES = rating(-1, others=(DISLIKED,), at=1_795_900_040)


def exported(folder: Path, *ratings: dict[str, Any]) -> Path:
    """An export of ratings."""
    file = folder / "feedback.json"
    file.write_bytes(orjson.dumps(ratings))
    return file


def learned(home: Home) -> tuple[Any, ...]:
    """What a home has of some ratings, without who said it and when."""
    runs, said = logged(home)
    answers = [(run.prompt.messages, run.output, run.model, run.thread_id) for run in runs]
    about = [run.metadata["open_webui"] for run in runs]
    why = [run.metadata.get("finish_reason") for run in runs]
    judged = [(row.key, row.score, row.comment, row.value) for row in said]
    found = (*zip(answers, about, why, strict=True),)
    return (
        sorted(map(repr, found)),
        sorted(map(repr, judged)),
        sorted(pairs(home)),
        sorted(thumbs(home)),
    )


@pytest.mark.parametrize("more", [[], [LOSES]], ids=["a tie", "then a dislike"])
def test_an_import_and_the_receiver_read_the_same_ratings_as_the_same(
    tmp_path: Path, log: agentpref.Log, home: Home, more: list[dict[str, Any]]
) -> None:
    ratings = [*EXPORTED, *more]
    other = Home.create(tmp_path / "other")
    done = import_file(other, exported(tmp_path, *ratings))
    assert sum(done.left_out.values()) == 2
    for one in ratings:
        record_feedback(log, one)
    assert learned(other) == learned(home)
    assert pairs(home) == ([(OTHERWISE, SAID, "comparison")] if more else [])


def test_an_import_after_the_receiver_changes_nothing_that_is_learned(
    tmp_path: Path, log: agentpref.Log, home: Home
) -> None:
    for one in [*EXPORTED, LOSES]:
        record_feedback(log, one)
    before = (len(logged(home)[0]), pairs(home), thumbs(home))
    import_file(home, exported(tmp_path, *EXPORTED, LOSES))
    assert (len(logged(home)[0]), pairs(home), thumbs(home)) == before
    withdraw_feedback(log, "f1")
    import_file(home, exported(tmp_path, *EXPORTED, LOSES))  # made before it was deleted
    thumbs_apart = (OTHERWISE, SAID, "thumbs")  # those of f2 and f3
    assert (len(logged(home)[0]), pairs(home)) == (before[0], [thumbs_apart])


def test_the_receiver_knows_what_was_imported_and_takes_it_back(
    tmp_path: Path, log: agentpref.Log, home: Home
) -> None:
    import_file(home, exported(tmp_path, LOSES))
    assert record_feedback(log, LOSES).judged == ("unchanged",)
    assert pairs(home) == [(OTHERWISE, SAID, "comparison")]
    withdraw_feedback(log, "f1")
    assert (pairs(home), thumbs(home)) == ([], [])


def test_an_import_finds_the_runs_of_the_gateway_by_their_messages(
    tmp_path: Path, log: agentpref.Log, home: Home
) -> None:
    by_gateway(log, "Sundays and Shops", task="title_generation")
    run, other = by_gateway(log, SAID), by_gateway(log, OTHERWISE, OTHER)
    log.flush()
    import_file(home, exported(tmp_path, LOSES))
    runs, [said] = logged(home)
    assert (len(runs), said.run_id) == (3, run)
    assert pairs(home) == [(OTHERWISE, SAID, "comparison")]
    assert {run, other} <= {one.run_id for one in runs}


# The receiver


@pytest.fixture
def asked(log: agentpref.Log) -> Callable[..., Any]:
    """Call ``asked(event)``: what the receiver with a token answers."""
    client = TestClient(receiver(log, token="secret"))

    def ask(body: Any, token: str = "secret") -> Any:
        headers = {"Authorization": f"Bearer {token}"}
        return client.post("/feedback", content=orjson.dumps(body), headers=headers)

    return ask


def test_the_receiver_records_changes_and_takes_back_what_the_function_sends(
    asked: Callable[..., Any], home: Home
) -> None:
    created = asked(event(feedback=rating(1)))
    assert created.json() == {
        "run_id": f"open-webui-{ANSWER}",
        "source": "snapshot",
        "judged": ["thumbs"],
        "left_out": {},
    }
    asked(event("feedback.updated", feedback=rating(-1, at=1_795_900_030)))
    assert thumbs(home) == [False]
    assert asked(event("feedback.deleted")).json()["judged"] == ["withdrawn"]
    assert thumbs(home) == []
    asked(event(feedback=rating(1, at=1_795_900_040)))
    gone = asked(event("feedback.deleted_all", "all", remaining=[], created_at=4_000_000_000))
    assert gone.json() == {"withdrawn": ["f1"]}
    assert thumbs(home) == []


@pytest.mark.parametrize(
    ("body", "token", "status", "said"),
    [
        (event(feedback=rating()), "wrong", 401, "valve `token`"),
        (event(feedback=rating()), "", 401, "valve `token`"),
        (event(), "secret", 400, "lacks its rating"),
        (event(feedback=rating(feedback_id="f2")), "secret", 400, "lacks its rating"),
        (event(subject=""), "secret", 400, "subject.id"),
        (event("feedback.deleted_all"), "secret", 400, "remaining"),
        ([1], "secret", 400, "no JSON object"),
        (event(feedback=rating(5)), "secret", 422, "data.rating is 5"),
    ],
)
def test_the_receiver_refuses_with_a_status_and_a_cure(
    asked: Callable[..., Any], home: Home, body: Any, token: str, status: int, said: str
) -> None:
    answered = asked(body, token)
    assert (answered.status_code, said in answered.json()["error"]["message"]) == (status, True)
    assert logged(home) == ([], [])


def test_the_receiver_ignores_other_events_and_refuses_other_requests(
    log: agentpref.Log, asked: Callable[..., Any]
) -> None:
    assert asked(event("chat.created")).json() == {"ignored": "chat.created"}
    client = TestClient(receiver(log, token="secret"))
    shown = {"Authorization": "Bearer secret"}
    assert client.post("/feedback", content=b"<html>", headers=shown).status_code == 400
    assert client.get("/feedback").status_code == 405
    assert client.get("/elsewhere").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    big = client.post("/feedback", content=b" " * (33 << 20), headers=shown)
    assert big.status_code == 413


def test_a_receiver_that_knows_nobody_to_believe_is_refused(log: agentpref.Log) -> None:
    with pytest.raises(ConfigError, match="pass token="):
        receiver(log, url="http://localhost:8080")


def test_a_receiver_of_edits_makes_corrections(log: agentpref.Log, home: Home) -> None:
    by_gateway(log, OTHERWISE)
    client = TestClient(receiver(log, token="secret", edits=True))
    body = event(feedback=rating(1, of=edited(SAID)))
    client.post("/feedback", json=body, headers={"Authorization": "Bearer secret"})
    assert pairs(home) == [(SAID, OTHERWISE, "correction")]


def test_a_receiver_whose_home_is_elsewhere_is_refused(tmp_path: Path) -> None:
    with (
        RemoteLog("http://127.0.0.1:9", "ap-key", outbox=tmp_path / "outbox") as remote,
        pytest.raises(ConfigError, match="where the home is"),
    ):
        receiver(remote, token="secret")


class _Api(BaseHTTPRequestHandler):
    """The routes of Open WebUI that a receiver asks, over a table of ratings."""

    ratings: dict[str, Any]

    def do_GET(self) -> None:
        base, _, name = self.path.removeprefix("/api/v1/evaluations/").rpartition("/")
        if self.headers["Authorization"] != "Bearer sk-admin":
            self._give(401, {"detail": "401 Unauthorized"})
        elif base == "feedback" and name in self.ratings:
            self._give(200, self.ratings[name])
        elif self.path.endswith("/feedbacks/all/ids"):
            self._give(200, [{"id": one} for one in self.ratings])
        else:
            self._give(404, {"detail": "not found"})

    def _give(self, status: int, value: Any) -> None:
        body = orjson.dumps(value)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def api() -> Iterator[tuple[str, dict[str, Any]]]:
    """An address that answers as Open WebUI does, and the ratings there."""
    ratings: dict[str, Any] = {}
    handler = type("Handler", (_Api,), {"ratings": ratings})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", ratings
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_webhook_is_a_hint_and_the_rating_is_fetched(
    log: agentpref.Log, home: Home, api: tuple[str, dict[str, Any]]
) -> None:
    url, ratings = api
    client = TestClient(receiver(log, url=url, key="sk-admin"))
    ratings["f1"] = rating(-1)
    forged = event(feedback=rating(1))
    assert client.post("/feedback", json=forged).json()["judged"] == ["thumbs"]
    assert thumbs(home) == [False]
    client.post("/feedback", json=event("feedback.deleted"))  # which is not so
    assert thumbs(home) == [False]
    ratings.clear()
    client.post("/feedback", json=event("feedback.updated"))  # it was deleted meanwhile
    assert thumbs(home) == []


def test_ratings_that_were_all_deleted_are_taken_back_by_asking_what_remains(
    log: agentpref.Log, home: Home, api: tuple[str, dict[str, Any]]
) -> None:
    url, ratings = api
    client = TestClient(receiver(log, url=url, key="sk-admin"))
    ratings["f1"] = rating(1)
    client.post("/feedback", json=event())
    ratings.clear()
    everything = event("feedback.deleted_all", "all", created_at=4_000_000_000)
    assert client.post("/feedback", json=everything).json() == {"withdrawn": ["f1"]}
    assert thumbs(home) == []


@pytest.mark.parametrize("fault", ["down", "key"])
def test_an_open_webui_that_does_not_help_is_named(
    log: agentpref.Log, api: tuple[str, dict[str, Any]], fault: str
) -> None:
    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        app = receiver(log, url=down if fault == "down" else api[0], key="sk-wrong")
        answered = TestClient(app).post("/feedback", json=event())
    message = answered.json()["error"]["message"]
    assert answered.status_code == 502
    assert ("does not answer" if fault == "down" else "ENABLE_API_KEYS=true") in message
    assert "sk-wrong" not in message


def test_many_states_of_a_rating_at_once_end_with_the_newest(
    log: agentpref.Log, home: Home
) -> None:
    import httpx

    async def story() -> None:
        transport = httpx.ASGITransport(receiver(log, token="secret"))
        async with httpx.AsyncClient(transport=transport, base_url="http://receiver") as client:
            shown = {"Authorization": "Bearer secret"}
            states = [rating(1 if i % 2 else -1, at=1_795_900_000 + i) for i in range(12)]
            sent = (client.post("/feedback", json=event(feedback=s), headers=shown) for s in states)
            await asyncio.gather(*sent)

    asyncio.run(story())
    assert thumbs(home) == [True]
    assert len(logged(home)[0]) == 1


def test_the_lines_of_the_guide_make_a_receiver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "chat-apps.md").read_text(encoding="utf-8")
    section = guide[guide.index("## Open WebUI") : guide.index("## LibreChat")]
    [lines] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RATINGS_TOKEN", "secret")
    names: dict[str, Any] = {"__name__": "guide"}
    exec(lines, names)
    shown = {"Authorization": "Bearer secret"}
    with names["log"] as log:
        body = event(feedback=rating(1))
        TestClient(names["app"]).post("/feedback", json=body, headers=shown).raise_for_status()
        assert thumbs(log.home) == [True]
