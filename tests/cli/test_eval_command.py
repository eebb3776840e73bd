"""`eval`: what it prints, what it refuses, and that Ctrl-C leaves everything as it was."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from agentpref.prove import evaluate as measures
from tests.core.test_pipeline import learn, teach

NUMBERS = 30
DAY = 86_400


@pytest.fixture(scope="module")
def promoted(tmp_path_factory, random_base) -> Path:
    """A home after one update that was promoted."""
    home = tmp_path_factory.mktemp("promoted") / "home"
    teach(home, range(NUMBERS))
    assert learn(home, random_base).verdict == "promoted"
    return home


@pytest.fixture
def served(promoted, home) -> Path:
    """The same, where commands find it."""
    return shutil.copytree(promoted, home)


@pytest.fixture
def file(tmp_path) -> Path:
    """Ten preferences on questions that no update has seen."""
    rows = tmp_path / "last-month.jsonl"
    line = '{{"prompt": "Is {} a number?", "chosen": "yes", "rejected": "no, never"}}\n'
    rows.write_text("".join(line.format(n) for n in range(100, 110)))
    return rows


def tables(out: str) -> list[list[str]]:
    return [line.split("\t") for line in out.splitlines() if "\t" in line]


def test_it_shows_accuracy_distance_and_whether_the_live_revision_is_better(run, served) -> None:
    result = run("eval")
    first, *_ = result.out.splitlines()
    assert first.startswith("all held-out examples: ")
    rows = tables(result.out)
    assert rows[0] == ["revision", "serves", "KL from base", "examples trained on"]
    assert (rows[1][0], rows[2][1]) == ("base", "live")
    assert rows[3] == ["accuracy", "examples", "base", "rev-000001"]
    assert rows[4][2] == "0.50"
    assert rows[4][3].startswith("1.00 [0.")
    headings, values = rows[5:7]
    assert headings[0] == "rev-000001 against base"
    assert (values[0], values[-1]) == ("all", "better")
    assert "load model" in result.err.splitlines()
    assert "KL of rev-000001-" in result.err


def test_json_is_one_object_and_quiet_shows_no_progress(run, served, file) -> None:
    result = run("eval", "1", "--on", file, "--json", "--quiet")
    assert result.err == ""
    value = result.json
    assert value["on"] == f"the file {file}"
    (group,) = value["groups"]
    assert (group["examples"], group["thumbs"], group["prompts"]) == (10, 0, 10)
    assert next(iter(group["accuracy"].values()))["method"] == "exact"
    assert value["revisions"][0]["serves"] == "live"


def test_what_serves_and_what_was_logged_stay(run, served, file) -> None:
    before = run("adapters", "list", "--json").json, run("stats", "--json").json
    run("eval", "--on", file)
    run("eval", "--limit", 3, "--since", "1d")
    assert (run("adapters", "list", "--json").json, run("stats", "--json").json) == before
    assert run("verify", "--json").json["problems"] == []


def test_an_age_is_shown_as_the_time_that_it_means(run, served) -> None:
    before = time.time() - DAY
    value = run("eval", "--since", "1d", "--json").json
    assert before <= value["since"] <= time.time() - DAY
    assert run("eval", "--json").json["since"] is None
    first = run("eval", "--since", "2020-01-02 12:30").out.splitlines()[0]
    assert first.startswith("all held-out examples judged since 2020-01-02 12:30:00: ")


def test_a_file_comes_from_standard_input_too(served, file) -> None:
    from typer.testing import CliRunner

    from agentpref_cli.main import app

    done = CliRunner().invoke(app, ["eval", "--on", "-", "-q"], input=file.read_bytes())
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("the file <stdin>: 10 examples") or "10 examples" in done.stdout


def test_prompts_that_trained_are_counted_and_scored_only_when_asked_for(run, served, file) -> None:
    file.write_text(
        file.read_text()
        + "".join(
            f'{{"prompt": "Is {n} a number?", "chosen": "yes", "rejected": "no"}}\n'
            for n in range(NUMBERS)
        )
    )
    value = run("eval", "--on", file, "--json").json
    trained = value["left_out"]["trained"]
    assert 0 < trained < NUMBERS
    assert f"left out: {trained}, their prompts trained a revision" in run("eval", "--on", file).out
    out = run("eval", "--on", file, "--with-trained").out
    assert "left out" not in out
    assert f"all, trained\t{trained}\t" in out


@pytest.mark.parametrize(
    ("arguments", "exits", "words"),
    [
        (["9"], 1, "no revision '9'"),
        (["base"], 1, "about half by definition"),
        (["--on", "nothing"], 1, "held-out examples by tag: 'untagged' ("),
        (["--since", "soon"], 2, "is no time"),
        (["--limit", "0"], 2, "--limit"),
        (["--model", "nowhere/at-all"], 1, "no model is named"),
        (["--namespace", "shop"], 1, "no namespace 'shop'"),
    ],
)
def test_what_cannot_be_scored_is_one_line_with_a_cure(
    run, served, monkeypatch, arguments, exits, words
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = run("eval", *arguments, exits=exits)
    assert result.out == ""
    assert words in result.err


def test_ctrl_c_exits_130_and_leaves_the_home_as_it_was(run, served, monkeypatch) -> None:
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(measures, "policy_scores", interrupted)
        assert "interrupted" in run("eval", exits=130).err
    assert run("verify", "--json").json["problems"] == []
    run("eval", "-q")
