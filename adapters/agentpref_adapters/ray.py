"""Ray: the same update on the machines of a Ray cluster.

``agentpref update --ray ADDRESS --workers N`` runs :func:`agentpref.update` as a Ray
``TorchTrainer`` of N workers, which are the processes of one team (:mod:`agentpref.learn.team`).
Ray starts them, and starts them anew when one is lost; all else is as under any other launcher.

A home stays on its disk, because SQLite's locks are unreliable on a network file system. So the
first worker, which alone opens the home, runs on the node where this is called. The others get from
it all that they need but the base model. It talks with the caller over a :class:`_Line`: progress
goes one way, and a signal the other, because none reaches the thread that Ray runs it in.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import agentpref
from agentpref.errors import (
    AgentprefError,
    ConfigError,
    MissingDependency,
    UpdateError,
    UpdateInterrupted,
)
from agentpref.home import Home
from agentpref.learn import checkpoint, resume
from agentpref.learn.process import Interrupts, settle
from agentpref.learn.team import error_from_json, error_to_json, follows
from agentpref.models.threads import usable_cores
from agentpref.types import Progress, UpdateReport

try:
    import ray
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer
except ImportError as error:
    raise MissingDependency(
        f"agentpref_adapters.ray needs {error.name}, which is not installed: "
        "run pip install 'agentpref[ray]'"
    ) from error

__all__ = ["update"]

LOST_WORKERS = 3
"""How often workers may be lost, or end with an error that is not ours, before an update fails.
Nodes that Ray says were taken back (spot instances) do not count."""

STARTING = "start workers"
"""The stage until the first worker runs. It lasts as long as Ray waits for machines."""

_LOOK_SECONDS = 0.25  # how often each end of a line looks for news
_OBJECT_BYTES = 128 << 20  # for the store of a Ray that is started here; little goes through it
_CONNECT_SECONDS = 5.0
_NODE = "ray.io/node-id"
_STATISTICS = "RAY_USAGE_STATS_ENABLED"

_logger = logging.getLogger(__name__)


def update(
    home: str | Path | None = None,
    *,
    model: str,
    address: str,
    workers: int = 1,
    namespace: str = "default",
    progress: Progress | None = None,
    **options: Any,
) -> UpdateReport:
    """Run :func:`agentpref.update` on the workers of a Ray cluster.

    Call it on the node of the cluster that has the home. Each worker takes a GPU if this node has
    one, else a core. If one is lost, all start anew, and resume from the state that is saved in the
    home. In the main thread it handles SIGINT and SIGTERM as :func:`agentpref.update` does.

    Args:
        home: as in :func:`agentpref.update`.
        model: as there; a folder must be at the same place on every machine.
        address: ``"auto"`` or ``"host:port"`` of a cluster that this machine belongs to, or
            ``"local"`` for a Ray that is started here and ends with the update. A program that is
            connected already stays with its cluster.
        workers: how many processes train together; an update is resumed only by as many.
        namespace: as there.
        progress: as there; called in this process.
        options: other arguments of :func:`agentpref.update`; checks and scorers are pickled.

    Raises:
        ConfigError: there are no workers, or the address is not one of a cluster.
        UpdateError: Ray cannot be reached, this node has no room for a worker, or workers were
            lost too often.
        AgentprefError: what :func:`agentpref.update` raised.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}, but must be at least 1")
    if "://" in address:
        raise ConfigError(
            f"{address!r} is an address for clients, whose machines Ray cannot train on; give "
            "auto, on the node of the cluster that has the home"
        )
    place, interrupts = Home.open(home), Interrupts()
    job = {
        "home": str(place.path.absolute()),
        "model": str(Path(model).absolute()) if Path(model).is_dir() else model,
        "namespace": namespace,
        **options,
    }
    outcome: dict[str, Any] = {}
    try:
        with interrupts.listening(), interrupts.deferred(), _connected(address, workers):
            outcome = _run(job, workers, interrupts, progress)
    except KeyboardInterrupt as error:  # after the first signal at the end, after another at once
        if not outcome:
            state = checkpoint.path_of(place.training, namespace)
            raise UpdateInterrupted(
                f"ended at once; {resume.outlook(state)}", interrupts.signum or signal.SIGINT
            ) from error
    if "error" in outcome:
        raise error_from_json(outcome)
    return UpdateReport(**outcome["report"])


@contextmanager
def _connected(address: str, workers: int) -> Iterator[None]:
    """Connect to Ray, or start one, without statistics of usage for Ray's makers."""
    if ray.is_initialized():
        yield
        return
    own: dict[str, Any] = {
        "num_cpus": max(workers, usable_cores()),
        "object_store_memory": _OBJECT_BYTES,
        "include_dashboard": False,
    }
    told, on_sigterm = os.environ.get(_STATISTICS), signal.getsignal(signal.SIGTERM)
    os.environ.setdefault(_STATISTICS, "0")
    try:
        with _translated(address):
            if ":" in address:  # Ray would try for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
            settings = own if address == "local" else {}
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **settings)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has set one that exits without a word
        yield
    finally:
        ray.shutdown()
        if told is None:
            del os.environ[_STATISTICS]


@contextmanager
def _translated(address: str) -> Iterator[None]:
    """Raise what Ray raises when it is not to be had as ``UpdateError``."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise UpdateError(
            f"no Ray cluster of this machine at {address!r} ({_first_line(error)}); start one with "
            "`ray start --head`, join one with `ray start --address`, or give local"
        ) from error


def _run(
    job: dict[str, Any], workers: int, interrupts: Interrupts, progress: Progress | None
) -> dict[str, Any]:
    """Train on the workers, pass on what the first one tells, and return its outcome."""
    node = ray.get_runtime_context().get_node_id()
    line = ray.remote(num_cpus=0, label_selector={_NODE: node})(_Line).remote()
    hear = _hearing(line, workers, progress)
    with tempfile.TemporaryDirectory(prefix="agentpref-ray-") as folder:
        trainer = TorchTrainer(
            _take_part,
            train_loop_config={**job, "line": line, "workers": workers},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=_takes_gpus(node, workers),
                label_selector=[{_NODE: node}, *({} for _ in range(workers - 1))],
            ),
            run_config=RunConfig(
                storage_path=folder, failure_config=FailureConfig(max_failures=LOST_WORKERS)
            ),
        )
        pool = ThreadPoolExecutor(1, "agentpref-ray")  # fit() would take Ctrl-C for itself
        try:
            done = pool.submit(trainer.fit)
            while not wait([done], _LOOK_SECONDS).done:
                begun = hear()
                if interrupts.asked and not begun:
                    raise KeyboardInterrupt  # no worker is there to tell
                if interrupts.asked:
                    line.interrupt.remote(interrupts.signum)
            hear()
            outcome: dict[str, Any] = done.result().return_value
            return outcome
        except (RayError, TrainingFailedError) as error:
            if interrupts.asked:
                raise KeyboardInterrupt from error  # the signal may have reached Ray's processes
            raise _failed(error) from error
        finally:
            ray.kill(line)
            pool.shutdown(wait=False)


def _takes_gpus(node: str, workers: int) -> bool:
    """Whether a worker takes a GPU: if this node has one, since it is the node of the first.

    Raises:
        UpdateError: this node has neither a GPU nor a core for workers.
    """
    (here,) = (each["Resources"] for each in ray.nodes() if each["NodeID"] == node)
    kind = next((kind for kind in ("GPU", "CPU") if here.get(kind, 0) >= 1), None)
    if kind is None:
        raise UpdateError(
            "this node of the Ray cluster takes no workers, and the first one needs the home, "
            "which is here; start Ray here with a core or a GPU: ray start --num-cpus 1"
        )
    there = int(ray.cluster_resources().get(kind, 0))
    if there < workers:
        waits = "the Ray cluster has %s %ss for %s workers; the update waits for more"
        _logger.warning(waits, there, kind, workers)
    return kind == "GPU"


class _Line:
    """What the first worker and the caller tell each other, in an actor on their node."""

    def __init__(self) -> None:
        self._told: list[tuple[str, int, int]] = []
        self._signum: int | None = None

    def tell(self, stage: str, done: int, total: int) -> int | None:
        """Tell the caller how far the update is; returns the signal that it got, if one came."""
        self._told.append((stage, done, total))
        return self._signum

    def hear(self) -> list[tuple[str, int, int]]:
        """What was told since the last call."""
        told, self._told = self._told, []
        return told

    def interrupt(self, signum: int) -> None:
        """Answer with this signal from now on."""
        self._signum = signum


def _hearing(line: Any, workers: int, progress: Progress | None) -> Callable[[], bool]:
    """A function that passes on what was told, and says whether workers have started.

    It warns when they start another time.
    """
    progress, starts = progress or (lambda stage, done, total: None), 0
    progress(STARTING, 0, workers)

    def hear() -> bool:
        nonlocal starts
        for stage, done, total in ray.get(line.hear.remote()):
            starts += stage == STARTING
            if stage == STARTING and starts > 1:
                _logger.warning("a worker was lost; the update resumes from its saved state")
            progress(stage, done, total)
        return starts > 0

    return hear


def _telling(line: Any, interrupts: Interrupts) -> Progress:
    """Progress that goes to the caller, at most every quarter second; a signal may come back."""
    last = 0.0

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal last
        if 0 < done < total and time.monotonic() < last + _LOOK_SECONDS:
            return
        last = time.monotonic()
        try:
            signum = ray.get(line.tell.remote(stage, done, total))
        except RayError:  # nobody waits for this update any more
            signum = signal.SIGTERM
        if signum is not None:
            interrupts.ask(signum)

    return tell


def _take_part(job: dict[str, Any]) -> dict[str, Any]:
    """A worker's part of an update, in its process: the report, or our error, as plain values.

    Ray starts workers again that raise. An error of ours would only come again.
    """
    settle()
    interrupts = Interrupts()
    tell = _telling(job.pop("line"), interrupts)
    workers = job.pop("workers")
    if not follows():
        tell(STARTING, workers, workers)
    try:
        report = agentpref.update(**job, progress=tell, interrupts=interrupts)
    except AgentprefError as error:
        return error_to_json(error)
    return {"report": report.to_mapping()}


def _failed(error: Exception) -> UpdateError:
    """An update that Ray gave up, with the first error of a worker."""
    failures = getattr(error, "worker_failures", {})
    rank, cause = min(failures.items(), default=(None, error))
    whose = "" if rank is None else f" worker {rank}:"
    return UpdateError(
        f"Ray ended the update:{whose} {type(cause).__name__}: {_first_line(cause)}; Ray's logs "
        "have more, and the next `agentpref update` resumes"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
