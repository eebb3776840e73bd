"""Ordinary answers: what nobody judged, outside of what people judge, from a real log."""

from __future__ import annotations

from contextlib import closing

import pytest

import agentpref
from agentpref.config import AnchorSettings, UpdateConfig
from agentpref.home import Home
from agentpref.prefer import ordinary
from agentpref.prefer.examples import is_held_out, read_examples
from agentpref.prefer.ordinary import outside_of, words
from agentpref.record.database import connect
from agentpref.record.store import Store

CONFIG = UpdateConfig()
WISHES = ("book a table", "play some jazz", "turn off the lamp", "write to Anna", "add milk")


def ask(text):
    return [{"role": "user", "content": text}]


def wish(number):
    return f"Please {WISHES[number % len(WISHES)]} number {number}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """40 judged statements, and 60 wishes in two tags that nobody judged, one hour apart."""
    place = Home.create(tmp_path_factory.mktemp("ordinary") / "home")
    with agentpref.Log(place.path) as log:
        for number in range(40):
            asked = ask(f"Is the following statement something you would say? It is {number}")
            log.compare(log.record(asked, "Yes"), log.record(asked, "No"), winner="a")
        for number in range(60):
            tags = ["rare"] if number % 10 == 0 else ["home"]
            log.record(ask(wish(number)), f"Done: {number}.", tags=tags)
    return place


def drawn(home, judged=None, namespace="default", **anchor):
    with closing(connect(home)) as connection:
        if judged is None:
            judged = read_examples(Store(connection), namespace, held_out=0.2).examples
        config = UpdateConfig(anchor=AnchorSettings(**anchor))
        return ordinary.draw(connection, namespace, config, judged)


def test_they_are_unjudged_answers_with_their_run_as_the_source_and_no_label(home):
    found = drawn(home)
    assert len(found) == 60
    with closing(connect(home)) as connection:
        runs = {run.run_id: run for run in Store(connection).runs("default")}
    for example in found:
        (run_id,) = example.provenance
        (completion,) = example.completions
        assert completion.message == runs[run_id].output
        assert (completion.label, example.origin, example.ordinary) == (None, "ordinary", True)
        assert not example.lone
        assert example.held_out == is_held_out(example.prompt.messages, CONFIG.held_out)
    assert {example.held_out for example in found} == {True, False}


def test_the_same_home_gives_the_same(home):
    assert drawn(home) == drawn(home)


def test_as_many_are_drawn_as_the_setting_says_in_equal_shares_of_tags(home):
    found = drawn(home, size=12)
    assert len(found) == 12
    assert sum(example.tag == "rare" for example in found) == 6
    assert drawn(home, size=0) == []


def test_what_is_asked_as_people_judge_is_no_anchor(home, tmp_path):
    place = Home.create(tmp_path / "home")
    with agentpref.Log(place.path) as log:
        for number in range(60):
            log.record(
                ask(f"Is the following statement something you would say? So {number}"), "No"
            )
            log.record(ask(wish(number)), "Done.")
    with closing(connect(home)) as connection:
        judged = read_examples(Store(connection), "default", held_out=0.2).examples
    found = drawn(place, judged)
    assert {example.completions[0].message["content"] for example in found} == {"Done."}
    assert len(found) == 60


def test_where_only_what_people_judge_is_asked_nothing_is_an_anchor(tmp_path):
    """Questions of all kinds, some of them judged: what is liked there holds for all."""
    place = Home.create(tmp_path / "home")
    subjects = ("cars", "trees", "the sea", "rain", "bread", "ships", "towns", "music", "birds", "")
    kinds = ["Why do people like", "How old are", "What is known of", "Who first wrote about"]
    with agentpref.Log(place.path) as log:
        for number in range(400):
            topic, kind = subjects[number % 10], kinds[number // 10 % 4]
            asked = ask(f"{kind} {topic} x{number % 7} in the year {1900 + number // 40}?")
            run = log.record(asked, f"Long answer {number}")
            if number % 3 == 0:
                log.compare(run, log.record(asked, "Short"), winner="b")
    assert len(drawn(place)) < 20


@pytest.mark.parametrize("judge", ["feedback", "comparison", "trace", "thumb"])
def test_what_somebody_judged_is_not_ordinary(tmp_path, judge):
    place = Home.create(tmp_path / "home")
    with agentpref.Log(place.path) as log:
        kept = log.record(ask("one"), "1", trace_id="a")
        run = log.record(ask("two"), "2", trace_id="b")
        if judge == "feedback":
            log.feedback(run, key="tone", score=0.5)
        elif judge == "thumb":
            log.thumbs(run, up=True)
        elif judge == "comparison":
            log.compare(log.record(ask("two"), "3"), run, winner="a")
        else:
            log.thumbs(log.record(ask("last"), "4", trace_id="b"), up=False)
    found = drawn(place, judged=())
    assert [example.provenance for example in found] == [(kept,)]
    with closing(connect(place)) as connection:
        again = ordinary.find(connection, "default", CONFIG, [kept, run])
    assert again == found, "so an interrupted update does not go on with it either"


def test_answers_that_say_nothing_or_were_cut_off_are_none(tmp_path):
    place = Home.create(tmp_path / "home")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    with agentpref.Log(place.path) as log:
        log.record(ask("one"), "  ")
        log.record(ask("two"), "cut off", metadata={"finish_reason": "length"})
        ended = log.record(ask("three"), "whole", metadata={"finish_reason": "stop"})
        called = log.record(
            ask("four"), {"role": "assistant", "content": None, "tool_calls": [call]}
        )
        first = log.record(ask("five"), "one of two")
        log.record(ask("five"), "the other")
    found = {example.provenance for example in drawn(place, judged=())}
    assert found == {(ended,), (called,), (first,)}


def test_another_namespace_has_its_own(home):
    assert drawn(home, judged=(), namespace="other") == []


def test_a_long_log_is_read_in_part_through_an_index(tmp_path):
    place = Home.create(tmp_path / "home")
    with agentpref.Log(place.path) as log:
        for number in range(3000):
            log.record(ask(f"number {number}"), "ok")
    with closing(connect(place)) as connection:
        read: list[str] = []
        store = Store.judged

        def judged(self, namespace, run_ids):
            read.extend(run_ids)
            return store(self, namespace, run_ids)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "judged", judged)
            patch.setattr(ordinary, "_READ", 64)
            config = UpdateConfig(anchor=AnchorSettings(size=16))
            found = ordinary.draw(connection, "default", config, ())
        assert len(found) == 16
        assert len(read) <= 128
        times = sorted(example.created_at for example in found)
        first, last = (
            connection.execute(f"SELECT {end}(created_at) FROM run").fetchone()[0]
            for end in ("min", "max")
        )
        assert times[-1] - times[0] > 0.5 * (last - first), "all times, and not the newest alone"
        plans: list[str] = []
        connection.set_trace_callback(plans.append)
        ordinary._candidates(connection, "default", 64)
        connection.set_trace_callback(None)
        for query in set(plans):
            for row in connection.execute(f"EXPLAIN QUERY PLAN {query}"):
                assert "SCAN run" not in row[3], query


def test_system_prompts_say_nothing_of_what_is_asked():
    system = {"role": "system", "content": "You are an assistant of the company"}
    assert words([system, *ask("Hello, World!")]) == {"hello", "world"}
    parts = [{"type": "text", "text": "a b"}, {"type": "image_url", "image_url": "x"}]
    assert words([{"role": "user", "content": parts}]) == {"a", "b"}
    assert words([system]) == words(ask(system["content"]))


def test_with_a_few_judged_prompts_nobody_knows_what_lies_outside():
    about = [frozenset({"would", "you", str(number)}) for number in range(5)]
    assert outside_of([frozenset({"book", "table"})], about) == [False]
    assert outside_of([frozenset({"book"})], []) == [True]
    assert outside_of([], about) == []
