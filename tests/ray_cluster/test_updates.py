"""An update on the workers of a Ray cluster: what it makes, and what it survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import psutil
import pytest
import ray
import torch
from ray import cloudpickle
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from agentpref.config import GateSettings, UpdateConfig
from agentpref.errors import ConfigError, NotAHome, UpdateError
from agentpref.home import Home
from agentpref_adapters.ray import update as update_on_ray

INSUFFICIENT = 5
SECONDS = 600  # a hanging cluster must not hang the tests


def weights(home: Path) -> Path:
    """The one adapter of a home."""
    (file,) = home.glob("adapters/rev-*/adapter_model.safetensors")
    return file


def ended(process: subprocess.Popen[str], code: int) -> tuple[str, str]:
    """What a command wrote, once it has ended with this exit code."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code, (out, err)
    return out, err


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    """Read what a command says until it says this."""
    for said in process.stderr:
        if said.startswith(line):
            return
    pytest.fail(f"it ended without {line!r}: {process.communicate()}")


def workers(home: Path) -> tuple[psutil.Process, psutil.Process]:
    """The processes that train: the first one, which has the home open, and the other."""
    found = [
        process for process in psutil.process_iter() if "RayTrainWorker" in "".join(_words(process))
    ]
    first = [p for p in found if any(f.path.startswith(str(home)) for f in p.open_files())]
    (one,), (other,) = first, [p for p in found if p not in first]
    return one, other


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended, or is another user's
        return []


@pytest.fixture(scope="module")
def alone(update, make_home) -> Path:
    """A home that one process updated, without Ray."""
    home = make_home()
    ended(update(home, ray=False), INSUFFICIENT)
    return home


@pytest.fixture(scope="module")
def together(update, make_home) -> Path:
    """A home that two workers updated."""
    home = make_home()
    out, err = ended(update(home), INSUFFICIENT)
    assert orjson.loads(out)["training"]["processes"] == 2
    told = err.splitlines()
    assert told[:3] == ["start workers", "start workers: 2/2", "load model"]
    assert {line.partition(":")[0] for line in told} >= {"score base", "train", "score candidate"}
    assert "Ray" not in err
    return home


def test_two_workers_end_with_the_weights_of_one_process(alone, together) -> None:
    one, two = (load_file(weights(home)) for home in (alone, together))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.norm(two[name] - tensor) <= 1e-3 * torch.norm(tensor), name


@pytest.mark.parametrize("lost", ["the first worker", "the other worker"])
def test_ctrl_c_keeps_the_state_and_a_lost_worker_resumes_from_it(
    update, make_home, together, lost
) -> None:
    home = make_home()
    process = update(home)
    wait_for(process, "train")
    process.send_signal(signal.SIGINT)
    _, err = ended(process, 128 + signal.SIGINT)
    last = err.splitlines()[-1]
    assert last.startswith("error: interrupted; the next `agentpref update` resumes at step ")

    process = update(home)
    wait_for(process, "train")
    first, other = workers(home)
    (first if lost == "the first worker" else other).send_signal(signal.SIGKILL)
    out, err = ended(process, INSUFFICIENT)
    assert "warning: a worker was lost; the update resumes from its saved state" in err
    assert orjson.loads(out)["training"]["resumed_at"] >= 1
    assert weights(home).read_bytes() == weights(together).read_bytes()
    shown = Home.open(home).updates()
    assert [one.verdict for one in shown] == ["insufficient"], (
        "the lost one is no update of its own"
    )


def where(ask) -> tuple[bool, str]:
    """A check, which runs in the first worker alone: the node that it is on."""
    return True, ray.get_runtime_context().get_node_id()


def test_a_program_trains_on_the_cluster_it_is_connected_to_and_the_first_worker_is_beside_it(
    cluster, make_home
) -> None:
    home, told = make_home(), []
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers have no tests
    config = UpdateConfig(epochs=1, gate=GateSettings(cross_fit_below=0))
    with ray.init(cluster.address, log_to_driver=False, logging_level="ERROR"):
        options = {"checks": {"where": where}, "progress": lambda *news: told.append(news)}
        report = update_on_ray(
            home, model="tiny", address="auto", workers=2, config=config, promote=False, **options
        )
        here = ray.get_runtime_context().get_node_id()
        assert ray.is_initialized(), "it is the program's own"
    assert [check["message"] for check in report.checks if "where" in check["name"]] == [here]
    assert told[:2] == [("start workers", 0, 2), ("start workers", 2, 2)]
    assert {stage for stage, _, _ in told} >= {"load model", "score base", "train"}


def test_an_error_of_the_update_is_told_once_with_its_exit_code(
    cluster, command, make_home
) -> None:
    where = ("--home", make_home(), "--ray", cluster.address, "--workers", 2)
    _, err = ended(command("update", *where, "--model", "no/such-model"), 1)
    starts, ready, error = (line for line in err.splitlines() if not line.startswith("load model"))
    assert (starts, ready) == ("start workers", "start workers: 2/2")
    assert error.startswith("error: ")
    assert "no/such-model" in error


def test_no_worker_starts_where_this_node_takes_none(make_home, command) -> None:
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        where = ("--home", make_home(), "--model", "tiny", "--ray", nodes.address)
        _, err = ended(command("update", *where), 1)
    finally:
        nodes.shutdown()
    assert "error: this node of the Ray cluster takes no workers" in err
    assert "ray start --num-cpus 1" in err


def test_what_ray_cannot_do_is_said_before_it_starts(tmp_path) -> None:
    with pytest.raises(NotAHome):
        update_on_ray(tmp_path, model="tiny", address="local")
    home = Home.create(tmp_path / "home").path
    with pytest.raises(ConfigError, match="workers is 0, but must be at least 1"):
        update_on_ray(home, model="tiny", address="local", workers=0)
    with pytest.raises(ConfigError, match="'ray://head:10001' is an address for clients"):
        update_on_ray(home, model="tiny", address="ray://head:10001")
    for nowhere in ("127.0.0.1:1", "127.0.0.1:port", "nowhere"):
        with pytest.raises(UpdateError, match=f"no Ray cluster of this machine at '{nowhere}'"):
            update_on_ray(home, model="tiny", address=nowhere)


def test_a_ray_that_is_started_here_sends_no_statistics_and_ends_with_the_update(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    home, started = Home.create(tmp_path / "home").path, []
    before = {*psutil.Process().children(recursive=True)}  # the cluster of the other tests

    def look(stage: str, done: int, total: int) -> None:
        started.extend({*psutil.Process().children(recursive=True)} - before)
        assert {p.environ()["RAY_USAGE_STATS_ENABLED"] for p in started if "gcs" in p.name()} == {
            "0"
        }

    report = update_on_ray(home, model="tiny", address="local", progress=look)
    assert report.verdict == "nothing_new"
    assert started
    assert psutil.wait_procs(started, timeout=30)[1] == []
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ


def test_ctrl_c_while_it_waits_for_workers_ends_it_at_once(cluster, command, make_home) -> None:
    where = ("--home", make_home(), "--model", "tiny", "--ray", cluster.address)
    process = command("update", *where, "--workers", 3)
    wait_for(process, "warning: the Ray cluster has 2 CPUs for 3 workers; the update waits for")
    process.send_signal(signal.SIGINT)
    _, err = ended(process, 128 + signal.SIGINT)
    assert err.splitlines()[-1] == ("error: ended at once; the next `agentpref update` starts over")
