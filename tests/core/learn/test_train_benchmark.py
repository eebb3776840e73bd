"""The benchmark of training runs, on next to nothing, and its gate can tell the arms apart."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.record.database import connect
from agentpref.record.store import Store
from benchmarks.train import arithmetic, gate, jobs, nights, nights_trl, ours, runs, shapes, speed

# TRL 1.16 and peft 0.21 ask transformers 5 by old names; not ours to change.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:`gradient_checkpointing.*` is deprecated:FutureWarning",
        "ignore:`use_cache=True` is incompatible:UserWarning",
    ),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    with torch.random.fork_rng(devices=[]):
        shapes.make("nano", folder)
    return folder


@pytest.fixture
def job(base, tmp_path):
    folder = tmp_path / "job"
    jobs.make_job(folder, base, model="nano", workload="24:8", pairs=12, batch_size=4)
    return folder


@pytest.fixture
def in_process(monkeypatch):
    """Let runs of arms be calls, so that libraries are loaded once; times are then made up."""

    def run(module, arguments, out, machine):
        out.mkdir(parents=True, exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [module, *map(str, arguments)])
            importlib.import_module(module).main()
        file = out / "result.json"
        return runs.Run(2.0, 1.0, 100.0, json.loads(file.read_text()) if file.exists() else {})

    for name in ("HF_HUB_OFFLINE", "TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(runs, "run", run)


def test_both_arms_come_to_the_same(job, tmp_path):
    trl_arm = pytest.importorskip("benchmarks.train.trl_arm")
    pytest.importorskip("trl")
    setting = trl_arm.tuned(jobs.load_job(job), "float32", 2)
    results = [
        ours.run(job, tmp_path / "ours", "float32"),
        trl_arm.run(job, tmp_path / "trl", setting),
    ]
    found = gate.compare(tmp_path / "ours", tmp_path / "trl", job, results)
    assert found.holds, str(found)
    assert found.steps == 3
    assert found.learned < 0.05, "what was learned is the same, and not only what was given"
    assert results[0]["margins"][0] != 0.0

    off = {**results[0], "losses": [loss + 2e-4 for loss in results[0]["losses"]]}
    assert not gate.compare(tmp_path / "ours", tmp_path / "trl", job, [off, results[1]]).holds
    broken = {**results[0], "margins": [0.0, float("nan"), 0.0]}
    assert not gate.compare(tmp_path / "ours", tmp_path / "trl", job, [broken, results[1]]).holds


def test_weights_that_differ_do_not_pass():
    same = gate.Difference(loss=0.0, margin=0.0, weights=1e-4, learned=1e-2, steps=1)
    assert same.holds
    assert not replace(same, weights=2e-3).holds


def search_is_done(file, name):
    """Tell the ledger which setting is TRL's best, since searching takes eight trainings."""
    found = {"dtype": "autocast", "micro": 2}
    runs.Ledger(file, resume=True).once(name, lambda: runs.Run(1.0, 1.0, 1.0, found))


@pytest.mark.parametrize("where", [[], ["--gpu"]])
def test_the_race_runs_from_end_to_end(in_process, tmp_path, monkeypatch, capsys, where):
    pytest.importorskip("trl")
    main = importlib.import_module("benchmarks.train.__main__")
    if where:
        search_is_done(tmp_path / "runs.jsonl", "sweep/nano/256:64/4")
    work = ["--work", str(tmp_path), "--models", "nano", "--workloads", "256:64", "--runs", "1"]
    monkeypatch.setattr(sys, "argv", ["train", *work, "--resume", *where])
    main.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = report["figures"]["nano"]["256:64"]
    assert found["gate"]["holds"]
    assert found["faster_than_tuned"] == found["faster_than_careful"] == 1.0, "times are made up"
    assert found["gate"]["careful"]["steps"] == 2
    assert "along the way, checkpointing" in found["stock_setting"]
    assert "beforehand, no checkpointing" in found["tuned_setting"]
    assert bool(report["targets"]) is bool(where), "nothing is promised of so small a model"


def test_an_arm_of_some_rounds_only_is_compared_within_these():
    def took(seconds):
        result = {"load_s": 1.0, "work_s": seconds, "setting": ""}
        return runs.Run(seconds, seconds, 100.0, result)

    rounds = [
        {"ours": took(2.0), "tuned": took(4.0), "stock": took(6.0)},
        {"ours": took(1.0), "tuned": took(4.0)},
    ]
    found = speed.summary(rounds, gpu=False)
    assert (found["tuned_rounds"], found["stock_rounds"]) == (2, 1)
    assert (found["faster_than_tuned"], found["faster_than_stock"]) == (3.0, 3.0)


def test_a_gate_that_fails_ends_with_1_and_no_claim(in_process, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    main = importlib.import_module("benchmarks.train.__main__")
    monkeypatch.setattr(gate, "PER_STEP", -1.0)
    work = ["--work", str(tmp_path), "--models", "nano", "--workloads", "256:64"]
    monkeypatch.setattr(sys, "argv", ["train", *work])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report["figures"]["nano"]["256:64"]) == {"gate"}


def test_a_week_runs_from_end_to_end(in_process, tmp_path):
    pytest.importorskip("trl")
    search_is_done(tmp_path / "runs.jsonl", "sweep/tiny/48:2/16")
    ledger = runs.Ledger(tmp_path / "runs.jsonl", resume=True)
    bench = speed.Bench(runs.Machine(1), tmp_path, ledger, rounds=1)
    found = nights.measure(bench, 2, new=8, proving=4)["nights"]
    assert {len(found[f"{arm}_s"]) for arm in ("ours", "replay", "all")} == {2}
    assert found["faster_than_replay"] == 1.0
    assert set(found["verdicts"]) <= {"promoted", "insufficient"}
    assert [target.name for target in nights.targets({"nights": found})] == [
        "last_night_by_second",
        "week_faster_than_trl",
    ]


def test_a_night_is_as_large_as_it_says(tmp_path):
    asked = nights.week(1)[0]
    Home.create(tmp_path / "home")
    nights.log_night(tmp_path / "home", asked)
    with connect(Home.open(tmp_path / "home")) as connection:
        pairs = read_examples(Store(connection), "default", held_out=0.2).pairs
    assert sum(not pair.held_out for pair in pairs) == nights.NEW
    assert sum(pair.held_out for pair in pairs) == nights.PROVING


def test_scripts_train_on_what_they_say(tmp_path):
    file = tmp_path / "questions.json"
    made = [{"train": [[[n], [1], [2]]] * 5, "prove": [[[n], [1], [2]]] * 2} for n in (10, 20, 30)]
    nights_trl._ids(file).write_text(json.dumps(made))
    replayed, proved = nights_trl.rows_of(file, "replay", 2)
    assert (len(replayed), len(proved)) == (10, 6)
    assert sum(row.prompt == [30] for row in replayed) == 5
    assert len(nights_trl.rows_of(file, "all", 2)[0]) == 15


def test_the_step_is_counted_as_torch_counts_it(base):
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    ids = torch.arange(8, 56)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids, logits_to_keep=16).logits.sum().backward()
    counted = sum(counter.get_flop_counts()["Global"].values())
    shape = shapes.SHAPES["nano"]
    eager = 12 * 48**2 * shape.layers * shape.hidden  # it looks at everything, and masks
    row = jobs.Ids((0,) * 32, (0,) * 16, ())
    looks = 12 * arithmetic._looks(row, True) * shape.layers * shape.hidden
    found = arithmetic.step_flops(shape, [row], 8, shared=True)
    assert found - looks == counted - eager


def test_attention_is_counted_by_what_may_be_seen():
    row = jobs.Ids((0,) * 3, (0,) * 2, (0,) * 1)
    assert arithmetic._looks(row, shared=True) == (1 + 2 + 3) + (4 + 5) + 4
    assert arithmetic._looks(row, shared=False) == 2 * (1 + 2 + 3) + (4 + 5) + 4


def test_the_arithmetic_arm_measures(in_process, tmp_path):
    ledger = runs.Ledger(tmp_path / "runs.jsonl", resume=False)
    bench = speed.Bench(runs.Machine(1), tmp_path, ledger, rounds=1)
    figures = arithmetic.measure(bench, ["nano"], ["256:64"])
    assert figures["arithmetic"]["nano"]["256:64"]["gflops"] > 0
    assert len(arithmetic.targets(figures)) == 1


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_parameters_are_counted(base, name):
    from transformers import AutoModelForCausalLM

    from agentpref.models.base import find_base

    folder = base if name == "nano" else find_base("tiny")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == shapes.SHAPES[name].parameters()


def test_rows_come_back_as_they_were_written(base, tmp_path):
    job = jobs.make_job(tmp_path, base, model="nano", workload="real", pairs=4, batch_size=2)
    rng = np.random.default_rng(0)
    assert jobs.load_rows(tmp_path) == jobs.draw_rows("real", 4, 4096, rng)
    assert jobs.load_job(tmp_path) == job
    assert sorted(job.order) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no multiple"):
        jobs.make_job(tmp_path, base, model="nano", workload="8:8", pairs=5, batch_size=2)


def test_the_parent_is_small():
    """The kernel counts what a child was before it became another program as the child's peak."""
    code = "import benchmarks.train.__main__, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_is_timed_and_a_failure_is_told(tmp_path):
    machine = runs.Machine(1)
    took = runs.run("platform", [], tmp_path, machine)
    assert took.wall_s > 0
    assert took.peak_mb > 1
    with pytest.raises(RuntimeError, match="no-such-file"):
        runs.run("json.tool", ["no-such-file"], tmp_path, machine)


def test_a_ledger_knows_what_was_run(tmp_path):
    file = tmp_path / "runs.jsonl"
    ledger = runs.Ledger(file, resume=False)
    first = ledger.once("a", lambda: runs.Run(1.0, 1.0, 1.0, {"x": 1}))
    again = runs.Ledger(file, resume=True)
    assert again.once("a", lambda: pytest.fail("was run already")) == first
    assert runs.Ledger(file, resume=False).once("a", lambda: runs.Run(2.0, 1.0, 1.0)) != first
