"""`update` and `report`: real updates of a small random model, and what they exit with."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from agentpref.errors import UpdateRunning

ENOUGH = ("--set", "gate.min_pairs=5")


@pytest.fixture
def update(run, filled, random_base: Path):
    """Call ``update(exits=0)`` on a home with 40 pairs."""

    def call(*arguments: str, exits: int):
        return run("update", "--model", random_base, *arguments, exits=exits)

    return call


def serving(run) -> str:
    return run("adapters", "list", "--json").json["serving"]["live"]


def test_a_better_candidate_exits_0_and_serves(run, update) -> None:
    value = update(*ENOUGH, "--json", exits=0).json
    assert value["verdict"] == "promoted"
    assert serving(run) == value["revision"]


def test_a_second_time_there_is_nothing_new_and_it_exits_3(run, update) -> None:
    first = update(*ENOUGH, "--json", exits=0).json
    result = update(*ENOUGH, exits=3)
    assert result.out.startswith("nothing new: ")
    assert serving(run) == first["revision"]


def test_a_candidate_beyond_the_budget_exits_4_and_does_not_serve(run, update) -> None:
    result = update(*ENOUGH, "--set", "gate.kl_budget=1e-9", exits=4)
    assert result.out.startswith("refused: ")
    assert "KL budget\tno\t" in result.out
    assert serving(run) == "base"


def test_too_little_evidence_exits_5_and_is_reported(run, update) -> None:
    result = update(exits=5)
    assert result.out.startswith("insufficient: ")
    assert "enough evidence\tno\t" in result.out
    assert "train" in result.err.splitlines()
    assert serving(run) == "base"
    assert run("report").out == result.out, "the report is kept as it was shown"
    value = run("report", "--json").json
    assert run("report", value["update_id"], "--json").json == value


def test_beside_json_there_is_no_other_output(update) -> None:
    assert "train" not in update("--json", exits=5).err.split()


def test_settings_reach_the_training(update, home, tmp_path) -> None:
    file = tmp_path / "night.toml"
    file.write_text("learning_rate = 1e-7\n[lora]\nrank = 32\nalpha = 64\n", encoding="utf-8")
    value = update("--config", str(file), "--set", "lora.rank=8", "--json", exits=5).json
    written = (home / "adapters" / value["revision"] / "adapter_config.json").read_bytes()
    config = orjson.loads(written)
    assert (config["r"], config["lora_alpha"]) == (8, 64)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [("loss.beat=1", "'loss.beta'"), ("seed", "KEY=VALUE"), ("lora.rank=3", "lora.rank is 3")],
)
def test_a_setting_that_cannot_be_is_bad_usage(update, assignment, words) -> None:
    err = update("--set", assignment, exits=2).err
    assert words in err
    assert err.count("\n") == 1


def test_a_model_that_does_not_resolve_is_named(run, filled, tmp_path) -> None:
    err = run("update", "--model", tmp_path / "nowhere", exits=1).err
    assert "nowhere" in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")


def test_an_update_elsewhere_is_waited_for_by_nobody(update, monkeypatch) -> None:
    def held(*_arguments, **_options):
        raise UpdateRunning("another update holds this home; wait for it to end")

    monkeypatch.setattr("agentpref.loop.update", held)
    assert update(exits=1).err == "error: another update holds this home; wait for it to end\n"


def test_no_report_yet(run, filled) -> None:
    assert "no update yet" in run("report", exits=1).err
    assert "'u-1'" in run("report", "u-1", exits=1).err


SIGNALLED = """
import os, sys
from agentpref.learn import trainer
signum, step = int(sys.argv.pop(1)), trainer._Run._step
def in_mid_step(self, batch):
    if len(self.history) == 1:
        os.kill(os.getpid(), signum)
    step(self, batch)
trainer._Run._step = in_mid_step
from agentpref_cli.main import main
main()
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_step_and_the_next_update_resumes(
    run, update, filled, random_base, signum
) -> None:
    command = [sys.executable, "-c", SIGNALLED, str(int(signum)), "update", "--home", str(filled)]
    done = subprocess.run(
        [*command, "--model", str(random_base)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + signum
    words = done.stderr.splitlines()[-1]
    assert words.startswith("error: interrupted; the next `agentpref update` resumes at step 2 of ")
    found = {c["name"]: c for c in run("doctor", "--model", random_base, "--json").json["checks"]}
    assert "'default' was interrupted at step 2 of " in found["training"]["words"]
    result = update(exits=5)
    assert "resumed at step 2 of " in result.out
    assert "0 pairs that came in since wait for the next update" in result.out
    found = {c["name"]: c for c in run("doctor", "--model", random_base, "--json").json["checks"]}
    assert "training" not in found


def test_out_of_time_it_says_how_far_it_came(update) -> None:
    result = update("--max-minutes", "0.0001", exits=5)
    assert "trained 1 of " in result.out
    assert "the time was up" in result.out


def test_no_time_is_bad_usage(update) -> None:
    assert "max_minutes is 0.0, but must be above 0" in update("--max-minutes", "0", exits=2).err


def test_two_processes_publish_one_revision(home, filled, random_base, launch) -> None:
    done = launch("-m", "agentpref_cli", "update", "--model", random_base, *ENOUGH, "--json")
    assert done.returncode == 0, done.stderr
    value = orjson.loads(done.stdout)
    assert value["verdict"] == "promoted"
    assert value["training"]["processes"] == 2
    assert [folder.name for folder in (home / "adapters").iterdir() if folder.is_dir()] == [
        value["revision"]
    ]


def test_two_processes_end_alike_where_nothing_is_new(run, home, random_base, pair_of_processes):
    run("init")
    ended = pair_of_processes("-m", "agentpref_cli", "update", "--model", random_base)
    assert [code for code, _, _ in ended] == [3, 3]
    assert ended[0][1].startswith("nothing new: ")
    assert ended[1][1:] == ("", ""), "a follower says nothing"
