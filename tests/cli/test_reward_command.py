"""`agentpref reward` and `agentpref ask`, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agentpref.record.log import Log
from agentpref_cli.main import app

SHORT, LONG = "Just {}.", "Well, that is a long story about the number {}, you see."


@pytest.fixture
def compared(home: Path) -> Path:
    """90 comparisons in which the shorter answer is better, and 10 pairs that nobody compared."""
    with Log(home) as log:
        for number in range(100):
            asked = [{"role": "user", "content": f"What about {number}?"}]
            runs = [log.record(asked, text.format(number), tags=["chat"]) for text in (SHORT, LONG)]
            if number < 90:
                log.compare(*runs, winner="a", user_id="ana")
    return home


def test_a_model_is_fitted_listed_and_scores(run, compared, tmp_path) -> None:
    shown = run("reward", "fit", "--model", "tiny", "--quiet").out
    assert "is fitted on" in shown
    assert "(1.00, 0." in shown
    assert "chat\t" in shown
    (kept,) = run("reward", "list", "--json").json["rewards"]
    assert kept["name"] in run("reward", "list").out
    (judge,) = run("judge", "list", "--json").json["judges"]
    assert (judge["judge"], judge["model"], judge["engine"]) == (
        "reward", kept["name"], "reward model",
    )  # fmt: skip
    assert judge["trusted"]["chat"] < 0.2
    assert "reward" in run("judge", "list").out
    file = tmp_path / "asked.jsonl"
    asked = {"prompt": "What about 500?", "answers": [LONG.format(500), SHORT.format(500)]}
    file.write_text(json.dumps(asked) + "\n\n", encoding="utf-8")
    found = run("reward", "score", file, "--json").json
    assert found["best"] == 1
    assert found["scores"][0] == pytest.approx(-found["scores"][1], abs=1e-4)
    controlled = run("reward", "score", file, "--length-controlled", "--json").json
    assert controlled["scores"][1] < found["scores"][1]
    assert run("reward", "score", file, "--name", kept["name"], "--json").json == found
    assert "best\t+" in run("reward", "score", file).out


def test_the_frontier_is_shown_drawn_and_kept_for_updates(run, compared, tmp_path) -> None:
    run("reward", "fit", "--model", "tiny", "--quiet")
    failed = run("update", "--model", "tiny", "--set", "gate.kl_budget=auto", exits=2).err
    assert "run `agentpref reward frontier`" in failed
    some = ("--prompts", 3, "--samples", 4, "--answer-tokens", 8, "--quiet")
    plot = tmp_path / "frontier.svg"
    shown = run("reward", "frontier", *some, "--plot", plot).out
    assert "best of 4\t0.64\t" in shown
    assert "gate.kl_budget=auto" in shown
    assert "gold, cross-fitted" in plot.read_text(encoding="utf-8")
    found = run("reward", "frontier", *some, "--json").json
    assert [one["n"] for one in found["points"]] == [1, 2, 4]
    assert found["gold"] == "cross-fitted"
    wrong = run("reward", "frontier", "--plot", tmp_path / "x.txt", exits=2).err
    assert "must end in .svg, .png, .pdf" in wrong


def test_a_fit_without_enough_to_prove_it_exits_5(run, home) -> None:
    with Log(home) as log:
        for number in range(6):
            asked = [{"role": "user", "content": f"What about {number}?"}]
            runs = [log.record(asked, text.format(number)) for text in (SHORT, LONG)]
            log.compare(*runs, winner="a")
    shown = run("reward", "fit", "--model", "tiny", "--quiet", exits=5).out
    assert "nothing is kept" in shown
    assert "no reward model" in run("reward", "list").out
    assert "has no reward model" in run("reward", "score", "/dev/null", exits=1).err


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", '{"prompt": "x"}', '{"answers": ["a"]}', '{"prompt": "x", "answers": [1]}',
        '{"messages": ["x"], "answers": ["a"]}',
        '{"messages": [{"content": "x"}], "answers": ["a"]}',
        '{"prompt": "\\ud800", "answers": ["a"]}',
    ],
)  # fmt: skip
def test_a_line_that_asks_nothing_is_refused_by_its_number(
    run, compared, monkeypatch, line
) -> None:
    monkeypatch.setattr("agentpref.reward.open_reward", lambda *given, **more: None)
    file = compared / "asked.jsonl"
    file.write_text(line, encoding="utf-8")
    assert "line 1" in run("reward", "score", file, exits=2).err


def test_what_cannot_be_read_is_named_by_its_line_and_a_damaged_model_by_its_file(
    run, compared
) -> None:
    run("reward", "fit", "--model", "tiny", "--quiet")
    file = compared / "asked.jsonl"
    file.write_text(json.dumps({"prompt": "x", "answers": ["word " * 5_000]}), encoding="utf-8")
    assert "line 1: an answer cannot be read" in run("reward", "score", file, exits=1).err
    file.write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in run("reward", "score", file, exits=2).err
    (model,) = (compared / "rewards").glob("*/reward-*.safetensors")
    with model.open("ab") as opened:
        opened.write(b"x")
    assert "is not the file that was written" in run("reward", "list").out


def test_questions_are_asked_and_answers_are_logged(run, compared) -> None:
    lines = "1 it is shorter\n2\nwhat\nt\nu\ns\nu\ns\nb\n"
    done = CliRunner().invoke(app, ["ask", "--n", "8", "--user-id", "eve"], input=lines)
    assert done.exit_code == 0, done.output
    assert "there is no reward model" in done.stdout
    assert "1 of 8 · chat" in done.stdout
    assert "3 answered, 1 skipped" in done.stdout
    assert run("stats", "--json").json["default"]["comparisons"] == 90 + 4


def test_questions_are_printed_as_json_and_none_is_asked(run, compared) -> None:
    found = run("ask", "--n", "4", "--json").json
    assert (len(found["questions"]), found["rule"]) == (4, "random")
    assert {"messages", "first", "second", "tag", "why", "question", "repeated"} == {
        *found["questions"][0]
    }


def test_a_log_without_second_answers_has_nothing_to_ask(run, home) -> None:
    with Log(home) as log:
        log.record([{"role": "user", "content": "Hello?"}], "Hello!")
    assert "there is nothing to ask" in run("ask").out


def test_a_gateway_without_a_model_has_no_reward(run, home) -> None:
    error = run("gateway", "--upstream", "http://127.0.0.1:9/v1", "--reward", exits=2).err
    assert "--reward chooses among answers of --model" in error
