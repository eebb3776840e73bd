"""`update` and `report`: real updates of a small random model, and their exit codes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import orjson
import pytest

from agentpref.errors import UpdateRunning
from agentpref.home import Home
from agentpref.learn import process
from agentpref.record.database import connect

pytestmark = pytest.mark.slow

ENOUGH = ("--set", "gate.cross_fit_below=0")
TOO_LITTLE = (*ENOUGH, "--set", "gate.confidence=0.999999999999999")


@pytest.fixture
def update(run, filled, random_base: Path):
    """Call ``update(exits=0)`` on a home with 40 pairs."""

    def call(*arguments: str, exits: int):
        return run("update", "--model", random_base, *arguments, exits=exits)

    return call


def serving(run) -> str:
    return run("adapters", "list", "--json").json["serving"]["live"]


def test_a_better_candidate_serves_and_the_command_exits_0(run, update) -> None:
    value = update(*ENOUGH, "--json", exits=0).json
    assert value["verdict"] == "promoted"
    assert serving(run) == value["revision"]


def test_the_report_shows_answers_of_before_and_after(run, update) -> None:
    shown = update(*ENOUGH, exits=0).out.splitlines()
    at = shown.index("before and after, 3 held-out prompts chosen at random:")
    words = [line.split()[0] for line in shown[at + 1 :]]
    assert words == ["prompt", "before", "after"] * 3
    value = run("report", "--json").json
    assert {*value["answers"][0]} == {"prompt", "before", "after"}
    assert value["answers"][0]["prompt"][-1]["role"] == "user"


def test_a_second_update_without_new_feedback_exits_3(run, update) -> None:
    first = update(*ENOUGH, "--json", exits=0).json
    result = update(*ENOUGH, exits=3)
    assert result.out.startswith("nothing new: ")
    assert serving(run) == first["revision"]


def test_a_candidate_beyond_the_kl_budget_does_not_serve_and_the_command_exits_4(
    run, update
) -> None:
    result = update(*ENOUGH, "--set", "gate.kl_budget=1e-9", exits=4)
    assert result.out.startswith("refused: ")
    assert "KL budget\tno\t" in result.out
    assert serving(run) == "base"


def test_too_little_evidence_exits_5_and_the_report_is_kept(run, update) -> None:
    result = update(*TOO_LITTLE, exits=5)
    assert result.out.startswith("insufficient: too little evidence")
    assert "new preferences\tno\t" in result.out
    assert "train" in result.err.splitlines()
    assert serving(run) == "base"
    assert run("report").out.startswith(result.out), "the report is kept as it was shown"
    assert "published, and not promoted; now the canary" in result.out
    value = run("report", "--json").json
    assert run("report", value["update_id"], "--json").json == value


def test_progress_is_on_standard_error_also_with_json_and_quiet_turns_it_off(update) -> None:
    result = update(*TOO_LITTLE, "--json", exits=5)
    assert result.json["verdict"] == "insufficient"
    assert {"load model", "train"} <= {*result.err.splitlines()}
    assert update(*TOO_LITTLE, "--json", "--quiet", exits=3).err == ""


def test_settings_of_the_file_and_of_set_reach_the_training(update, home, tmp_path) -> None:
    file = tmp_path / "update.toml"
    file.write_text("learning_rate = 1e-7\n[lora]\nrank = 32\nalpha = 64\n", encoding="utf-8")
    file_and_set = ("--config", str(file), "--set", "lora.rank=8")
    value = update(*file_and_set, *TOO_LITTLE, "--json", exits=5).json
    written = (home / "adapters" / value["revision"] / "adapter_config.json").read_bytes()
    config = orjson.loads(written)
    assert (config["r"], config["lora_alpha"]) == (8, 64)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("loss.beat=1", "did you mean 'loss.beta'?"),
        ("seed", "KEY=VALUE"),
        ("seed=abc", "seed is 'abc', but must be a whole number"),
        ("loss.kind=ipoo", "loss.kind is 'ipoo', but must be"),
        ("seed='abc'", "seed is 'abc', but must be a whole number from 0"),
        ("batch_size=2.5", "batch_size is 2.5, but must be a whole number of 1 or more"),
        ("epochs=1.5", "epochs is 1.5, but must be a whole number of 1 or more"),
        ("max_length=99.5", "max_length is 99.5, but must be a whole number of 16 or more"),
        ("learning_rate=true", "learning_rate is True, but must be a number above 0"),
        ("lora.alpha=true", "lora.alpha is True, but must be a whole number above 0"),
        ("lora.rank=3", "lora.rank is 3, but must be 8, 16"),
        ("loss.beta=inf", "loss.beta is inf, but must be a number above 0"),
        ("kl.weight=nan", "kl.weight is nan, but must be a number of 0 or more"),
        ("loss=1", "loss is a group of settings: write loss.KEY=VALUE"),
    ],
)
def test_a_wrong_setting_is_one_clear_line_and_exits_2(update, assignment, words) -> None:
    err = update("--set", assignment, exits=2).err
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("arguments", "nice"), [((), 1), (("--nice", 7), 7), (("--nice", 0), 0)])
def test_an_update_gives_way_to_others_before_it_does_anything(
    run, filled, monkeypatch, tmp_path, arguments, nice
) -> None:
    found: list[int] = []
    monkeypatch.setattr(process, "give_way", found.append)
    run("update", "--model", tmp_path / "nowhere", *arguments, exits=1)
    assert found == [nice]


def test_a_missing_model_is_named_and_exits_1(run, filled, tmp_path) -> None:
    err = run("update", "--model", tmp_path / "nowhere", exits=1).err
    assert "nowhere" in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")


def test_a_model_that_needs_code_of_its_own_is_one_line_whatever_is_typed(
    filled, home, random_base, tmp_path
) -> None:
    base = shutil.copytree(random_base, tmp_path / "base")
    config = orjson.loads((base / "config.json").read_bytes())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}
    (base / "config.json").write_bytes(orjson.dumps(config))
    (base / "own.py").write_text("print('ran')")
    command = ["-m", "agentpref_cli", "update", "--home", home, "--model", base, "--json"]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        input="y\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("load ")]
    assert line.startswith("error: ")
    assert "names code of its own (auto_map), which is never run" in line


def test_an_update_of_the_same_home_that_runs_already_exits_75(update, monkeypatch) -> None:
    def held(*_arguments, **_options):
        raise UpdateRunning("another update holds this home; wait for it to end")

    monkeypatch.setattr("agentpref.pipeline.update", held)
    assert update(exits=75).err == "error: another update holds this home; wait for it to end\n"


def test_a_report_before_the_first_update_exits_1(run, filled) -> None:
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
def test_a_signal_ends_the_update_after_the_step_and_the_next_update_resumes(
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
    assert "'default' was interrupted at step 2 of " in found["training"]["message"]
    result = update(*TOO_LITTLE, exits=5)
    assert "resumed at step 2 of " in result.out
    assert "0 pairs wait for the next update" in result.out
    found = {c["name"]: c for c in run("doctor", "--model", random_base, "--json").json["checks"]}
    assert "training" not in found


def test_an_update_out_of_time_says_how_many_steps_it_trained(update) -> None:
    result = update(*TOO_LITTLE, "--max-minutes", "0.0001", exits=5)
    assert "trained 1 of " in result.out
    assert "the time was up" in result.out


def test_max_minutes_of_0_exits_2(update) -> None:
    assert (
        "max_minutes is 0.0, but must be a number above 0"
        in update("--max-minutes", "0", exits=2).err
    )


def test_two_processes_publish_one_revision(home, filled, random_base, launch) -> None:
    done = launch("-m", "agentpref_cli", "update", "--model", random_base, *ENOUGH, "--json")
    assert done.returncode == 0, done.stderr
    value = orjson.loads(done.stdout)
    assert value["verdict"] == "promoted"
    assert value["training"]["processes"] == 2
    assert [folder.name for folder in (home / "adapters").iterdir() if folder.is_dir()] == [
        value["revision"]
    ]


def test_two_processes_exit_alike_if_nothing_is_new(run, home, random_base, pair_of_processes):
    run("init")
    ended = pair_of_processes("-m", "agentpref_cli", "update", "--model", random_base)
    assert [code for code, _, _ in ended] == [3, 3]
    assert ended[0][1].startswith("nothing new: ")
    assert ended[1][1:] == ("", ""), "a follower prints nothing"


def test_workers_without_a_cluster_exit_2(update) -> None:
    assert "--workers needs --ray" in update("--workers", 2, exits=2).err


def test_a_cluster_without_ray_exits_1_and_names_the_command(update, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "agentpref_adapters.ray", raising=False)
    error = update("--ray", "local", exits=1).err
    assert error.startswith("error: agentpref_adapters.ray needs ray, which is not installed")
    assert "pip install 'agentpref[ray]'" in error


# Lone thumbs, and the words of the report


def test_thumbs_that_are_turned_off_are_only_counted_as_left_out(update, home) -> None:
    result = update(*TOO_LITTLE, "--set", "thumbs.weight=0", exits=5)
    assert not any(line.startswith("thumbs: ") for line in result.out.splitlines())
    assert "left out, thumbs.weight is 0: 6" in result.out.splitlines()


def test_thumbs_are_counted_on_a_line_of_their_own(run, update) -> None:
    lines = update(*TOO_LITTLE, exits=5).out.splitlines()
    (pairs,) = (line for line in lines if line.startswith("pairs: "))
    (thumbs,) = (line for line in lines if line.startswith("thumbs: "))
    counts = run("report", "--json").json["counts"]
    assert counts["new_thumbs"] + counts["new_held_out_thumbs"] == 6
    assert f"new {counts['new_thumbs']}, " in thumbs
    assert f"new {counts['new']}, " in pairs
    assert "thumbs" not in pairs


def test_an_update_trains_on_thumbs_alone(run, home, random_base, tmp_path) -> None:
    rows = [{"prompt": f"Is it {i}?", "completion": f"{i}.", "label": i < 3} for i in range(6)]
    file = tmp_path / "thumbs.jsonl"
    file.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    run("init")
    run("import", file)
    lenient = ("--set", "gate.kl_budget=1000", "--set", "gate.distinct_floor=0.1")
    value = run("update", "--model", random_base, *lenient, "--json", exits=5).json
    assert value["counts"]["new"] == 0 < value["counts"]["new_thumbs"]
    assert value["training"]["steps"] > 0


def test_the_report_says_how_it_was_trained_and_which_rows_were_changed() -> None:
    from agentpref_cli.commands.update import _not_as_logged, _training

    training = {"steps": 50, "planned_steps": 50, "seconds": 16.2, "precision": "bfloat16"}
    more = {"route": "shared", "tokens_per_pass": 2048, "recomputes_layers": True}
    counts = {"waiting": 3, "waiting_thumbs": 2}
    report = {"counts": counts, "training": training | more, "left_out": {"too_long": 4, "tie": 1}}
    report |= {"shortened": {"prompt_shortened": 2}, "retokenized": {"ids_disagree": 7}}
    assert [*_training(report)] == [
        "trained 50 steps in 16 s, bfloat16, shared prompts, at most 2048 tokens a pass, layers "
        "recomputed to save memory"
    ]
    measured = {"route_errors": {"plain": 0.0467, "shared": 0.0381}}
    assert [*_training(report | {"training": training | more | measured})][1:] == [
        "rounding in nats a token: shared prompts .038; prompts repeated, the model's own "
        "logits .047"
    ]
    waited = training | more | {"threads": 2, "waited": 0.437}
    assert [*_training(report | {"training": waited})][1:] == [
        "other work had the cores: its 2 threads waited 44% of the time for one"
    ]
    assert [*_training(report | {"training": waited | {"threads": 1}})][1:] == [
        "other work had the cores: it waited 44% of the time for one"
    ]
    assert len([*_training(report | {"training": waited | {"waited": 0.05}})]) == 1
    refused = {"route": "plain", "route_reason": "shared: wrong by 3.1 nats in float32"}
    assert [*_training(report | {"training": training | refused})][1:] == [
        "prompts are not shared: shared: wrong by 3.1 nats in float32"
    ]
    assert [*_not_as_logged(report)] == [
        "left out, too long for max_length: 4",
        "left out, tie: 1",
        "shortened, its oldest turns do not fit: 2",
        "retokenized, logged tokens spell another text: 7",
    ]
    resumed = report | {"training": training | {"resumed_at": 9}}
    assert next(_training(resumed)) == (
        "resumed at step 9 of 50; 3 pairs and 2 thumbs wait for the next update"
    )


def test_a_promotion_says_the_accuracy_over_all_domains() -> None:
    from agentpref_cli.commands.update import _meaning

    accuracy = {
        "hours": {"pairs": 100, "before": 0.5, "after": 0.8},
        "style": {"pairs": 300, "before": 0.4, "after": 1.0},
    }
    assert _meaning("promoted", accuracy) == "held-out accuracy .42 -> .95"


def test_a_report_of_an_older_version_is_shown_with_the_fields_it_has() -> None:
    from agentpref_cli.commands.update import _not_as_logged, _training

    training = {"steps": 50, "epochs": 3, "seconds": 16.2, "kl": 0.0}
    old = {"counts": {"new": 9}, "training": training, "left_out": {}}
    assert [*_training(old), *_not_as_logged(old)] == ["trained 50 steps in 16 s"]
    again = old | {"retokenized": {"ids_disagree": 7}}
    assert [*_not_as_logged(again)] == ["retokenized, logged tokens spell another text: 7"]


@pytest.mark.parametrize("new", [True, False])
def test_the_command_tunes_its_process_only_if_there_is_work(run, update, home, random_base, new):
    """With nothing new, nothing heavy is loaded."""
    if not new:
        update(*ENOUGH, exits=0)
    code = """
import atexit, gc, sys
atexit.register(lambda: print(gc.get_freeze_count() > 0, "torch" in sys.modules))
from agentpref_cli.main import main
main()
"""
    options = ["update", "--model", str(random_base), *ENOUGH, "--json", "--quiet"]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{new} {new}", done.stderr
    assert done.stderr == ""


def test_an_update_inside_a_program_does_not_tune_its_process(filled, home, random_base) -> None:
    code = f"""
import gc
import agentpref
report = agentpref.update({str(home)!r}, model={str(random_base)!r})
print(report.counts["new"] > 0, gc.get_freeze_count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "0"], done.stderr


def test_a_report_says_whether_its_revision_serves_today(run, update) -> None:
    shown = update(*ENOUGH, exits=0)
    assert shown.out.splitlines()[0].endswith("; now serving")
    value = run("report", "--json").json
    assert (value["verdict"], value["serving"]["now"]) == ("promoted", "live")
    assert run("report").out.startswith(shown.out)
    run("adapters", "rollback")
    assert "; served until 20" in run("report").out.splitlines()[0]
    value = run("report", "--json").json
    assert (value["verdict"], value["serving"]["now"]) == ("promoted", None)
    assert value["serving"]["since"] < value["serving"]["until"]


def test_a_report_of_an_older_version_whose_revision_never_served_says_so(
    run, update, home
) -> None:
    value = update(*ENOUGH, "--json", exits=0).json
    with closing(connect(Home(home))) as connection:
        connection.execute("DELETE FROM serving_history")
        connection.execute("DELETE FROM serving")
    assert run("report").out.splitlines()[0].endswith("; never served")
    assert value["revision"] in run("report").out
