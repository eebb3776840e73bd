"""`keys`: which keys are preferences, and what `stats` and `pairs` say of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

import agentpref


@pytest.fixture
def scored(home: Path) -> Path:
    """Three stars and a latency, under keys that nobody declared, and a thumb."""
    with agentpref.Log(home) as log:
        for number, stars in enumerate((1, 4, 5)):
            run = log.record([{"role": "user", "content": f"{number}?"}], "yes")
            log.feedback(run, key="stars", score=stars)
        log.feedback(run, key="latency", score=0.3, source="code")
        log.thumbs(run, up=True)
    return home


def test_scores_under_undeclared_keys_are_counted_with_the_cure(run, scored) -> None:
    assert run("stats", "--json").json["default"]["undeclared"] == {"latency": 1, "stars": 3}
    out = run("stats").out
    assert "scores in default that train nothing: latency 1, stars 3; if they are prefer" in out
    assert "agentpref keys declare" in out
    assert run("pairs", "--json").json["left_out"] == {"undeclared_key": 4}
    assert "left out, undeclared key: 4; if they are preferences, declare" in run("pairs").out


def test_a_declared_key_counts_from_then_on_and_not_after_it_is_taken_back(run, scored) -> None:
    out = run("keys", "declare", "stars", "--low", "1", "--high", "5").out
    assert out == "scores under stars are preferences, from 1 to 5\n"
    assert run("pairs", "--json").json["left_out"] == {"undeclared_key": 1, "repeated": 1}
    assert run("keys", "undeclare", "stars").out == "scores under stars train nothing any more\n"
    assert run("pairs", "--json").json["left_out"] == {"undeclared_key": 4}
    assert run("keys", "undeclare", "stars").out == "stars was not declared\n"


def test_keys_are_listed(run, scored) -> None:
    run("keys", "declare", "stars", "--low", "1", "--high", "5")
    lines = [line.split("\t")[:5] for line in run("keys", "list").out.splitlines()]
    assert lines == [
        ["key", "source", "scores", "counts as", "scale"],
        ["latency", "code", "1", "measurement", "-"],
        ["stars", "code", "0", "preference", "1 to 5"],
        ["stars", "human", "3", "preference", "1 to 5"],
        ["stars", "model", "0", "preference", "1 to 5"],
        ["thumbs", "human", "1", "preference", "0 to 1"],
    ]
    first = run("keys", "list", "--json").json["keys"][0]
    assert (first["key"], first["low"], first["declared"]) == ("latency", None, False)
    refused = run("keys", "list", "--namespace", "other", exits=1).err
    assert "no namespace 'other' is in this home; it has 'default'" in refused


def test_another_scale_needs_a_word(run, scored) -> None:
    run("keys", "declare", "stars", "--low", "1", "--high", "5")
    assert "are from 1 to 5 already" in run("keys", "declare", "stars", exits=2).err
    run("keys", "declare", "stars", "--replace")
    assert "thumbs are always preferences" in run("keys", "undeclare", "thumbs", exits=1).err
    assert "thumbs are from 0 to 1" in run("keys", "declare", "thumbs", "--high", "5", exits=1).err
