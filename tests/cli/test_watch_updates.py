"""`watch --every-pairs`: it updates when there are enough pairs, and neither spins nor gives up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest

from agentpref.home import Home
from agentpref.learn.process import Interrupts
from agentpref.prefer.arrivals import Arrivals
from agentpref.prefer.catalog import Catalog
from agentpref.record.database import connect, exclusive
from agentpref.serve.registry import Registry
from agentpref_cli.commands import watch as watching
from agentpref_cli.notify import Notifier
from agentpref_cli.pace import Pace, Window

pytestmark = pytest.mark.slow

NOON = datetime(2026, 11, 29, 12, 0)


class Loop:
    """The looks of `watch --every-pairs 30` on a home, with a clock that the test sets.

    A stand-in takes the place of `agentpref update`: a shell's script, which adds to ``calls``.
    """

    def __init__(self, home: Path, folder: Path, notify: str | None) -> None:
        self.seconds, self.now, self.calls = 0.0, NOON, folder / "calls"
        self.script, self.home = "exit 0", Home.open(home)
        self.pace = Pace(30, clock=lambda: self.seconds)
        self.window: Window | None = None
        self.updates = watching._Updates(
            Registry(home),
            Arrivals("default", held_out=0.2),
            [],
            self.pace,
            None,
            watching._Output(as_json=False, quiet=False),
            Notifier(notify, home, "default"),
            Interrupts(),
            now=lambda: self.now,
        )

    def look(self, script: str = "exit 0") -> int | None:
        self.updates.window = self.window
        self.updates.command = ["sh", "-c", f"echo called >>'{self.calls}'; {script}"]
        return self.updates.look()

    def list(self) -> None:
        """Bring the list of examples up to date, as each update does first."""
        with closing(connect(self.home)) as connection:
            Catalog(connection, "default", held_out=0.2).refresh()

    @property
    def called(self) -> int:
        return (
            len(self.calls.read_text(encoding="utf-8").splitlines()) if self.calls.exists() else 0
        )


@pytest.fixture
def told(tmp_path: Path) -> Path:
    return tmp_path / "told"


@pytest.fixture
def loop(filled: Path, tmp_path: Path, told: Path) -> Loop:
    """On a home of 40 pairs and 6 lone thumbs."""
    return Loop(filled, tmp_path, f"sh -c 'cat >>{told}'")


def test_an_update_begins_with_enough_pairs_and_not_before(loop: Loop, capsys) -> None:
    loop.list()
    assert (loop.look(), loop.called) == (None, 0)
    assert capsys.readouterr().out == "0 of 30 new pairs are there\n"
    assert (loop.look(), capsys.readouterr().out) == (None, ""), "it is told once"
    with closing(connect(loop.home)) as connection:
        connection.execute("DELETE FROM example")
        connection.execute("UPDATE listing SET feedback = 0, comparisons = 0")
        connection.commit()
    assert (loop.look(), loop.called) == (0, 1)
    assert "46 new pairs: an update begins" in capsys.readouterr().out


@pytest.mark.parametrize("code", [4, 5, 6, 7])
def test_an_update_in_vain_is_not_repeated_on_the_same_pairs(loop: Loop, code: int) -> None:
    assert loop.look(f"exit {code}") == code
    loop.list()
    for _ in range(3):
        loop.seconds += 3_600
        assert loop.look(f"exit {code}") is None
    assert (loop.called, loop.pace.wanted) == (1, 60)


def test_an_update_that_fails_is_tried_again_after_a_rest(loop: Loop, capsys) -> None:
    assert loop.look("exit 1") == 1
    loop.list()  # it had got so far: none of the pairs are new now
    for minutes in (1, 2, 4):
        assert (loop.look("exit 1"), capsys.readouterr().err) == (None, "")
        loop.seconds += 60 * minutes
        assert loop.look("exit 1") == 1
    loop.seconds += 60 * 8
    assert loop.look("exit 3") == 3
    loop.seconds += 3_600
    assert loop.look() is None
    assert loop.called == 5


def test_outside_of_its_hours_no_update_begins(loop: Loop, capsys) -> None:
    loop.window = Window.parse("22:00-06:00")
    assert (loop.look(), loop.look(), loop.called) == (None, None, 0)
    said = capsys.readouterr().out
    assert said == "46 new pairs; updates begin only 22:00-06:00\n"
    loop.now = NOON.replace(hour=23)
    assert (loop.look(), loop.called) == (0, 1)


def test_an_update_that_was_killed_is_told_to_the_notifier_and_resumed(
    loop: Loop, told: Path, capsys
) -> None:
    assert loop.look("kill -9 $$") == 137
    assert "was killed by signal 9" in capsys.readouterr().err
    assert "failed: the update was killed by signal 9" in told.read_text(encoding="utf-8")
    assert loop.pace.resumes


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_update_which_ends_in_its_own_time(loop: Loop, signum: int) -> None:
    """The stand-in needs a moment to end, as an update does that finishes its step."""
    name = signal.Signals(signum).name.removeprefix("SIG")
    ended = loop.calls.with_name("ended")
    script = f"trap 'sleep .3; touch {ended}; exit 143' {name}; kill -{name} $PPID; "
    interrupts = loop.updates.interrupts
    with interrupts.listening(), pytest.raises(KeyboardInterrupt):
        loop.look(script + "while :; do sleep .05; done")
    assert interrupts.signum == signum
    assert ended.exists()


@pytest.mark.parametrize(
    ("verdict", "failures", "unfinished"),
    [("failed", True, True), ("failed", False, False), ("interrupted", False, True),
     (None, True, True), ("nothing_new", True, False)],
)  # fmt: skip
def test_what_did_not_come_to_its_end_is_due_after_a_restart(
    loop: Loop, verdict: str | None, failures: bool, unfinished: bool
) -> None:
    assert not loop.updates.is_unfinished(failures=failures)
    with closing(connect(loop.home)) as connection:
        query = "INSERT INTO journal VALUES (1, 'u', 'default', 1.0, ?, ?, '{}', 1, 1.0)"
        connection.execute(query, (verdict and 2.0, verdict))
        connection.commit()
    assert loop.updates.is_unfinished(failures=failures) is unfinished


def test_a_whole_update_runs_and_the_next_look_has_nothing_to_do(
    run, filled, random_base, tmp_path: Path, told: Path
) -> None:
    config = tmp_path / "update.toml"
    config.write_text("epochs = 1\ngate.kl_budget = 1e-9\n", encoding="utf-8")
    words = ["watch", "--home", filled, "--every-pairs", "30", "--model", random_base, "--once"]
    words += ["--config", config, "--notify", f"sh -c 'cat >>{told}'", "--json"]
    command = [sys.executable, "-m", "agentpref_cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    thumbs, begins, update, ended = map(json.loads, done.stdout.splitlines())
    assert thumbs == {"thumbs": []}
    assert (begins["updates"]["state"], begins["updates"]["new"]) == ("updating", 46)
    assert update["verdict"] == "refused"
    assert ended["updates"]["message"] == "the next update waits for 60 new pairs"
    assert told.read_text(encoding="utf-8").startswith("## refused: ")
    again = run(*words, exits=0)
    assert json.loads(again.out.splitlines()[-1])["updates"]["new"] == 0


def test_a_signal_ends_the_update_after_its_step_and_the_next_start_resumes_it(
    run, filled, random_base, tmp_path: Path
) -> None:
    config = tmp_path / "update.toml"
    config.write_text("epochs = 10\ngate.kl_budget = 1e-9\n", encoding="utf-8")
    words = ["watch", "--home", filled, "--every-pairs", "30", "--model", random_base]
    words += ["--config", config, "--every", "0.1"]
    command = [sys.executable, "-m", "agentpref_cli", *map(str, words)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as one:
        assert one.stderr is not None
        for line in one.stderr:
            if line == "train\n":
                one.send_signal(signal.SIGTERM)
                break
        rest = one.communicate()[1]
    assert one.returncode == 143
    assert "interrupted; the next `agentpref update` resumes at step" in rest
    with exclusive(Home.open(filled)):
        assert run("updates", "--json").json["updates"][0]["verdict"] == "interrupted"
    out = run(*words, "--once", exits=4).out
    assert "the last update has not come to its end: an update begins" in out


def test_two_loops_of_one_home_do_not_update_at_once(filled, random_base, tmp_path: Path) -> None:
    words = ["watch", "--home", filled, "--every-pairs", "30", "--model", random_base, "--once"]
    command = [sys.executable, "-m", "agentpref_cli", *map(str, words)]
    with exclusive(Home.open(filled)):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert "the update exited 75; tried again in 1 min" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--every-pairs", "30"], "it needs --model"),
        (["--every-pairs", "0", "--model", "tiny"], "greater than or equal to 1"),
        (["--model", "tiny"], "add --every-pairs"),
        (["--only", "22:00-06:00"], "add --every-pairs"),
        (["--every-pairs", "30", "--model", "tiny", "--only", "22-6"], "no part of a day"),
        (["--every-pairs", "30", "--model", "tiny", "--notify", "it's"], "cannot be split"),
    ],
)
def test_bad_usage_exits_2(run, filled, words, said) -> None:
    assert said in " ".join(run("watch", "--once", *words, exits=2).err.split())


def test_a_wrong_model_is_said_at_once(run, filled, monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    run("watch", "--every-pairs", "30", "--model", "./no-such-model", exits=1)


def test_wrong_settings_are_said_at_once(run, filled, tmp_path: Path) -> None:
    config = tmp_path / "update.toml"
    config.write_text("epoch = 1\n", encoding="utf-8")
    words = ("watch", "--every-pairs", "30", "--model", "tiny", "--config", config)
    assert "did you mean" in run(*words, exits=2).err


def test_what_thumbs_prove_is_told(run, home: Path, tmp_path: Path, told: Path) -> None:
    from agentpref.record.log import Log
    from agentpref.testing import write_adapter

    registry = Registry(Home.create(home))
    names = [
        registry.publish(
            write_adapter(tmp_path / str(seed), seed=seed), parent=None, model={}, training={}
        ).revision_id
        for seed in range(2)
    ]
    registry.promote(names[0])
    registry.canary(names[1], 0.5)
    with Log(home) as log:
        for n in range(60):
            name = names[n % 2]
            question = [{"role": "user", "content": "hi"}]
            call = log.record(question, "hello", revision=name, thread_id=f"{name}{n}")
            log.thumbs(call, up=name == names[0])
    notify = f"sh -c 'echo $AGENTPREF_VERDICT >>{told}; cat >>{told}'"
    run("watch", "--once", "-q", "--notify", notify, exits=8)
    verdict, subject, _, line = told.read_text(encoding="utf-8").splitlines()
    assert verdict == "worse"
    assert subject.startswith(f"thumbs: {names[1]} (canary): ")
    assert "the canary is ended" in line


def test_thumbs_that_take_long_to_read_are_looked_at_less_often(home: Path) -> None:
    times = iter([0.0, 2.0, 5.0, 39.9, 40.0, 40.1, 41.0])
    looked = []

    class Slow:
        def check_thumbs(self) -> list[object]:
            looked.append(1)
            return []

    out = watching._Output(as_json=False, quiet=True)
    notifier = Notifier(None, home, "default")
    thumbs = watching._Thumbs(Slow(), out, notifier, always=False, clock=lambda: next(times))  # type: ignore[arg-type]
    counts = []
    for _ in range(4):
        thumbs.look()
        counts.append(len(looked))
    assert counts == [1, 1, 1, 2], "a look of 2 s, and the next one 40 s after it began"
