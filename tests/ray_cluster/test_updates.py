"""An update on the workers of a Ray cluster: what it makes, and what it survives."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import orjson
import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file

from agentpref.errors import ConfigError, NotAHome, UpdateError
from agentpref.home import Home
from agentpref_adapters.ray import update as update_on_ray

INSUFFICIENT = 5
SECONDS = 240  # a hanging cluster must not hang the tests


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
    assert [one.verdict for one in shown] == ["insufficient"]
