"""Pins over real files, shared by real processes that are killed."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.strategies import sampled_from

from agentpref.errors import NotKept, RevisionError
from agentpref.serve.backend import place_in_process
from agentpref.serve.pins import Pin, Pins, find_pins

NAME = "rev-000001-0123456789ab"
OTHER = "rev-000002-0123456789ab"
URL = "http://127.0.0.1:8000"

PROCESS = """
import sys
from pathlib import Path
from agentpref.serve.pins import Pins

pins = Pins(Path(sys.argv[1]), sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    word, name = line.split()
    if word == "take":
        pins.take(name)
        print("taken", flush=True)
    elif word == "drop":
        with pins.drop(name) as alone:
            print(bool(alone), flush=True)
    else:
        pins.close()
        print("closed", flush=True)
"""

Ask = Callable[[str], str]


class Process:
    """Another process with pins of its own, which takes commands."""

    def __init__(self, folder: Path, place: str) -> None:
        command = [sys.executable, "-c", PROCESS, str(folder), place]
        self.popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.answer() == "ready"

    def tell(self, words: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(words + "\n")
        self.popen.stdin.flush()

    def answer(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def has_answered(self, within: float) -> bool:
        return bool(select.select([self.popen.stdout], [], [], within)[0])

    def ask(self, words: str) -> str:
        self.tell(words)
        return self.answer()

    def kill(self) -> None:
        self.popen.send_signal(signal.SIGKILL)
        with self.popen:
            pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "holds"


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Process]]:
    with ExitStack() as at_end:

        def starter(place: str = URL) -> Process:
            process = Process(folder, place)
            at_end.callback(process.kill)
            return process

        yield starter


def test_a_pin_is_a_file_that_contains_the_place(folder: Path) -> None:
    assert find_pins(folder, NAME) == []
    pins = Pins(folder, URL)
    pins.take(NAME)
    pins.take(NAME)
    (file,) = folder.iterdir()
    assert file.name.startswith(f"{NAME}@")
    assert file.read_text() == URL
    assert find_pins(folder, NAME) == [Pin(NAME, URL, alive=True)]
    assert find_pins(folder, OTHER) == []
    with pins.drop(NAME) as alone:
        assert alone
        assert file.exists(), "until it is unloaded, it may be loaded"
    assert find_pins(folder) == []


def test_only_the_last_process_to_unpin_is_told_that_nobody_else_uses_it(
    folder: Path, start
) -> None:
    ours, theirs = Pins(folder, URL), start()
    ours.take(NAME)
    theirs.ask(f"take {NAME}")
    with ours.drop(NAME) as alone:
        assert not alone
    assert find_pins(folder, NAME) == [Pin(NAME, URL, alive=True)]
    assert theirs.ask(f"drop {NAME}") == "True"
    ours.close()


def test_pins_at_different_places_are_independent(folder: Path, start) -> None:
    ours, theirs = Pins(folder, URL), start("http://127.0.0.1:8001")
    ours.take(NAME)
    theirs.ask(f"take {NAME}")
    assert {pin.place for pin in find_pins(folder, NAME)} == {URL, "http://127.0.0.1:8001"}
    with ours.drop(NAME) as alone:
        assert alone
    assert theirs.ask(f"drop {NAME}") == "True"


def test_unpinning_names_the_places_where_nobody_else_uses_it(folder: Path, start) -> None:
    places = (URL, "http://127.0.0.1:8001")
    engine, process = Pins(folder, *places), start(places[1])
    process.ask(f"take {NAME}")
    engine.take(NAME)
    with engine.drop(NAME) as alone:
        assert alone == [URL]
    assert [pin.place for pin in find_pins(folder, NAME)] == [places[1]]
    process.ask(f"drop {NAME}")
    with engine.drop(NAME) as alone:
        assert alone == list(places), "what a dead process left there can be unloaded"
    assert find_pins(folder, NAME) == []


def test_the_pin_of_a_killed_process_is_found_and_can_be_dropped(folder: Path, start) -> None:
    theirs = start()
    theirs.ask(f"take {NAME}")
    assert find_pins(folder, NAME) == [Pin(NAME, URL, alive=True)]
    theirs.kill()
    assert find_pins(folder, NAME) == [Pin(NAME, URL, alive=False)]
    with Pins(folder, URL).drop(NAME) as alone:
        assert alone, "so that what it left loaded can be unloaded"
    assert find_pins(folder) == []


def test_closing_keeps_the_file_if_the_engine_outlives_the_process(folder: Path) -> None:
    for place in (URL, place_in_process()):
        pins = Pins(folder, place)
        pins.take(NAME)
        pins.take(OTHER)
        pins.close()
        pins.close()
    assert find_pins(folder) == [Pin(NAME, URL, alive=False), Pin(OTHER, URL, alive=False)]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_revision_stays_pinned_when_unloading_fails(folder: Path, start, kind) -> None:
    pins, theirs = Pins(folder, URL), start()
    with pytest.raises(kind), pins.drop(NAME):
        raise kind
    theirs.ask(f"take {NAME}")
    assert theirs.ask(f"drop {NAME}") == "False", "we have it"
    with pins.drop(NAME) as alone:
        assert alone


def test_taking_a_pin_waits_while_another_process_unloads(folder: Path, start) -> None:
    """The file that it waited for is gone then, and so it makes another."""
    ours, theirs = Pins(folder, URL), start()
    ours.take(NAME)
    with ours.drop(NAME) as alone:
        assert alone
        theirs.tell(f"take {NAME}")
        assert not theirs.has_answered(within=0.3)  # long enough for it to come to the lock
    assert theirs.answer() == "taken"
    assert find_pins(folder, NAME) == [Pin(NAME, URL, alive=True)]


STRESS = """
import random, sys, time
from pathlib import Path
from agentpref.serve.pins import Pins

folder, engine, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)
pins = Pins(folder, "http://127.0.0.1:8000")
names = ["rev-000001-0123456789ab", "rev-000002-0123456789ab"]
unloaded = 0
for _ in range(200):
    name = rng.choice(names)
    loaded = engine / name
    pins.take(name)
    loaded.touch()
    for _ in range(rng.randrange(4)):
        time.sleep(rng.random() / 2000)
        assert loaded.exists(), "it was unloaded while we used it"
    with pins.drop(name) as alone:
        if alone:
            loaded.unlink()
            time.sleep(rng.random() / 500)  # long enough for others to come to the lock
            unloaded += 1
print(unloaded)
"""


def test_no_process_unloads_what_another_uses(folder: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", STRESS, str(folder), str(engine), str(seed)],
            stdout=subprocess.PIPE,
        )
        for seed in range(4)
    ]
    unloaded = [int(process.communicate()[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    assert sum(unloaded) > 4
    assert list(engine.iterdir()) == [], "the last one of all unloaded"
    assert find_pins(folder) == []


FORKS = """
import os, sys, threading
from pathlib import Path
from agentpref.serve.pins import Pins, find_pins

folder, name = Path(sys.argv[1]), sys.argv[2]
pins = Pins(folder, "http://127.0.0.1:8000")
pins.take(name)

def in_child(work):
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def own():
    pins.take(name)
    with pins.drop(name) as alone:
        os._exit(bool(alone))

assert in_child(pins.close) == 0
assert find_pins(folder, name)[0].alive, "a child must not take from its parent"
assert in_child(own) == 0, "what it takes it shares with its parent"
release, wait = os.pipe()
if not os.fork():
    os.close(wait)
    os.read(release, 1)
    os._exit(0)
os.close(release)
with pins.drop(name) as alone:
    assert alone, "a child that holds nothing must not keep its parent from unloading"
pins.take(name)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_forked_child_has_no_pins(folder: Path) -> None:
    command = [sys.executable, "-c", FORKS, str(folder), NAME]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"held\n"
        parent.communicate()
    assert parent.returncode == 0
    assert find_pins(folder, NAME) == [Pin(NAME, URL, alive=False)]


ORPHAN = """
import os, signal, sys
from pathlib import Path
from agentpref.serve.pins import Pins

pins = Pins(Path(sys.argv[1]), "http://127.0.0.1:8000")
pins.take(sys.argv[2])
ready, tell = os.pipe()
if not os.fork():
    os.write(tell, b".")
    sys.stdin.read()
    os._exit(0)
os.read(ready, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_forked_child_does_not_keep_the_pins_of_its_killed_parent(folder: Path) -> None:
    command = [sys.executable, "-c", ORPHAN, str(folder), NAME]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert parent.wait() == -signal.SIGKILL
    assert [pin.alive for pin in find_pins(folder, NAME)] == [False]
    assert parent.stdin is not None
    parent.stdin.close()  # which ends the child


FORKED_IN_C = """
import ctypes, os, signal, sys
from pathlib import Path
from agentpref.serve.pins import Pins, find_pins

folder, name = Path(sys.argv[1]), sys.argv[2]
pins = Pins(folder, "http://127.0.0.1:8000")
pins.take(name)
child = ctypes.CDLL(None).fork()
if not child:
    signal.pause()
pins.close()
alive = find_pins(folder, name)[0].alive
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
sys.exit(alive)
"""


def test_a_copied_descriptor_does_not_keep_a_dropped_pin(folder: Path) -> None:
    command = [sys.executable, "-c", FORKED_IN_C, str(folder), NAME]
    subprocess.run(command, check=True, timeout=60)


def test_no_fork_happens_between_opening_a_file_and_noting_it(folder: Path) -> None:
    pins = Pins(folder, URL)
    taking = threading.Thread(target=pins.take, args=(NAME,))
    pins.before_fork()
    taking.start()
    taking.join(0.2)  # long enough to come to the file
    assert taking.is_alive()
    assert find_pins(folder) == []
    pins.after_fork_in_parent()
    taking.join()
    assert find_pins(folder) == [Pin(NAME, URL, alive=True)]
    pins.close()


def test_nobody_is_the_last_user_when_the_file_was_deleted_by_hand(folder: Path, start) -> None:
    ours, theirs = Pins(folder, URL), start()
    ours.take(NAME)
    for file in folder.iterdir():
        file.unlink()
    theirs.ask(f"take {NAME}")
    with ours.drop(NAME) as alone:
        assert not alone
    assert find_pins(folder, NAME) == [Pin(NAME, URL, alive=True)]


def test_a_dead_pin_can_be_removed_and_a_living_one_cannot(folder: Path, start) -> None:
    theirs, place = start(), place_in_process()
    theirs.ask(f"take {NAME}")
    over = start(place)
    over.ask(f"take {NAME}")
    over.kill()
    dead, living = sorted(find_pins(folder, NAME), key=lambda pin: pin.alive)
    assert dead == Pin(NAME, place, alive=False)
    assert dead.is_stale
    assert not living.is_stale
    assert not Pin(NAME, URL, alive=False).is_stale, "its engine may live on"
    assert dead.remove()
    assert dead.remove(), "twice does nothing"
    assert not living.remove()
    assert find_pins(folder) == [living]


def test_a_pin_without_a_place_is_stale(folder: Path) -> None:
    folder.mkdir()
    (folder / f"{NAME}@0123456789ab").touch()
    (pin,) = find_pins(folder)
    assert pin == Pin(NAME, "", alive=False)
    assert pin.is_stale
    assert pin.remove()
    assert find_pins(folder) == []


@pytest.mark.parametrize("name", ["base", "../rev-000001-0123456789ab", f"{NAME}/..", ""])
def test_a_name_that_is_not_a_revisions_is_refused(folder: Path, name: str) -> None:
    pins = Pins(folder, URL)
    with pytest.raises(RevisionError, match="is not a revision's name"):
        pins.take(name)
    with pytest.raises(RevisionError, match="is not a revision's name"), pins.drop(name):
        pass
    assert not folder.exists()


def test_a_symbolic_link_in_place_of_a_pin_is_not_followed(folder: Path, tmp_path: Path) -> None:
    pins = Pins(folder, URL)
    pins.take(NAME)
    (file,) = folder.iterdir()
    pins.close()
    file.unlink()
    victim = tmp_path / "victim"
    victim.touch()
    file.symlink_to(victim)
    with pytest.raises(NotKept, match=f"{NAME}@"):
        pins.take(NAME)
    assert victim.read_text() == ""


def test_the_error_names_the_folder_that_cannot_be_made(folder: Path) -> None:
    folder.touch()
    with pytest.raises(NotKept, match=r"holds/rev-000001.* cannot be written"):
        Pins(folder, URL).take(NAME)


def test_other_files_in_the_folder_are_left_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes").touch()
    assert find_pins(folder) == []


class HoldsOfThree(RuleBasedStateMachine):
    """Three users of one place, as if in three processes: descriptors do not share locks."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = TemporaryDirectory()
        self.folder = Path(self.temporary.name) / "holds"
        self.three = [Pins(self.folder, URL) for _ in range(3)]
        self.using: set[int] = set()
        self.left = False

    @rule(who=sampled_from(range(3)))
    def take(self, who: int) -> None:
        self.three[who].take(NAME)
        self.using.add(who)

    @rule(who=sampled_from(range(3)), fails=sampled_from([False, True]))
    def drop(self, who: int, fails: bool) -> None:
        others = self.using - {who}
        try:
            with self.three[who].drop(NAME) as alone:
                assert bool(alone) == (not others)
                if fails:
                    raise RuntimeError
            self.using.discard(who)
            self.left = self.left and bool(others)
        except RuntimeError:
            self.using = others or {who}

    @precondition(lambda self: self.using)
    @rule(who=sampled_from(range(3)))
    def die(self, who: int) -> None:
        """For the system, that is closing: the engine lives on."""
        self.three[who].close()
        self.using.discard(who)
        self.left = True

    @invariant()
    def the_file_tells(self) -> None:
        expected = [Pin(NAME, URL, alive=bool(self.using))] if self.using or self.left else []
        assert find_pins(self.folder) == expected

    def teardown(self) -> None:
        for pins in self.three:
            pins.close()
        self.temporary.cleanup()


HoldsOfThree.TestCase.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)
TestHoldsOfThree = HoldsOfThree.TestCase


def test_a_pin_that_somebody_edited_is_written_anew_by_the_next_who_takes_it(
    tmp_path: Path,
) -> None:
    pins = Pins(tmp_path, URL)
    pins.take(NAME)
    pins.close()
    (pin,) = tmp_path.iterdir()
    for content in ("http://127", "", URL + "/and/more", "\0" * 40):
        pin.write_text(content)
        pins.take(NAME)
        assert [found.place for found in find_pins(tmp_path)] == [URL]
        pins.close()
