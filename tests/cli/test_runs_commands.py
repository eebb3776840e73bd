"""`runs`, `show` and `thumbs`: find a model call, see what became of it, judge it."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

import agentpref

LONG = "Why is the sky blue? " * 9


@pytest.fixture
def logged(home: Path) -> list[str]:
    """Three runs: the oldest in a thread and of a trace, the second with a tag, by Ada."""
    with agentpref.Log(home) as log:
        trace = str(uuid4())
        first = log.record(_asked(LONG), "Rayleigh", thread_id="t-1", trace_id=trace)
        second = log.record(_asked("2 + 2?"), "5", user_id="ada", tags=["maths", "easy"])
        third = log.record(_asked("100% \u202e\x1b[31m?"), "no \x9b idea", revision="rev-1")
    with agentpref.Log(home, namespace="other") as log:
        log.record(_asked("elsewhere"), "yes")
    return [first, second, third, trace]


def _asked(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


def _found(run, *options: str) -> list[str]:
    return [one["run_id"] for one in run("runs", *options, "--json").json["runs"]]


def test_runs_are_listed_newest_first(run, logged) -> None:
    first, second, third, _ = logged
    assert _found(run) == [third, second, first]
    head, *lines = run("runs").out.splitlines()
    assert head.split("\t") == ["run", "time", "thread", "prompt", "answer", "judged"]
    assert [line.split("\t")[0] for line in lines] == [third, second, first]
    assert lines[2].split("\t")[2:] == ["t-1", LONG[:39] + "…", "Rayleigh", "0"]
    assert run("runs", "--limit", "1", "--json").json["more"] is True
    assert run("runs", "--limit", "3", "--json").json["more"] is False


def test_runs_are_found_by_what_is_known_of_them(run, logged) -> None:
    first, second, third, trace = logged
    assert _found(run, "--thread", "t-1") == [first]
    for spelling in (trace, trace.upper(), trace.replace("-", ""), f"lc_run--{trace}"):
        assert _found(run, "--trace", spelling) == [first]
    assert _found(run, "--tag", "easy") == [second]
    assert _found(run, "--user", "ada") == [second]
    assert _found(run, "--user", "bob") == []
    assert _found(run, "--text", "SKY blue") == [first]
    assert _found(run, "--text", "100%") == [third]
    assert _found(run, "--text", "brief") == [], "it is in every system prompt"
    assert _found(run, "--text", "2", "--tag", "hard") == []
    assert len(_found(run, "--namespace", "other")) == 1
    assert run("runs", "--tag", "hard").out == "no such runs\n"


def test_a_user_is_not_looked_for_without_the_keys(run, logged, home) -> None:
    (home / "user.keys").unlink()
    assert "restore it from a backup" in run("runs", "--user", "ada", exits=1).err
    assert len(_found(run)) == 3


def test_a_run_is_shown_with_all_that_is_known_of_it(run, logged, home) -> None:
    _, second, third, _ = logged
    run("thumbs", second, "down", "--comment", "it is four", "--user-id", "bob")
    with agentpref.Log(home) as log:
        log.feedback(second, key="latency", score=0.25, source="code")
        log.correct(second, "4")
    out = run("show", second).out
    assert f"run {second}, 20" in out
    assert "tags maths, easy" in out
    assert "[system]\nBe brief.\n\n[user]\n2 + 2?\n\n[assistant]\n5\n" in out
    assert "\tit is four\t" in out
    assert "\tlatency\t0.25\tcode\t-\t-\tundeclared_key" in out
    assert "correction\trejected\t" in out
    value = run("show", second, "--json").json
    assert value["run"]["messages"][1] == {"role": "user", "content": "2 + 2?"}
    assert [said["key"] for said in value["feedback"]] == ["thumbs", "latency", "correction"]
    assert run("show", third).out.endswith("to judge it, use agentpref thumbs\n")
    assert "revision rev-1" in run("show", third).out


def test_what_people_wrote_cannot_move_the_cursor(run, logged) -> None:
    for command in (
        ("runs",),
        ("runs", "--json"),
        ("show", logged[2]),
        ("show", logged[2], "--json"),
    ):
        out = run(*command).out
        assert not {"\x1b", "\x9b", "\u202e"} & {*out}
    assert r"\u001b[31m" in run("show", logged[2]).out


def test_a_beginning_of_the_id_is_enough_for_every_command(run, logged) -> None:
    first, second, *_ = logged
    start = second[:30]
    assert run("show", start, "--json").json["run"]["run_id"] == second
    for command in (("thumbs", start, "up"), ("retract", start)):
        assert run(*command, "--json").json["run"] == second
    assert "several runs begin with" in run("show", first[:4], exits=1).err
    for command in (("show", "nope"), ("thumbs", "nope", "up"), ("retract", "nope")):
        err = run(*command, exits=1).err
        assert "no run 'nope' is in this home" in err
        assert "agentpref runs" in err


def test_a_thumb_is_given_and_a_newer_one_counts(run, logged) -> None:
    _, second, *_ = logged
    assert run("thumbs", second, "up").out == f"thumbs up on run {second}\n"
    value = run("thumbs", f"lc_run--{second}", "down", "--source", "model", "--json").json
    assert (value["run"], value["up"]) == (second, False)
    assert run("thumbs", second, "down").out == f"thumbs down on run {second}\n"
    assert run("pairs", "--json").json["left_out"] == {"superseded": 1, "uncalibrated_judge": 1}
    run("thumbs", second, "sideways", exits=2)


def test_bytes_that_are_no_text_are_bad_usage(run, logged) -> None:
    for option in ("--thread", "--trace", "--tag", "--user", "--text"):
        assert f"for {option}: " in run("runs", option, "\udcff", exits=2).err
    for command in (("show", "\udcff"), ("thumbs", "\udcff", "up")):
        assert "is not UTF-8" in run(*command, exits=2).err


def test_no_command_makes_a_home(run, home) -> None:
    for command in (("runs",), ("show", "r"), ("thumbs", "r", "up"), ("keys", "list")):
        assert "is not an agentpref home" in run(*command, exits=1).err
    assert "is not an agentpref home" in run("keys", "declare", "stars", exits=1).err
    assert not home.exists()
