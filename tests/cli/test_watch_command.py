"""`watch`: one look, the loop, and the settings that the home keeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agentpref.home import Home
from agentpref.record.log import Log
from agentpref.serve.registry import Registry
from agentpref.testing import write_adapter


@pytest.fixture
def judge(home: Path) -> Callable[..., None]:
    def call(revision: str, *, up: int = 0, down: int = 0) -> None:
        with Log(home) as log:
            for n in range(up + down):
                question = [{"role": "user", "content": "hi"}]
                thread = f"{revision}-{os.urandom(4).hex()}"
                run = log.record(question, "hello", revision=revision, thread_id=thread)
                log.thumbs(run, up=n < up)

    return call


@pytest.fixture
def names(home: Path, tmp_path: Path) -> list[str]:
    """Two revisions; the first is live, and the second the canary."""
    registry = Registry(Home.create(home))
    found = [
        registry.publish(
            write_adapter(tmp_path / str(seed), seed=seed), parent=None, model={}, training={}
        ).revision_id
        for seed in range(2)
    ]
    registry.promote(found[0])
    registry.canary(found[1], 0.5)
    return found


def test_a_home_whose_base_model_serves_has_nothing_to_compare(run, home) -> None:
    run("init")
    assert run("watch", "--once").out.startswith("nothing serves")
    assert run("watch", "--once", "--json").json == {"thumbs": []}


def test_a_canary_that_is_worse_is_ended_with_exit_code_8(run, names, judge) -> None:
    judge(names[0], up=15)
    judge(names[1], down=15)
    assert run("watch", "--once").out.count("nothing is proven") == 2, "one after the other"
    for _ in range(3):
        judge(names[0], up=5)
        judge(names[1], down=5)
    live, canary = run("watch", "--once", "--json", exits=8).json["thumbs"]
    assert (live["verdict"], canary["verdict"], canary["action"]) == ("open", "worse", "ended")
    assert run("watch", "--once").out.count("\n") == 1
    assert "the canary was ended" in run("adapters", "show", names[1]).out


def test_quietly_only_what_is_proven_is_printed(run, names, judge) -> None:
    judge(names[0], up=2)
    assert run("watch", "--once", "-q").out == ""
    for _ in range(3):
        judge(names[0], up=5)
        judge(names[1], down=5)
    (line,) = run("watch", "--once", "-q", exits=8).out.splitlines()
    assert line.startswith(f"{names[1]} (canary): thumbs 1.00 -> .00")


def test_the_list_shows_what_the_thumbs_say(run, names, judge) -> None:
    assert "thumbs" not in run("adapters", "list").out
    judge(names[0], up=4, down=1)
    judge(names[1], up=3, down=2)
    lines = run("adapters", "list").out.splitlines()
    assert lines[-1].startswith(f"{names[1]} (canary): thumbs .60 on 5 votes, {names[0]} .80 on 5")
    found = run("adapters", "list", "--json").json["thumbs"]
    assert [one["now"]["votes"] for one in found] == [5, 5]


def test_settings_are_kept(run, names) -> None:
    said = run("watch", "--set", "live=act", "--set", "alpha=0.01").out
    assert said == "kept in the home: canary=act, live=act, alpha=0.01, margin=0.0\n"
    kept = {"canary": "act", "live": "act", "alpha": 0.01, "margin": 0.02}
    assert run("watch", "--set", "margin=0.02", "--json").json == kept


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "live=never"], "watch.live is 'never'"),
        (["--set", "lives=act"], "watch.live"),
        (["--every", "0", "--once"], "not above 0"),
    ],
)
def test_bad_usage_exits_2(run, names, words, said) -> None:
    assert said in run("watch", *words, exits=2).err


def test_the_loop_prints_what_is_new_and_ends_with_the_signal(home, names, judge) -> None:
    command = [sys.executable, "-m", "agentpref_cli", "watch", "--every", "0.05", "--json"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [*command, "--home", home], stdout=subprocess.PIPE, text=True, env=buffered
    ) as watching:
        assert watching.stdout is not None
        first = json.loads(watching.stdout.readline())["thumbs"]
        assert [one["verdict"] for one in first] == ["open", "open"]
        for _ in range(3):
            judge(names[0], up=5)
            judge(names[1], down=5)
        second = json.loads(watching.stdout.readline())["thumbs"]
        assert [one["action"] for one in second] == [None, "ended"]
        watching.send_signal(signal.SIGTERM)
        assert watching.wait(30) == 128 + signal.SIGTERM
    assert Registry(home).state().canary is None
