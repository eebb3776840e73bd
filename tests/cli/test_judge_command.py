"""`agentpref judge`: a rubric from the template, calibrated and let loose by the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agentpref.record.log import Log
from agentpref.serve.backend import GenerationRequest
from agentpref.serve.registry import Registry
from agentpref.testing import FakeBackend, JudgeServer, write_adapter
from agentpref_adapters import transformers


@pytest.fixture
def answers(home: Path) -> Path:
    """40 prompts with two answers each, of which people compared 20."""
    with Log(home) as log:
        for number in range(40):
            asked = [{"role": "user", "content": f"Question {number}?"}]
            runs = [
                log.record(asked, f"Yes, {number}."),
                log.record(asked, f"Well: {number}, I say."),
            ]
            if number < 20:
                log.compare(*runs, winner="a", user_id="ana")
    return home


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as server:
        yield server


def test_a_judge_is_made_calibrated_and_run(run, answers, server) -> None:
    assert "judges/brief.md; edit it" in run("judge", "new", "brief", "--base-url", server.url).out
    refused = run("judge", "run", "brief", exits=1).err
    assert "nobody knows how right judge 'brief' is" in refused
    shown = run("judge", "calibrate", "brief", "--quiet").out
    assert "untagged\t20\t20 of 20\t1.00\t0.86\t0\t0.05\ttrusted" in shown
    done = run("judge", "run", "brief", "--json", "--quiet").json
    assert (done["decided"], done["questions"], done["spending"]["failed"]) == (20, 20, {})
    (row,) = run("judge", "list", "--json").json["judges"]
    assert (row["judge"], row["trusted"], row["changed"]) == ("brief", {"untagged": 0.05}, False)
    strata = run("pairs", "--json").json["strata"]
    assert {one["origin"] for one in strata} == {"comparison", "judge"}


def test_a_judge_that_is_trusted_nowhere_exits_4_and_says_why(run, answers) -> None:
    with JudgeServer(position=1.0) as server:
        run("judge", "new", "first", "--base-url", server.url)
        shown = run("judge", "calibrate", "first", "--quiet", exits=4).out
    assert "makes no pairs in untagged: it decided nothing" in shown
    assert "names the first answer beyond half of the time: 0.50" in shown


def test_a_rubric_that_was_edited_is_to_be_calibrated_again(run, answers, server) -> None:
    run("judge", "new", "brief", "--base-url", server.url)
    run("judge", "calibrate", "brief", "--quiet")
    file = answers / "judges" / "brief.md"
    file.write_text(file.read_text().replace("fewer words", "fewer lines"))
    assert "calibrate it again: it was changed" in run("judge", "list").out
    assert "nobody knows" in run("judge", "run", "brief", exits=1).err


def test_without_a_judge_the_list_names_the_next_step(run, home) -> None:
    run("init")
    assert run("judge", "list").out == "no judges; `agentpref judge new NAME` writes a template\n"


def test_the_rubrics_are_in_a_backup(run, answers, server, tmp_path) -> None:
    run("judge", "new", "brief", "--base-url", server.url)
    run("backup", tmp_path / "copy")
    assert (tmp_path / "copy" / "judges" / "brief.md").is_file()


@pytest.mark.slow
def test_second_answers_are_drawn_from_what_serves(run, home, server) -> None:
    with Log(home) as log:
        for number in range(24):
            asked = [{"role": "user", "content": f"Question {number}?"}]
            runs = [
                log.record(asked, f"Yes, {number}."),
                log.record(asked, f"Well: {number}, I say."),
            ]
            log.compare(*runs, winner="a", user_id="ana")
        log.record(
            [{"role": "user", "content": "Can you help me?"}], "Yes, of course I can do that."
        )
    run("judge", "new", "brief", "--base-url", server.url)
    run("judge", "calibrate", "brief", "--quiet")
    asked = ("judge", "run", "brief", "--sample", 2, "--json", "--quiet")
    assert "name the base model that answers with --model" in run(*asked, exits=2).err
    done = run(*asked, "--model", "tiny").json
    assert (done["sampled"], done["asked"] >= 1) == (2, True)


def test_eval_by_a_judge_shows_win_rates(run, home, server, monkeypatch, tmp_path) -> None:
    def say(revision: str, request: GenerationRequest) -> str:
        return f"{request.messages[-1]['content']}{' so' * (3 if revision == 'base' else 1)}."

    monkeypatch.setattr(transformers, "TransformersBackend", lambda model: FakeBackend(say))
    with Log(home) as log:
        for number in range(60):
            asked = [{"role": "user", "content": f"Question {number}?"}]
            runs = [log.record(asked, f"Yes, {number}."), log.record(asked, f"Well: {number}, so.")]
            log.compare(*runs, winner="a", user_id="ana")
    registry = Registry(home)
    identity = {"name": "tiny", "digest": "d" * 64, "template_digest": "t" * 64}
    folder = write_adapter(tmp_path / "adapter")
    registry.promote(registry.publish(folder, parent=None, model=identity, training={}).revision_id)
    run("judge", "new", "brief", "--base-url", server.url)
    run("judge", "calibrate", "brief", "--quiet")
    shown = run("eval", "--judge", "brief", "--limit", 8, "--quiet").out
    assert "rev-000001 over base\t8\t0\t0\t0\t1.00" in shown
    assert run("eval", "--judge", "brief", "--since", "1d", exits=2).err.endswith("leave it out\n")


def test_comments_revise_answers(run, home, server, monkeypatch) -> None:
    say = FakeBackend(lambda revision, request: "Sure.")
    monkeypatch.setattr(transformers, "TransformersBackend", lambda model: say)
    with Log(home) as log:
        for number in range(24):
            asked = [{"role": "user", "content": f"Question {number}?"}]
            runs = [log.record(asked, f"Yes, {number}."), log.record(asked, f"Well: {number}, so.")]
            log.compare(*runs, winner="a", user_id="ana")
        asked = [{"role": "user", "content": "Can you help me?"}]
        log.thumbs(log.record(asked, "Of course I can do that."), up=False, comment="too long")
    run("judge", "new", "brief", "--base-url", server.url)
    run("judge", "calibrate", "brief", "--quiet")
    revise = ("judge", "revise", "brief", "--model", "tiny", "--quiet")
    shown = run(*revise).out
    assert "revised 1 answers" in shown
    assert "brief prefers 1 of 1 revisions; 0 are worse; 0 are ties" in shown
    assert "there is nothing to revise" in run(*revise).out
    strata = run("pairs", "--json").json["strata"]
    assert {one["origin"] for one in strata} == {"comparison", "comment"}
    done = run(*revise, "--by", "principles", "--limit", 2, "--json").json
    assert (done["revised"], done["not_revised"]) == (2, 1)
    assert "is none of comments, principles, both" in run(*revise, "--by", "votes", exits=2).err


def test_one_broken_rubric_hides_no_other_judge(run, answers, server) -> None:
    run("judge", "new", "brief", "--base-url", server.url)
    (answers / "judges" / "broken.md").write_text("no front matter")
    listed = run("judge", "list", "--json").json["judges"]
    assert [row["judge"] for row in listed] == ["brief", "broken"]
    shown = run("judge", "list").out
    assert "brief\topenai" in shown
    assert "judge 'broken' has no front matter" in shown


def test_a_rubric_that_was_edited_back_is_as_it_was(run, answers, server) -> None:
    run("judge", "new", "brief", "--base-url", server.url)
    run("judge", "calibrate", "brief", "--quiet")
    file = answers / "judges" / "brief.md"
    before = file.read_text()
    file.write_text(before.replace("fewer words", "fewer lines"))
    run("judge", "calibrate", "brief", "--quiet")
    file.write_text(before)
    (row,) = run("judge", "list", "--json").json["judges"]
    assert (row["changed"], row["trusted"]) == (False, {"untagged": 0.05})


def test_answers_are_drawn_from_the_base_of_what_serves(
    run, answers, server, monkeypatch, tmp_path
) -> None:
    asked: list[str] = []

    def backend(model: str) -> FakeBackend:
        asked.append(model)
        return FakeBackend(lambda revision, request: "Sure, I can.")

    monkeypatch.setattr(transformers, "TransformersBackend", backend)
    registry = Registry(answers)
    identity = {"name": "a base", "digest": "d" * 64, "template_digest": "t" * 64}
    folder = write_adapter(tmp_path / "adapter")
    registry.promote(registry.publish(folder, parent=None, model=identity, training={}).revision_id)
    with Log(answers) as log:
        log.record([{"role": "user", "content": "Can you help me?"}], "Yes, of course I can do it.")
    run("judge", "new", "brief", "--base-url", server.url)
    run("judge", "calibrate", "brief", "--quiet")
    done = run("judge", "run", "brief", "--sample", 1, "--json", "--quiet").json
    assert (asked, done["sampled"]) == (["a base"], 1)
