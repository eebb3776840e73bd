"""How torch's threads share the cores of a machine with others.

On a processor, torch computes with a team of OpenMP threads, which wait for each other after each
product. GNU's OpenMP, which torch's wheels for Linux bring along, spins while it waits, for up to
10 ms. That is the fastest way where nobody else works. Where others do, a thread that spins keeps
the very thread that it waits for from a core.

So :func:`sharing` watches how long the threads of this process wait for a core. If they do, they
*yield*: they give their core away after some microseconds, and try to spin again later. OpenMP
reads how long to spin when torch is loaded, but its manual names one exception
(``GOMP_SPINCOUNT``): with more OpenMP threads than cores it spins 100 times instead of 300,000. So
one more team, which has nothing to do, makes all others yield, and they spin again when it ends.

The load never changes the number of threads, because the last bits of a result may depend on it. A
process takes as many as there are cores that it may use: the quota of a container counts, not the
size of the machine. What the user sets (``OMP_NUM_THREADS``, ``OMP_WAIT_POLICY``,
``GOMP_SPINCOUNT``) stays.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from agentpref.errors import MissingDependency

LOOK_SECONDS = 0.25
"""How often a watcher looks how long threads waited."""

BUSY = 0.1
"""The share of the time for which threads that spin wait for a core, above which others need it.
Threads that yield wait whenever they are woken up, also on an idle machine."""

PATIENCE, MOST_PATIENCE = 2.0, 30.0
"""Seconds after which threads that yield try to spin. They double when others are still there."""

_IDLE = 0.05  # threads that run less than this share of one core tell nothing
_MOST_SPARE = 16  # where a container limits its threads, libgomp ends the process at the limit
_PROCESS = os.getpid()
_PAUSE_SOFT = 1  # of OpenMP 5.0: settings stay
_SHORT_SPIN = "1000"  # about 30 microseconds
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_COUNT, _WAIT_SETTINGS = "OMP_NUM_THREADS", ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


class Times(NamedTuple):
    """Seconds for which threads ran, and for which they waited for a core."""

    ran: float = 0.0
    waited: float = 0.0

    @property
    def share_waited(self) -> float:
        """The share of waiting; 0 where they never ran."""
        total = self.ran + self.waited
        return self.waited / total if total else 0.0


def usable_cores() -> int:
    """How many cores this process may use: those it may run on, and no more than its quota.

    A quota is that of the process's control group or of one above, rounded up to whole cores.
    """
    quota = cpu_quota()
    return visible_cores() if math.isinf(quota) else max(1, min(visible_cores(), math.ceil(quota)))


def visible_cores() -> int:
    """How many cores this process may run on, whatever its quota is: as many as OpenMP counts."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(os.getpid()))
    return os.cpu_count() or 1


def cpu_quota(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> float:
    """The processor time that control groups allow this process, in cores; infinite if all of it.

    Groups of version 2 (``cpu.max``) and 1 (``cpu.cfs_quota_us``) count, each with those above it.
    Inside a container, its own group is the root of what it sees.
    """
    quotas = [math.inf]
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return math.inf
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            roots = [cgroups, cgroups / "unified"]
        elif "cpu" in controllers.split(","):
            roots = [cgroups / "cpu", cgroups / controllers]
        else:
            continue
        for root in roots:
            group = root / path.lstrip("/")
            groups = (f for f in (group, *group.parents) if f.is_relative_to(root))
            quotas += map(_quota_of, groups)
    return min(quotas)


def _quota_of(group: Path) -> float:
    """The quota of one control group, in cores."""
    found: list[str] = []
    with suppress(OSError):
        found = (group / "cpu.max").read_text(encoding="utf-8").split()
    with suppress(OSError):
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        found = [(group / file).read_text(encoding="utf-8").strip() for file in files]
    if len(found) != 2 or found[0] in ("max", "-1"):
        return math.inf
    return int(found[0]) / int(found[1])


def prepare() -> None:
    """Set what OpenMP reads only once, before torch is loaded; later, this does nothing.

    Where a quota gives this process fewer cores than it sees, time that threads spin is taken from
    the quota, so they spin for microseconds only. Commands call this; a host's process is its own.
    """
    chosen = any(name in os.environ for name in _WAIT_SETTINGS)
    if "torch" not in sys.modules and not chosen and usable_cores() < visible_cores():
        os.environ["GOMP_SPINCOUNT"] = _SHORT_SPIN


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """Within the block, numpy and scipy compute with one thread.

    Solvers that call one small product after another wait for a second thread longer than it
    works: a fit of 900 rows takes five times as long with two, and where others need the cores, for
    which OpenBLAS spins, thirty times. The number is that of the process, so one thread of Python
    at a time sets it and takes it back; a block beside it computes with what is set.

    Raises:
        MissingDependency: threadpoolctl is not installed.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise MissingDependency(
            "fitting needs threadpoolctl: pip install 'agentpref[train]'"
        ) from error
    if not _sets_blas.acquire(blocking=False):
        yield
        return
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        _sets_blas.release()


_sets_blas = threading.RLock()  # the process has one BLAS


def disband() -> None:
    """End the OpenMP team of this thread; torch makes another one when the thread computes again.

    A thread that has computed keeps its team, though it only waits. While another thread computes,
    OpenMP then counts more threads than cores and lets all of them yield: a token that is served
    takes 1.7 times as long.
    """
    torch = sys.modules.get("torch")
    # After a fork the team's threads are not there, and OpenMP would wait for them without end.
    is_forked = os.getpid() != _PROCESS
    library = None if torch is None or is_forked else _libgomp(torch)
    if library is not None and hasattr(library, "omp_pause_resource_all"):  # GCC 9 and later
        library.omp_pause_resource_all(_PAUSE_SOFT)


def _libgomp(torch: Any) -> Any:
    """The OpenMP library that torch is linked with, if it is GNU's."""
    library = ctypes.CDLL(torch._C.__file__)  # finds what torch itself is linked with
    if not hasattr(library, "GOMP_parallel") or hasattr(library, "kmp_set_blocktime"):
        return None
    return library


def fitting_threads() -> int:
    """How many threads torch should compute with: its own number, if there are cores for them."""
    import torch

    own = torch.get_num_threads()
    return own if _COUNT in os.environ else min(own, usable_cores())


class Share:
    """What a process computes with, and what it got of it since this was made."""

    def __init__(self, threads: int) -> None:
        self.threads, self._start = threads, thread_times()

    def to_mapping(self) -> dict[str, float]:
        """``threads`` of torch, and ``waited``: the share of its time that a thread had no core."""
        waited = difference(self._start, thread_times()).share_waited
        return {"threads": self.threads, "waited": round(waited, 3)}


@contextmanager
def sharing(threads: int | None = None) -> Iterator[Share]:
    """Within the block, torch takes no more threads than there are cores, and yields to others.

    torch must be installed. A number of ``threads`` that is given is used as it is.
    """
    import torch

    before = torch.get_num_threads()
    if threads is None:
        threads = fitting_threads()
    if threads != before:
        torch.set_num_threads(threads)
    chosen = any(name in os.environ for name in _WAIT_SETTINGS)
    counts = any(times.ran for times in thread_times().values())  # some sandboxes count nothing
    spare = None if chosen or not counts else spare_team()
    watcher = None if spare is None else Watcher(spare)
    try:
        yield Share(threads)
    finally:
        if watcher is not None:
            watcher.close()
        if threads != before:
            torch.set_num_threads(before)
        disband()


def spare_team() -> Callable[[], None] | None:
    """What starts, in the thread that calls it, a team that makes all others yield.

    ``None`` where torch has one thread or another OpenMP than GNU's, or where the team would have
    to be large, since torch has far fewer threads than there are cores.
    """
    import torch

    if torch.get_num_threads() == 1:
        return None
    library = _libgomp(torch)
    if library is None:
        return None
    threads = library.omp_get_num_procs() - torch.get_num_threads() + 2
    if not 2 <= threads <= _MOST_SPARE:
        return None
    parallel = library.GOMP_parallel
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    nothing = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p)
    return lambda: parallel(nothing, None, threads, 0)


class Judgement:
    """Decides whether to yield, from how long threads waited for a core.

    It starts with the times of the process so far, at the time ``now``.
    """

    def __init__(self, times: Times, now: float = 0.0) -> None:
        self.yields = times.share_waited > BUSY
        self._patience = PATIENCE
        self._since = now  # it yields, or spins, since then

    def judge(self, times: Times, seconds: float, now: float) -> bool:
        """Take in the times of the last ``seconds``; return whether to yield from ``now`` on."""
        if times.ran + times.waited < _IDLE * seconds:
            self._since += seconds if self.yields else 0.0  # nothing is learned
        elif self.yields and now - self._since >= self._patience:
            self.yields, self._since = False, now
        elif not self.yields and times.share_waited > BUSY:
            in_vain = now - self._since < self._patience
            self._patience = min(2 * self._patience, MOST_PATIENCE) if in_vain else PATIENCE
            self.yields, self._since = True, now
        return self.yields


class Watcher:
    """A thread that looks at the times of this process's threads, and lets them yield or spin."""

    def __init__(
        self,
        spare: Callable[[], None],
        read: Callable[[], Mapping[int, Times]] | None = None,
    ) -> None:
        self._spare, self._read = spare, read or thread_times
        self._closed = threading.Event()
        self._team: _Team | None = None
        self._thread = threading.Thread(target=self._watch, name="agentpref-cores", daemon=True)
        self._thread.start()

    @property
    def yields(self) -> bool:
        """Whether threads yield now."""
        return self._team is not None

    def close(self) -> None:
        """Stop watching; threads wait again as torch lets them."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        before, then = self._look(), time.monotonic()
        judgement = Judgement(difference({}, before), then)
        self._set(judgement.yields)
        while not self._closed.wait(LOOK_SECONDS):
            after, now = self._look(), time.monotonic()
            self._set(judgement.judge(difference(before, after), now - then, now))
            before, then = after, now
        self._set(False)

    def _look(self) -> dict[int, Times]:
        """The times of all threads but this one, which only waits for cores that are in use."""
        own = threading.get_native_id()
        return {thread: times for thread, times in self._read().items() if thread != own}

    def _set(self, yields: bool) -> None:
        if yields and self._team is None:
            self._team = _Team(self._spare)
        elif not yields and self._team is not None:
            self._team.end()
            self._team = None


class _Team:
    """A thread with an OpenMP team that has nothing to do."""

    def __init__(self, spare: Callable[[], None]) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._hold, args=(spare,), name="agentpref-yield", daemon=True
        )
        self._thread.start()

    def end(self) -> None:
        """End the thread, and its team with it."""
        self._over.set()
        self._thread.join()

    def _hold(self, spare: Callable[[], None]) -> None:
        spare()
        self._over.wait()


def thread_times() -> dict[int, Times]:
    """How long each thread of this process ran and waited, as the kernel counts; by thread.

    Empty where the kernel does not count.
    """
    found = {}
    for folder in _PROC.glob("self/task/*"):
        with suppress(OSError):  # a thread that has ended, or a kernel that does not count
            ran, waited, _ = (folder / "schedstat").read_text(encoding="utf-8").split()
            found[int(folder.name)] = Times(int(ran) / 1e9, int(waited) / 1e9)
    return found


def difference(before: Mapping[int, Times], after: Mapping[int, Times]) -> Times:
    """The times of all threads between two readings; those that are new count from their start."""
    ran = waited = 0.0
    for thread, times in after.items():
        earlier = before.get(thread, Times())
        ran += times.ran - earlier.ran
        waited += times.waited - earlier.waited
    return Times(ran, waited)
