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

    monkeypatch.setattr("agentpref.pipeline.update", held)
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


# Lone thumbs, and the words of the report


def test_without_thumbs_none_are_spoken_of(update, home) -> None:
    result = update("--set", "thumbs.weight=0", exits=5)
    assert not any(line.startswith("thumbs: ") for line in result.out.splitlines())
    assert "left out, thumbs.weight is 0: 6" in result.out.splitlines()


def test_thumbs_are_counted_beside_the_pairs(run, update) -> None:
    lines = update(exits=5).out.splitlines()
    (pairs,) = (line for line in lines if line.startswith("pairs: "))
    (thumbs,) = (line for line in lines if line.startswith("thumbs: "))
    counts = run("report", "--json").json["counts"]
    assert counts["new_thumbs"] + counts["new_held_out_thumbs"] == 6
    assert f"new {counts['new_thumbs']}, " in thumbs
    assert f"new {counts['new']}, " in pairs
    assert "thumbs" not in pairs


def test_a_night_of_thumbs_alone_is_no_empty_one(run, home, random_base, tmp_path) -> None:
    rows = [{"prompt": f"Is it {i}?", "completion": f"{i}.", "label": i < 3} for i in range(6)]
    file = tmp_path / "thumbs.jsonl"
    file.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    run("init")
    run("import", file)
    lenient = ("--set", "gate.kl_budget=1000", "--set", "gate.distinct_floor=0.1")
    value = run("update", "--model", random_base, *lenient, "--json", exits=5).json
    assert value["counts"]["new"] == 0 < value["counts"]["new_thumbs"]
    assert value["training"]["steps"] > 0


def test_it_is_said_how_it_was_trained_and_what_was_not_as_logged() -> None:
    from agentpref_cli.commands.update import _not_as_logged, _training

    training = {"steps": 50, "planned_steps": 50, "seconds": 16.2, "precision": "bfloat16"}
    more = {"route": "shared", "tokens_per_pass": 2048, "recomputes_layers": True}
    counts = {"waiting": 3, "waiting_thumbs": 2}
    report = {"counts": counts, "training": training | more, "left_out": {"too_long": 4, "tie": 1}}
    report |= {"shortened": {"prompt_shortened": 2}, "retokenised": {"ids_disagree": 7}}
    assert [*_training(report)] == [
        "trained 50 steps in 16 s, bfloat16, shared prompts, at most 2048 tokens a pass, layers "
        "recomputed to save memory"
    ]
    assert [*_not_as_logged(report)] == [
        "left out, too long for max_length: 4",
        "left out, tie: 1",
        "shortened, its oldest turns do not fit: 2",
        "retokenised, logged tokens spell another text: 7",
    ]
    resumed = report | {"training": training | {"resumed_at": 9}}
    assert next(_training(resumed)) == (
        "resumed at step 9 of 50; 3 pairs and 2 thumbs that came in since wait for the next update"
    )


def test_reports_of_older_versions_are_shown_too() -> None:
    from agentpref_cli.commands.update import _not_as_logged, _training

    training = {"steps": 50, "epochs": 3, "seconds": 16.2, "kl": 0.0}
    old = {"counts": {"new": 9}, "training": training, "left_out": {}}
    assert [*_training(old), *_not_as_logged(old)] == ["trained 50 steps in 16 s"]


@pytest.mark.parametrize("new", [True, False])
def test_a_process_of_ours_is_settled_where_there_is_work(run, update, home, random_base, new):
    """With nothing new, nothing heavy is loaded."""
    if not new:
        update(*ENOUGH, exits=0)
    code = """
import atexit, gc, sys
atexit.register(lambda: print(gc.get_freeze_count() > 0, "torch" in sys.modules))
from agentpref_cli.main import main
main()
"""
    options = ["update", "--model", str(random_base), *ENOUGH, "--json"]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{new} {new}", done.stderr
    assert done.stderr == ""


def test_a_host_of_the_library_is_not_settled(filled, home, random_base) -> None:
    code = f"""
import gc
import agentpref
report = agentpref.update({str(home)!r}, model={str(random_base)!r})
print(report.counts["new"] > 0, gc.get_freeze_count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "0"], done.stderr
