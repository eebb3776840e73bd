"""`serve`, with a program in the place of vLLM. tests/vllm_server has the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import orjson
import psutil
import pytest

from agentpref.home import Home
from agentpref.models.base_files import read_base
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("vllm_program.py")
BASE = read_base("tiny")
LAYERS = dict(list((BASE.layers or {}).items())[:2])
ARGUMENTS = ("--model", "tiny", "--port", "0")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter that claims to have vLLM and runs the stand-in."""
    file = tmp_path / "python"
    file.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exec {sys.executable} {PROGRAM} "$@"\n')
    file.chmod(0o755)
    return file


@pytest.fixture
def revisions(home: Path, tmp_path: Path) -> list[str]:
    """The ids of two revisions of the namespace ``default``, neither of them live."""
    Home.create(home)
    registry = Registry(home)
    made = []
    for seed in range(2):
        folder = write_adapter(tmp_path / f"adapter-{seed}", seed=seed, layers=LAYERS)
        made.append(registry.publish(folder, parent=None, model=BASE.identity, training={}))
    return [revision.revision_id for revision in made]


class Serving:
    """A running `agentpref serve --json`, and the lines it prints."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "agentpref_cli", "serve", *ARGUMENTS, "--json"]
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.children: set[psutil.Process] = set()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def until(self, event: str, **facts: object) -> dict[str, Any]:
        """Read lines up to one of an event."""
        while True:
            said = self.next()
            if said["event"] == event and facts.items() <= said.items():
                self.children |= set(psutil.Process(self.process.pid).children(recursive=True))
                return said

    def next(self) -> dict[str, Any]:
        """Read one line, or fail after a minute."""
        said: dict[str, Any] = orjson.loads(self._lines.get(timeout=60))
        return said

    def end(self, signum: int) -> int:
        self.process.send_signal(signum)
        return self.process.wait(60)


@pytest.fixture
def serving(python: Path) -> Iterator[Any]:
    """Call it to start the command; it is ended afterwards."""
    started: list[Serving] = []

    def start(*arguments: object) -> Serving:
        started.append(Serving("--python", python, *arguments))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def told(home: Path) -> list[str]:
    """The adapters that the server was asked to load and unload since it started."""
    (log,) = (home / "logs").glob("vllm-*.log")
    return [line for line in log.read_text().splitlines() if line.startswith("/v1/")]


def test_it_prints_what_serves_and_follows_a_promotion(serving, home, revisions) -> None:
    one = serving()
    one.until("starting")
    assert one.until("ready")["message"].startswith("vLLM answers at http://127.0.0.1:")
    assert one.until("serving")["live"] == "base"
    Registry(home).promote(revisions[0])
    assert one.until("serving")["live"] == revisions[0]
    Registry(home).canary(revisions[1], 0.25)
    said = one.until("serving", canary=revisions[1])
    assert said["message"].endswith(f"{revisions[1]} is canary for 25% of the threads")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_and_the_engine_and_unloads_nothing(
    serving, home, revisions, signum
) -> None:
    Registry(home).promote(revisions[0])
    one = serving()
    one.until("serving", live=revisions[0])
    assert one.children
    assert one.end(signum) == 128 + signum
    assert not any(child.is_running() for child in one.children)
    assert told(home) == [f"/v1/load_lora_adapter {revisions[0]}"]
    assert Registry(home).state().live == revisions[0]


def test_a_signal_while_the_engine_starts_ends_both(serving, home, revisions) -> None:
    one = serving("--", "--slow")
    one.until("starting")
    while not any("--slow" in child.cmdline() for child in _children(one)):
        pass
    children = _children(one)
    assert one.end(signal.SIGTERM) == 143
    assert psutil.wait_procs(children, timeout=60)[1] == []


def _children(one: Serving) -> list[psutil.Process]:
    return psutil.Process(one.process.pid).children(recursive=True)


def test_an_engine_that_dies_ends_the_command_with_its_error(serving, home, revisions) -> None:
    one = serving()
    one.until("serving")
    (log,) = (home / "logs").glob("vllm-*.log")
    os.kill(int(log.read_text().split()[1]), signal.SIGKILL)
    _, err = one.process.communicate(timeout=60)
    assert one.process.returncode == 1
    assert err.startswith("error: vLLM ended with exit code 137")
    assert psutil.wait_procs(one.children, timeout=60)[1] == []


def test_a_revision_that_cannot_be_served_is_reported_and_the_old_one_serves(
    serving, home, revisions, tmp_path
) -> None:
    registry = Registry(home)
    registry.promote(revisions[0])
    one = serving()
    one.until("serving", live=revisions[0])
    folder = write_adapter(tmp_path / "misfit")  # whose layers are those of no real model
    misfit = registry.publish(folder, parent=None, model=BASE.identity, training={})
    registry.promote(misfit.revision_id)
    assert "model.layers.0.self_attn.q_proj" in one.until("warning")["message"]
    while f"{revisions[0]} still serves: " not in one.until("warning")["message"]:
        pass  # the other warning is that it is in quarantine
    assert one.end(signal.SIGTERM) == 143
    assert f"/v1/load_lora_adapter {misfit.revision_id}" not in told(home)
    assert f"/v1/unload_lora_adapter {revisions[0]}" not in told(home)


def test_several_namespaces_share_one_engine(serving, home, revisions, tmp_path) -> None:
    folder = write_adapter(tmp_path / "other", seed=9, layers=LAYERS)
    other = Registry(home, namespace="other")
    name = other.publish(folder, parent=None, model=BASE.identity, training={}).revision_id
    other.promote(name)
    one = serving("--namespace", "default", "--namespace", "other")
    assert one.until("serving", namespace="default")["live"] == "base"
    assert one.until("serving", namespace="other")["live"] == name


def test_without_json_each_event_is_a_line_of_text(python, home, revisions) -> None:
    command = [sys.executable, "-m", "agentpref_cli", "serve", *ARGUMENTS, "--python", str(python)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGTERM)
        lines += process.stdout.readlines()
    assert process.returncode == 143
    assert lines[0].startswith(f"starting vLLM; its log is {home}/logs/vllm-")
    assert lines[2:] == [
        "default: base serves (generation 0)\n",
        "ended; vLLM is stopped, and the live revision is unchanged\n",
    ]


def test_an_engine_that_does_not_start_is_one_line_that_quotes_its_error(
    run, home, revisions, python
) -> None:
    err = run("serve", *ARGUMENTS, "--python", python, "--", "--fail", exits=1).err
    assert err.startswith("error: vLLM ended with exit code 1: ValueError: this GPU is too small; ")
    assert err.count("\n") == 1


def test_without_a_home_no_engine_starts(run, home, python) -> None:
    assert "is not an agentpref home" in run("serve", *ARGUMENTS, "--python", python, exits=1).err


def test_a_host_that_others_can_reach_is_bad_usage(run, home, revisions) -> None:
    err = run("serve", *ARGUMENTS, "--host", "0.0.0.0", exits=2).err
    assert "--allow-remote" in err
    err = run("serve", *ARGUMENTS, "--", "--host=0.0.0.0", exits=2).err
    assert "--allow-remote" in err


@pytest.mark.parametrize(("option", "value"), [("--port", "70000"), ("--max-loras", "0")])
def test_a_number_out_of_range_is_bad_usage(run, home, revisions, option, value) -> None:
    assert option in run("serve", "--model", "tiny", option, value, exits=2).err


def test_an_api_key_among_the_options_of_the_engine_is_bad_usage(run, home, revisions) -> None:
    err = run("serve", *ARGUMENTS, "--", "--api-key", "s3cret", exits=2).err
    assert "set VLLM_API_KEY" in err
    assert "s3cret" not in err


def test_arguments_that_the_chat_template_does_not_read_start_no_engine(run, home, python) -> None:
    words = ("serve", *ARGUMENTS, "--python", python, "--chat-template-kwargs")
    run("init")
    assert "no JSON object" in run(*words, "[1]", exits=2).err
    err = run(*words, '{"thinking": true}', exits=2).err
    assert err.startswith("error: chat_template_kwargs.thinking has no effect")
    assert not list(home.glob("logs/*")), "vLLM was not started"


def test_without_vllm_the_error_says_how_to_install_it(run, home, revisions) -> None:
    err = run("serve", *ARGUMENTS, "--python", sys.executable, exits=1).err
    assert "cannot import vLLM; install it" in err


def test_a_namespace_that_is_not_in_the_home_is_served_with_a_warning(serving, revisions) -> None:
    started = serving("--namespace", "defualt")
    said = started.until("warning", namespace="defualt")
    assert "no namespace 'defualt' is in this home; it has 'default'" in said["message"]
    started.until("ready")
