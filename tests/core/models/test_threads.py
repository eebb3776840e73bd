"""torch's threads: as many as there are cores, yielding while others work, and spinning if not."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest
import torch

from agentpref.models import threads
from agentpref.models.threads import Judgement, Times, Watcher, cpu_quota, sharing, usable_cores

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SECONDS = threads.LOOK_SECONDS
BUSY, CALM, IDLE = Times(0.3, 0.2), Times(0.5, 0.0), Times(0.001, 0.001)


@pytest.fixture
def unset(monkeypatch):
    """An environment in which the user chose nothing."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def with_threads():
    """Call it to give torch a number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def group(tmp_path, lines, **files):
    """A machine whose process is in some control groups; ``files`` are paths with ``__`` for /."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("".join(f"{line}\n" for line in lines))
    for name, text in files.items():
        file = tmp_path / "cgroup" / name.replace("__", "/").replace("_", ".", 1)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return cpu_quota(tmp_path, tmp_path / "cgroup")


@pytest.mark.parametrize(
    ("lines", "files", "cores"),
    [
        (["0::/"], {"cpu_max": "200000 100000\n"}, 2),
        (["0::/"], {"cpu_max": "max 100000\n"}, math.inf),
        (["0::/"], {}, math.inf),
        (
            ["0::/app/web"],
            {"app__web__cpu_max": "max 100000", "app__cpu_max": "150000 100000"},
            1.5,
        ),
        (["0::/outside/this/container"], {"cpu_max": "50000 100000"}, 0.5),
        (["5:memory:/", "4:cpu:/a"], {"cpu__a__cpu_cfs_quota_us": "300000"}, math.inf),
        (
            ["4:cpu,cpuacct:/a", "0::/"],
            {
                "cpu,cpuacct__a__cpu_cfs_quota_us": "300000\n",
                "cpu,cpuacct__a__cpu_cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            ["4:cpu:/"],
            {"cpu__cpu_cfs_quota_us": "-1", "cpu__cpu_cfs_period_us": "100000"},
            math.inf,
        ),
    ],
)
def test_the_quota_is_the_least_of_the_process_s_control_groups(tmp_path, lines, files, cores):
    assert group(tmp_path, lines, **files) == cores


def test_a_system_without_control_groups_has_no_quota(tmp_path):
    assert cpu_quota(tmp_path, tmp_path) == math.inf


@pytest.mark.parametrize(("quota", "cores"), [(2.0, 2), (1.2, 2), (0.5, 1), (math.inf, 64)])
def test_a_container_with_two_cores_of_quota_on_a_host_of_64_uses_two(monkeypatch, quota, cores):
    monkeypatch.setattr(threads, "visible_cores", lambda: 64)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert usable_cores() == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cores_that_a_process_may_not_run_on_do_not_count():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from agentpref.models.threads import usable_cores; print(usable_cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("given", "environment", "inside"),
    [
        (None, {}, 2),
        (None, {"OMP_NUM_THREADS": "3"}, 3),  # the user's word
        (1, {}, 1),  # of an update that started with it
        (4, {}, 4),
    ],
)
def test_torch_uses_no_more_threads_than_there_are_cores_unless_they_are_given(
    monkeypatch, unset, with_threads, given, environment, inside
):
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with_threads(3)
    with sharing(given) as share:
        assert torch.get_num_threads() == share.threads == inside
    assert torch.get_num_threads() == 3


def test_fewer_threads_than_cores_stay_as_they_are(monkeypatch, unset, with_threads):
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    with_threads(1)
    with sharing():
        assert torch.get_num_threads() == 1


def judged(*readings, judgement=None):
    """What a judgement says after each of several looks."""
    judgement, found, now = judgement or Judgement(BUSY), [], 0.0
    for times in readings:
        now += SECONDS
        found.append(judgement.judge(times, SECONDS, now))
    return found


LOOKS = round(threads.PATIENCE / SECONDS)


def test_threads_that_yield_try_to_spin_after_some_seconds_and_go_on_if_they_are_alone():
    assert judged(*[BUSY] * LOOKS, *[CALM] * 99) == [True] * (LOOKS - 1) + [False] * 100


def test_threads_that_spin_yield_at_the_first_look_after_others_came():
    assert judged(*[CALM] * LOOKS, BUSY, BUSY)[LOOKS - 1 :] == [False, True, True]


def test_a_process_that_never_waited_spins_from_the_start_and_one_that_did_yields():
    """A short update would lose seconds while it finds out that it is alone."""
    assert judged(CALM, judgement=Judgement(CALM)) == [False]
    assert judged(BUSY, judgement=Judgement(CALM)) == [True]
    assert judged(CALM, judgement=Judgement(BUSY)) == [True]


def test_others_who_are_still_there_are_given_way_for_twice_as_long():
    again = judged(*[BUSY] * (LOOKS + 1), *[BUSY] * 2 * LOOKS)[LOOKS:]
    assert again == [True] * (2 * LOOKS) + [False]
    later = judged(*[CALM] * 4 * LOOKS, *[BUSY] * (LOOKS + 1))[4 * LOOKS :]
    assert later == [True] * LOOKS + [False], "they had left"


def test_patience_has_an_end():
    found = judged(*[BUSY] * 3000)
    spins = [look for look, yields in enumerate(found) if not yields]
    gaps = [after - before for before, after in pairwise(spins)]
    assert gaps[:2] == [2 * LOOKS + 1, 4 * LOOKS + 1]
    assert set(gaps[8:]) == {round(threads.MOST_PATIENCE / SECONDS) + 1}


def test_a_process_that_hardly_runs_learns_nothing_about_others():
    assert all(judged(*[IDLE] * 10 * LOOKS))
    assert not any(judged(*[CALM] * LOOKS, *[IDLE] * 10)[LOOKS - 1 :])


def test_a_watcher_starts_a_spare_team_while_others_work_and_ends_it_after(monkeypatch):
    monkeypatch.setattr(threads, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(threads, "PATIENCE", 0.02)
    others, read, started = threading.Event(), [Times()], []

    def look():
        step = BUSY if others.is_set() else CALM
        last = read[-1]
        read.append(Times(last.ran + step.ran, last.waited + step.waited))
        return {1: read[-1], threading.get_native_id(): Times(0.0, 99.0 * len(read))}

    def until(yields):
        deadline = time.monotonic() + 10
        while watcher.yields is not yields and time.monotonic() < deadline:
            time.sleep(0.001)
        return watcher.yields is yields

    watcher = Watcher(lambda: started.append(threading.current_thread().name), look)
    assert until(False), "nobody else is there"
    others.set()
    assert until(True)
    others.clear()
    assert until(False)
    others.set()
    assert until(True)
    assert started[-1] == "agentpref-yield"
    watcher.close()
    assert not watcher.yields
    assert not [t for t in threading.enumerate() if t.name.startswith("agentpref-yield")]


def test_times_of_threads_that_ended_do_not_count_and_new_ones_count_from_their_start():
    before = {1: Times(1.0, 0.5), 2: Times(9.0, 9.0)}
    after = {1: Times(2.0, 0.75), 3: Times(0.5, 0.25)}
    assert threads.difference(before, after) == Times(1.5, 0.5)
    assert Times(1.5, 0.5).share_waited == 0.25
    assert Times().share_waited == 0.0


WAITS = """
import threading, time, torch
from agentpref.models.threads import Times, Watcher, spare_team
torch.set_num_threads(2)
numbers = torch.zeros(1 << 18)
def milliseconds():
    before = time.process_time()
    for _ in range(10):
        numbers.add_(1)
        time.sleep(0.03)
    return (time.process_time() - before) * 100
spinning = milliseconds()
watcher = Watcher(spare_team(), lambda: {1: Times(1.0, 1.0)})
while not watcher.yields:
    time.sleep(0.01)
time.sleep(0.1)
yielding = milliseconds()
watcher.close()
print(spinning > 3 * yielding, milliseconds() > 3 * yielding)
"""


@pytest.mark.skipif(threads.visible_cores() < 2, reason="one core has nobody to wait for")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
def test_openmp_itself_yields_while_the_spare_team_is_there(unset):
    done = subprocess.run(
        [sys.executable, "-c", WAITS], capture_output=True, check=True, text=True, timeout=120
    )
    assert done.stdout == "True True\n"


def names():
    return {thread.name for thread in threading.enumerate()}


@pytest.mark.skipif(threads.visible_cores() < 2, reason="one core has nobody to wait for")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
@pytest.mark.parametrize(
    ("environment", "count", "watched"),
    [
        ({}, 2, True),
        ({}, 1, False),  # it waits for nobody
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 2, False),
        ({"GOMP_SPINCOUNT": "10"}, 2, False),
    ],
)
def test_how_threads_wait_is_chosen_unless_the_user_did(
    monkeypatch, unset, with_threads, environment, count, watched
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with sharing(count):
        assert ("agentpref-cores" in names()) is watched
    assert "agentpref-cores" not in names()


def test_where_the_kernel_does_not_count_threads_wait_as_openmp_lets_them(
    monkeypatch, unset, with_threads
):
    """They would never be found to have the cores for themselves."""
    monkeypatch.setattr(threads, "thread_times", lambda: {1: Times()})
    with sharing(2):
        assert "agentpref-cores" not in names()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
def test_no_large_team_is_started_to_make_a_few_threads_yield(monkeypatch, with_threads):
    with_threads(2)
    monkeypatch.setattr(threads, "_MOST_SPARE", 1)
    assert threads.spare_team() is None


@pytest.mark.parametrize(
    ("quota", "loaded", "environment", "set_to"),
    [
        (2, False, {}, "1000"),
        (2, True, {}, None),  # OpenMP has read it already
        (64, False, {}, None),
        (2, False, {"OMP_WAIT_POLICY": "ACTIVE"}, None),
        (2, False, {"GOMP_SPINCOUNT": "7"}, "7"),
    ],
)
def test_a_command_lets_threads_spin_shortly_where_a_quota_pays_for_it(
    monkeypatch, unset, quota, loaded, environment, set_to
):
    monkeypatch.setattr(threads, "visible_cores", lambda: 64)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is put back
    monkeypatch.delenv("GOMP_SPINCOUNT")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not loaded:
        monkeypatch.delitem(sys.modules, "torch")
    threads.prepare()
    assert os.environ.get("GOMP_SPINCOUNT") == set_to


def test_a_fit_computes_with_one_thread_of_numpy_and_gives_them_back():
    from threadpoolctl import threadpool_info, threadpool_limits

    def counts():
        return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}

    with threadpool_limits(2, user_api="blas"):
        with threads.single_blas_thread():
            assert counts() == {1}
            with threads.single_blas_thread():
                assert counts() == {1}
            assert counts() == {1}
        assert counts() == {2}
        inside, outside = threading.Event(), threading.Event()

        def beside():
            with threads.single_blas_thread():
                inside.set()
                outside.wait(10)

        other = threading.Thread(target=beside)
        with threads.single_blas_thread():  # two fits at once, of which the first ends first
            other.start()
            inside.wait(10)
        outside.set()
        other.join()
        assert counts() == {2}


ALONE = """
import os, threading, time, torch
from agentpref.models.threads import disband

def team():
    return len(os.listdir("/proc/self/task"))

def compute():
    torch.ones(3_000_000).exp()

torch.set_num_threads(4)
before = team()
disband()  # there is none yet
compute()
busy = team()
disband()
alone = team()
compute()
again = team()
assert busy == again == before + 3, (before, busy, again)
assert alone == before, (before, alone)
assert torch.get_num_threads() == 4
thread = threading.Thread(target=disband)  # of its own, which is none
thread.start()
thread.join()
for _ in range(100):  # the kernel lists a thread that has ended for a moment
    if team() == again:
        break
    time.sleep(0.02)
assert team() == again
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_team_that_is_disbanded_ends_and_is_made_again_when_its_thread_computes(unset):
    found = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_who_does_not_use_torch_has_no_team_to_disband():
    code = (
        "import sys; from agentpref.models.threads import disband; disband(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_whoever_shared_the_cores_leaves_no_team_behind(unset, monkeypatch):
    ended = []
    monkeypatch.setattr(threads, "disband", lambda: ended.append(threading.get_ident()))
    with sharing():
        assert not ended
    assert ended == [threading.get_ident()]


FORKED = """
import os, sys, torch
from agentpref.models.threads import disband, sharing

torch.set_num_threads(2)
torch.ones(3_000_000).exp()
child = os.fork()
if child == 0:
    disband()
    with sharing():
        pass
    os._exit(7)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_does_not_wait_for_the_team_of_its_parent(unset):
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], timeout=60)
    assert found.returncode == 7
