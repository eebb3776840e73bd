"""What to label next: tags by what could be lost in them unseen."""

from __future__ import annotations

import math
from contextlib import closing

import pytest

import agentpref
from agentpref.config import GateSettings
from agentpref.home import Home
from agentpref.labelling import label_next
from agentpref.prefer.catalog import Catalog
from agentpref.prefer.examples import is_held_out
from agentpref.prove.retention import retention_margin
from agentpref.record.database import connect
from agentpref.record.journal import Entry
from agentpref.record.updates import UpdateRow, Updates

SHARE = 0.4


def asked(number):
    return [{"role": "user", "content": f"Is {number} a number?"}]


@pytest.fixture
def home(tmp_path):
    return Home.create(tmp_path / "home")


@pytest.fixture
def say(home):
    """Log 30 comparisons, likes or dislikes under a tag."""

    def call(tag, *, up=None, start=0):
        with agentpref.Log(home.path) as log:
            for number in range(start, start + 30):
                run = log.record(asked(number), f"yes, {tag}", tags=[tag])
                if up is None:
                    log.compare(run, log.record(asked(number), "no", tags=[tag]), winner="a")
                else:
                    log.thumbs(run, up=up)
        return sum(is_held_out(asked(number), SHARE) for number in range(start, start + 30))

    return call


@pytest.fixture
def next_labels(home):
    """The tags to label next, by their names, in order."""

    def call(live=None, **config):
        report = {"config": {"held_out": SHARE, "gate": {"min_stratum": 50}, **config}}
        update = Entry("u", "default", 1.0, "promoted", None, report, 1, 1.0, True)
        with closing(connect(home)) as connection:
            Catalog(connection, "default", held_out=SHARE).refresh()
            return {row["tag"]: row for row in label_next(connection, update, live)}

    return call


def test_the_loss_that_is_surely_refused_is_the_margin_of_the_gate(say, next_labels) -> None:
    """It said that a tag of fewer than 50 held-out prompts is not judged by itself."""
    held_out = say("care")
    (row,) = next_labels().values()
    assert (row["held_out_prompts"], row["trained"]) == (held_out, 30 - held_out)
    assert row["unseen_loss"] == retention_margin(held_out, 1, GateSettings())
    halved = retention_margin(held_out + round(row["more"] * SHARE), 1, GateSettings())
    assert halved == pytest.approx(row["unseen_loss"] / 2, rel=0.15)
    assert row["more"] == math.ceil(3 * held_out / SHARE)


def test_thumbs_count_in_equal_numbers_and_of_one_kind_not_at_all(say, next_labels) -> None:
    say("likes", up=True)
    say("dislikes", up=False, start=30)
    even = min(say("both", up=True, start=60), say("both", up=False, start=90))
    care = say("care", start=120)
    rows = next_labels()
    assert {tag: row["one_kind"] for tag, row in rows.items()} == {
        "care": None, "both": None, "dislikes": "dislikes", "likes": "likes",
    }  # fmt: skip
    assert [*rows][2:] == ["dislikes", "likes"], "more of the same would prove nothing"
    assert rows["both"]["held_out_prompts"] == 2 * even
    assert [rows[tag]["held_out_prompts"] for tag in ("care", "likes")] == [care, 0]
    assert rows["likes"]["unseen_loss"] is None


def test_what_was_set_aside_or_aged_out_is_no_evidence(home, say, next_labels) -> None:
    for number, (tag, role) in enumerate((("bots", "set_aside"), ("care", "aged_out"))):
        say(tag)
        with closing(connect(home)) as connection:
            Catalog(connection, "default", held_out=SHARE).refresh()
            query = "SELECT example_id FROM example WHERE tag = ?"
            ids = [name for (name,) in connection.execute(query, (tag,))]
            made = f"rev-{number}"
            Updates(connection).add(
                UpdateRow(made, "default", number, number, None, made, "", {},
                          dict.fromkeys(ids, role))
            )  # fmt: skip
    say("music", start=60)
    assert {*next_labels("rev-1")} == {"music"}
    assert {*next_labels(None)} == {"music", "care"}, "it aged out for a revision and what follows"


def test_more_of_a_tag_that_never_trains_is_not_asked_for(say, next_labels) -> None:
    say("care")
    say("music", start=40)
    assert {*next_labels()} == {"care", "music"}
    assert {*next_labels(held_out_tags=["music"])} == {"care"}


def test_a_home_without_examples_has_nothing_to_label(next_labels) -> None:
    assert next_labels() == {}
