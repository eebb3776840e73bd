"""What is told beside a report: counts of feedback, all revisions, lineage, and what to label."""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from dataclasses import replace

import orjson
import pytest

import agentpref
from agentpref import overview
from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.journal import Entry, find, listed
from agentpref.serve.registry import Registry
from agentpref.types import BASE
from tests.core.test_pipeline import CONFIG, NO, YES, learn, teach

STRICT = replace(CONFIG, gate=replace(CONFIG.gate, kl_budget=1e-9))


@pytest.fixture(scope="module")
def three_nights(tmp_path_factory, random_base):
    """A home with two revisions and a refused third update, and its reports."""
    home = tmp_path_factory.mktemp("three_nights") / "home"
    teach(home, range(40))
    with agentpref.Log(home) as log:
        for number in range(100, 112):
            asked = [{"role": "user", "content": f"Is {number} a number?"}]
            run = log.record(asked, YES if number % 2 else NO, tags=["thumbed"])
            log.thumbs(run, up=bool(number % 2))
    first = learn(home, random_base)
    # Of these two, the first revision prefers the other one: there is much to gain.
    teach(home, range(80), chosen="an enemy", rejected="a friend", question="Who is {}?")
    second = learn(home, random_base)
    teach(home, range(40), chosen="blue", rejected="red", question="Which colour is {}?")
    third = learn(home, random_base, STRICT)
    assert [r.verdict for r in (first, second, third)] == ["promoted", "promoted", "refused"]
    return home, first, second, third


@pytest.fixture
def home(three_nights, tmp_path):
    return shutil.copytree(three_nights[0], tmp_path / "home")


def told(home, name):
    with closing(connect(Home.open(home), readonly=True)) as connection:
        return overview.overview(connection, Home.open(home), find(connection, name))


def entry(number, verdict="promoted", times=1, **report):
    report = {"accuracy": {}, "checks": [], **report}
    revision = f"rev-{number:06d}-abcdefabcdef" if verdict == "promoted" else None
    return Entry(f"u-{number}", "default", float(number), verdict, revision, report, times,
                 float(number), True)  # fmt: skip


def test_all_is_plain_values(home, three_nights) -> None:
    value = told(home, three_nights[1].update_id)
    assert orjson.loads(orjson.dumps(value)) == value


def test_the_new_examples_of_an_update_are_counted_by_what_they_came_from(home, three_nights):
    first = three_nights[1]
    found = told(home, first.update_id)["learned_from"]
    trained = first.counts["trained"] + first.counts["trained_thumbs"]
    held_out = first.counts["new_evaluated"] + first.counts["new_evaluated_thumbs"]
    for rows in found.values():
        assert sum(row["trained"] for row in rows) == trained
        assert sum(row["held_out"] for row in rows) == held_out
    assert [row["name"] for row in found["source"]] == ["human"]
    assert {row["name"] for row in found["origin"]} == {"comparison", "thumb"}
    assert {row["name"] for row in found["tag"]} == {"untagged", "thumbed"}
    assert [row["name"] for row in found["date"]] == [time.strftime("%Y-%m-%d")]


def test_examples_whose_judgements_were_removed_are_counted_as_gone(home, three_nights) -> None:
    first = three_nights[1]
    with closing(connect(Home.open(home))) as connection:
        connection.execute("DELETE FROM example")
    rows = told(home, first.update_id)["learned_from"]["tag"]
    assert [row["name"] for row in rows] == [overview.GONE]
    assert told(home, first.update_id)["learned_from"]["source"][0]["name"] == "human"


def test_what_a_refused_update_tried_is_counted_as_set_aside(home, three_nights) -> None:
    """The page said "Nothing: it tried no new feedback" beside 62 trained pairs."""
    third = three_nights[3]
    found = told(home, third.update_id)["learned_from"]
    for rows in found.values():
        assert sum(row["set_aside"] for row in rows) == 40
        assert not any(row["trained"] or row["held_out"] or row["known"] for row in rows)


@pytest.mark.parametrize(
    ("role", "fate"),
    [("new", "trained"), ("held_out", "held_out"), ("set_aside", "set_aside"), ("known", "known")],
)
def test_every_use_of_a_new_example_is_counted_under_its_name(home, three_nights, role, fate):
    first = three_nights[1]
    with closing(connect(Home.open(home))) as connection:
        connection.execute(
            "UPDATE update_pair SET role = ? WHERE update_id = ?", (role, first.update_id)
        )
        rows = overview.learned_from(connection, find(connection, first.update_id))["source"]
    (row,) = rows
    assert {name for name in ("trained", "held_out", "set_aside", "known") if row[name]} == {fate}


def test_the_history_has_every_update_that_trained_with_its_distance(home, three_nights) -> None:
    _, first, second, third = three_nights
    found = told(home, third.update_id)["history"]
    assert [row["update_id"] for row in found] == [r.update_id for r in (first, second, third)]
    assert [row["revision"] for row in found] == [first.revision, second.revision, None]
    assert [row["serves"] for row in found] == [None, "live", None]
    assert all(row["kl"] > 0 for row in found)
    assert [row["kl_budget"] for row in found] == [1e3, 1e3, 1e-9]
    assert found[1]["accuracy"] == second.accuracy
    assert found[1]["retained"] == second.retained
    assert second.retained["untagged"]["pairs"] < second.accuracy["untagged"]["pairs"]


def test_the_line_goes_from_the_base_to_the_revision_and_says_what_serves(home, three_nights):
    _, first, second, third = three_nights
    line = told(home, second.revision)["lineage"]
    assert [one["revision"] for one in line] == [BASE, first.revision, second.revision]
    assert [one["serves"] for one in line] == [None, None, "live"]
    assert told(home, third.update_id)["lineage"] == line, "a refused one started from there"
    registry = Registry(home)
    registry.rollback()
    registry.quarantine(second.revision, "it is rude")
    line = told(home, second.revision)["lineage"]
    assert [one["serves"] for one in line] == [None, "live", None]
    assert line[-1]["standing"] == "in quarantine"
    registry.promote("base")
    registry.canary(first.revision, 0.5)
    line = told(home, first.revision)["lineage"]
    assert [one["serves"] for one in line] == ["live", "canary"]


def test_judgements_that_no_update_has_read_are_counted(home, three_nights) -> None:
    assert told(home, three_nights[1].update_id)["unread"] == 0
    teach(home, range(900, 903))
    with agentpref.Log(home, namespace="shop") as log:
        log.thumbs(log.record([{"role": "user", "content": "Who?"}], "A friend."), up=True)
    assert told(home, three_nights[1].update_id)["unread"] == 3


def night(number, verdict="promoted", parent=None, **retained):
    """An update that measured some tags, before and after, on what live had learned."""
    measured = {
        tag: {"pairs": pairs, "before": before, "after": after}
        for tag, (before, after, pairs) in retained.items()
    }
    found = entry(number, verdict, accuracy={**measured} or {"a": {}}, retained=measured)
    revision = f"rev-{number:06d}-abcdefabcdef"
    parent = f"rev-{parent:06d}-abcdefabcdef" if parent else None
    return found._replace(revision=revision, report={**found.report, "parent": parent})


def lost(nights, live):
    rows = overview.forgetting(overview.history(nights), f"rev-{live:06d}-abcdefabcdef")
    return {row["tag"]: (row["lost"], int(row["best_revision"][4:10])) for row in rows}


def test_what_was_lost_since_the_best_revision_comes_first() -> None:
    nights = [
        night(1),
        night(2, parent=1, a=(0.9, 0.8, 20), few=(1.0, 0.5, 19)),
        night(3, "refused", parent=2, a=(0.8, 0.1, 20)),
        night(4, parent=2, a=(0.8, 0.6, 20), b=(0.7, 0.9, 20)),
        night(5, "insufficient", parent=4, a=(0.6, 0.2, 20)),
    ]
    assert lost(nights, 4) == {"a": (0.3, 1), "b": (0.0, 4)}
    assert [*lost(nights, 4)] == ["a", "b"]
    assert lost(nights, 2) == {"a": (0.1, 1)}, "after a rollback"
    assert lost(nights, 5)["a"] == (0.7, 1), "people made it live"
    assert overview.forgetting(overview.history(nights), None) == []


def test_people_who_changed_their_minds_made_nothing_forgotten() -> None:
    """It said "care: 0.64 now, 0.95 after rev-000003", of the opposite judgements."""
    before = [night(1), night(2, parent=1, care=(0.9, 0.95, 21))]
    turned = night(3, parent=2, style=(1.0, 1.0, 20))
    turned.report["accuracy"]["care"] = {"pairs": 22, "before": 0.0, "after": 0.27}
    turned.report["changed"] = [{"tag": "care", "aged_out": 90}, {"tag": "style", "state": "x"}]
    nights = [*before, turned, night(4, parent=3, care=(0.27, 0.64, 22))]
    assert lost(nights, 4)["care"] == (0.0, 4)
    assert [row["turned"] for row in overview.history(nights)] == [[], [], ["care"], []]


def test_another_topic_under_the_same_tag_is_not_forgetting() -> None:
    """On old and new pairs together the tag fell from 1.00 to .81."""
    later = night(3, parent=2, style=(1.0, 1.0, 20))
    later.report["accuracy"]["style"] = {"pairs": 32, "before": 0.63, "after": 0.81}
    nights = [night(1), night(2, parent=1, style=(1.0, 1.0, 20)), later]
    assert lost(nights, 3) == {"style": (0.0, 1)}


def test_reports_without_what_was_retained_are_compared_on_all_of_a_tag() -> None:
    nights = [night(1, a=(0.5, 0.9, 20)), night(2, parent=1, a=(0.9, 0.8, 20))]
    for one in nights:
        del one.report["retained"]
    assert lost(nights, 2) == {"a": (0.1, 1)}


def test_the_first_line_of_a_mail_tells_what_happened_in_the_order_of_its_weight() -> None:
    nights = [entry(1, "refused"), entry(2), entry(3, "nothing_new", times=4), entry(4, "failed")]
    assert overview.subject(nights, "since yesterday") == (
        "1 promoted, 1 refused, 1 failed since yesterday"
    )
    assert overview.subject(nights[2:3], "today") == "4 nothing new today"
    assert overview.subject([], "since yesterday") == "no update since yesterday"


def test_updates_of_some_time_are_those_that_ended_since_the_oldest_first(home, three_nights):
    with closing(connect(Home.open(home), readonly=True)) as connection:
        everything = overview.since(connection, 0.0)
        ids = [one.update_id for one in everything]
        assert ids == [report.update_id for report in three_nights[1:]]
        assert len(listed(connection)) == len(ids)
        second = everything[1]
        ended = second.created_at + second.report["seconds"]
        assert [e.update_id for e in overview.since(connection, ended)] == ids[1:]
        assert overview.since(connection, time.time() + 1) == []
        assert overview.since(connection, 0.0, "shop") == []
