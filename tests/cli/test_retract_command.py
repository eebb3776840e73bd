"""`retract`: what it takes back, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

import agentpref


@pytest.fixture
def said(home: Path) -> tuple[str, str]:
    """Two runs, compared by nobody in particular; the first one was liked by Ada."""
    asked = [{"role": "user", "content": "hello"}]
    with agentpref.Log(home) as log:
        first, second = (log.record(asked, text) for text in ("hi", "good morning"))
        log.thumbs(first, up=True, user_id="ada")
        log.compare(first, second, winner="b")
    return first, second


def test_a_thumb_is_taken_back(run, said) -> None:
    out = run("retract", said[0], "--user-id", "ada").out
    assert out == "taken back: 1\nsaid of this run and not taken back: comparison 1\n"
    assert run("pairs", "--json").json["thumbs"] == 0
    assert run("pairs", "--json").json["left_out"] == {"retracted": 1, "retraction": 1}


def test_a_comparison_is_taken_back(run, said) -> None:
    value = run("retract", said[0], "--against", said[1], "--json").json
    assert (value["run"], value["retracted"], value["left"]) == (said[0], 1, {"thumbs": 1})
    assert run("pairs", "--json").json["strata"] == []


def test_everything_of_a_voter_is_taken_back(run, said) -> None:
    assert run("retract", said[0], "--all", "--json").json["left"] == {"thumbs": 1}
    assert run("retract", said[0], "--all", "--user-id", "ada", "--json").json["left"] == {}


def test_who_has_said_nothing_is_told_so(run, said) -> None:
    out = run("retract", said[0], "--user-id", "bob").out
    assert out.startswith("this voter has said no such thing; check RUN, --key, --user-id")
    assert "comparison 1, thumbs 1" in out


def test_an_unknown_run_is_refused(run, said) -> None:
    assert "no run 'nowhere'" in run("retract", "nowhere", exits=1).err
