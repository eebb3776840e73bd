"""`traces`: lines of JSON for programs, and statistics for people."""

from __future__ import annotations

import orjson

from agentpref.record.log import Log


def logged(home):
    with Log(home) as log:
        asked = [{"role": "user", "content": "a"}]
        first = log.record(asked, "b", thread_id="t")
        answer = {"role": "assistant", "content": "b"}
        log.record([*asked, answer, {"role": "user", "content": "c"}], "d", thread_id="t")
        log.feedback(first, key="resolved", score=1.0)
    return first


def test_each_conversation_is_a_line(run, home):
    first = logged(home)
    [line] = run(
        "traces", "--reward", "resolved=2", "--gamma", "0.5", "--cost", "0.5"
    ).out.splitlines()
    value = orjson.loads(line)
    assert (value["trace"], value["return"]) == ("t", 1.5 - 0.25)
    assert [step["done"] for step in value["steps"]] == [False, True]
    assert value["steps"][0]["run"] == first


def test_statistics_say_what_is_missing(run, home):
    logged(home)
    said = run("traces", "--stats").out
    assert "1, with 2 steps" in said
    assert "no conversation has a score under thumbs" in said
    assert orjson.loads(run("traces", "--stats", "--json").out)["traces"] == 1


def test_a_wrong_weight_is_said(run, home):
    logged(home)
    assert (
        "'resolved=much' is no KEY=WEIGHT"
        in run("traces", "--reward", "resolved=much", exits=2).err
    )
