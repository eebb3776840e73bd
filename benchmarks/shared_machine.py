"""Nights and answers on two cores that others use too, and what yielding costs where nobody does.

A *night* is ``agentpref update`` on 300 pairs and 180 held-out ones, a process from its start to
its end. *Serving* is the in-process engine, which answers four clients without a pause. Both run
alone, and beside two processes that compute all the time; serving runs beside a night, too. Arms
that are *spinning* wait as OpenMP does by itself (``GOMP_SPINCOUNT=300000``), which is how all did
before threads yielded. The fair share of serving is half of its speed alone.

Figures are medians of arms that take turns. ``others`` is how many cores other work took meanwhile:
figures count where it is near 0. Run as `python -m benchmarks.shared_machine` (ten minutes);
`--model` takes another model, and `--spinning-seconds` limits a spinning night beside others.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeAlias

import psutil

import agentpref
from agentpref.home import Home
from agentpref.serve.backend import GenerationRequest
from agentpref.types import BASE
from benchmarks._report import Target, at_least, at_most, print_report
from benchmarks.demo_data import style_rows

CORES = 2
CLIENTS, TOKENS = 4, 64
WARM_SECONDS = 3.0  # until a process that serves or trains has found out who else works
ROUNDS = 3
DEFAULT: Mapping[str, str] = {}
SPINNING: Mapping[str, str] = {"GOMP_SPINCOUNT": "300000"}
SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
ENDED = (0, 4, 5)  # promoted, refused, too little evidence: all take the same work

Process: TypeAlias = subprocess.Popen[bytes]


def main() -> None:
    """Measure, print a line for each figure, and end with the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a bundled model, a folder or a hub's name")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--serving-seconds", type=float, default=6.0)
    parser.add_argument("--spinning-seconds", type=float, default=120.0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.model, options.serving_seconds)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as scratch:
        figures = Bench(Path(scratch), options).measure()
    for name, value in figures.items():
        print(f"{name:<36} {value:9.2f}")
    return print_report("shared_machine", figures, targets(figures))


def targets(figures: Mapping[str, float]) -> list[Target]:
    """What a night and serving may lose to others, and what yielding may cost where nobody is."""

    def ratio(name: str, other: str) -> float:
        return round(figures[name] / figures[other], 3)

    serving, per = "serving_alone_tokens_per_s", "tokens_per_s"
    return [
        at_most("night_beside_two_x_alone", ratio("night_beside_two_s", "night_alone_s"), 3.5),
        at_most("night_alone_x_spinning", ratio("night_alone_s", "night_alone_spinning_s"), 1.05),
        at_least("serving_x_spinning", ratio(serving, f"serving_alone_spinning_{per}"), 0.95),
        at_least("serving_share_beside_two", 2 * ratio(f"serving_beside_two_{per}", serving), 0.6),
        at_least(
            "serving_share_beside_a_night",
            2 * ratio(f"serving_beside_a_night_{per}", serving),
            0.6,
        ),
    ]


class Bench:
    """Runs the arms in turn, and notes each result beside what other work took."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.found: dict[str, list[float]] = defaultdict(list)
        self.environment = {k: v for k, v in os.environ.items() if k not in SETTINGS}
        teach(folder / "home")

    def measure(self) -> dict[str, float]:
        """Take every figure."""
        for number in range(self.options.rounds):
            for arm, settings in (("alone", DEFAULT), ("alone_spinning", SPINNING)):
                self._night(arm, settings)
                self._serve(arm, settings)
            with busy() as processes:
                self._night("beside_two", DEFAULT, processes)
                self._serve("beside_two", DEFAULT, processes)
                self._serve("beside_two_spinning", SPINNING, processes)
                if number == 0:
                    self._night("beside_two_spinning", SPINNING, processes)
            with self._night_after_night() as night:
                self._serve("beside_a_night", DEFAULT, [night])
        return {name: round(statistics.median(found), 2) for name, found in self.found.items()}

    def _night(self, arm: str, settings: Mapping[str, str], beside: Sequence[Process] = ()) -> None:
        """Time a night; one that spins beside others is ended at its limit, and that is noted."""
        home = self.folder / "night"
        shutil.copytree(self.folder / "home", home)
        limit = self.options.spinning_seconds if settings and beside else None
        started = time.monotonic()
        with self._others(f"night_{arm}", beside):
            night = self._start_night(home, settings)
            try:
                if night.wait(limit) not in ENDED:
                    raise SystemExit(f"a night exited {night.returncode}")
            except subprocess.TimeoutExpired:
                night.kill()
                night.wait()
        self.found[f"night_{arm}_s"].append(time.monotonic() - started)
        shutil.rmtree(home)

    def _start_night(self, home: Path, settings: Mapping[str, str], *more: str) -> Process:
        command = [sys.executable, "-m", "agentpref_cli", "update", "--model", self.options.model]
        command += ["--home", str(home), "--json", *more]
        environment = {**self.environment, **settings}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    @contextmanager
    def _night_after_night(self) -> Iterator[Process]:
        """Train all the time within the block."""
        home = self.folder / "endless"
        shutil.copytree(self.folder / "home", home)
        night = self._start_night(home, DEFAULT, "--set", "epochs=1000")
        time.sleep(3 * WARM_SECONDS)
        yield night
        if night.poll() is not None:
            raise SystemExit(f"the night beside serving exited {night.returncode}")
        night.kill()
        night.wait()
        shutil.rmtree(home)

    def _serve(self, arm: str, settings: Mapping[str, str], beside: Sequence[Process] = ()) -> None:
        """Count the tokens that an engine in a process of its own writes in a second."""
        command = [sys.executable, "-m", "benchmarks.shared_machine", "--serve"]
        command += ["--model", self.options.model]
        command += ["--serving-seconds", str(self.options.serving_seconds)]
        environment = {**self.environment, **settings}
        with self._others(f"serving_{arm}", beside):
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        self.found[f"serving_{arm}_tokens_per_s"].append(float(done.stdout))

    @contextmanager
    def _others(self, name: str, beside: Sequence[Process]) -> Iterator[None]:
        """Note how many cores work that is not ours takes within the block."""

        def spent() -> float:
            """Seconds of other work: of all cores, without this process, its children and these."""
            whole, ours = psutil.cpu_times(), psutil.Process().cpu_times()
            mine = [
                sum(ours[:4]),
                *(sum(psutil.Process(one.pid).cpu_times()[:4]) for one in beside),
            ]
            return float(whole.user + whole.nice + whole.system - sum(mine))

        before, started = spent(), time.monotonic()
        yield
        taken = (spent() - before) / (time.monotonic() - started)
        self.found[f"{name}_others"].append(taken)


@contextmanager
def busy() -> Iterator[list[Process]]:
    """Two processes that compute within the block."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(CORES)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def teach(folder: Path) -> None:
    """Make a home with 300 pairs to train on and 180 that are held out."""
    Home.create(folder)
    with agentpref.Log(folder) as log:
        for row in style_rows(random.Random(0)):
            asked = [{"role": "user", "content": row["text"]}]
            runs = [log.record(asked, row[name]) for name in ("liked", "disliked")]
            log.compare(*runs, winner="a")


def serve(model: str, seconds: float) -> None:
    """Answer several clients for some seconds, and print how many tokens were written in one."""
    from agentpref_adapters.transformers import TransformersBackend

    rows = style_rows(random.Random(0))
    with closing(TransformersBackend(model)) as backend:
        ends, written = time.monotonic() + WARM_SECONDS + seconds, [0] * CLIENTS

        def ask(client: int) -> None:
            for row in rows[client::CLIENTS] * 1000:
                asked = ({"role": "user", "content": row["text"]},)
                reply = backend.generate(BASE, GenerationRequest(asked, max_tokens=TOKENS))
                now = time.monotonic()
                if now > ends:
                    return
                if now > ends - seconds:
                    written[client] += len(reply.token_ids)

        threads = [threading.Thread(target=ask, args=(client,)) for client in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(sum(written) / seconds)


if __name__ == "__main__":
    main()
