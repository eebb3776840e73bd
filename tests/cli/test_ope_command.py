"""`ope`: what it prints, and its exit codes."""

from __future__ import annotations

import orjson
import pytest

import agentpref
from agentpref.serve.registry import Registry
from tests.core.test_offpolicy import QUESTION, home, sampler, taught  # noqa: F401


@pytest.fixture
def logged(home, sampler):  # noqa: F811
    with agentpref.Log(home) as log:
        sampler.draw(log, 60, temperature=1.0)
        run = log.record(QUESTION, "greedy", revision="base", token_ids=[5],
                         params={"temperature": 0})  # fmt: skip
        log.thumbs(run, up=True)
    return home


def test_it_says_what_each_would_earn_or_why_not(run, logged, random_base):
    said = run("ope", "--home", logged, "--model", random_base).out
    assert "60 answers with thumbs can be weighed; they earned 0." in said
    assert "written at temperature 0, where nothing else could have been: 1" in said
    live = Registry(logged).live().revision_id
    assert f"nothing is said of {live}: " in said


def test_json_has_all_of_it(run, logged, random_base):
    value = orjson.loads(run("ope", "--home", logged, "--model", random_base, "--json", "base").out)
    [base] = value["revisions"]
    assert base["low"] <= base["value"] <= base["high"]
    assert (value["answers"], value["left_out"]) == (60, {"greedy": 1})


def test_when_nothing_can_be_said_it_exits_5(run, home, random_base, sampler):  # noqa: F811
    with agentpref.Log(home) as log:
        sampler.draw(log, 3, temperature=1.0)
    said = run("ope", "--home", home, "--model", random_base, exits=5).out
    assert "3 answers can be weighed, and it takes 50" in said


def test_a_key_without_scores_is_said(run, home, random_base):  # noqa: F811
    said = run("ope", "--home", home, "--reward", "stars", "--model", random_base, exits=1).err
    assert "no answer of 'default' has a score under 'stars'" in said


def test_whole_conversations_have_a_discount_and_single_answers_none(run, logged, random_base):
    said = run(
        "ope", "base", "--whole", "--gamma", 0.9, "--home", logged, "--model", random_base
    ).out
    assert "60 conversations with thumbs can be weighed; they earned" in said
    error = run("ope", "--gamma", 0.9, "--home", logged, "--model", random_base, exits=2).err
    assert "add --whole" in error
    error = run("ope", "--whole", "--by", "length", "--home", logged, exits=2).err
    assert "leave it out beside --whole" in error
