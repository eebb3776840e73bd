"""One life: an arm goes through the nights of a stream, and a row is kept of each.

Every night works on a copy of the home that the night before left. So a life that was ended at any
moment goes on with the first night that has no row, as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import agentpref
from agentpref.home import Home
from benchmarks.streams import catalogue
from benchmarks.streams.arms import ARMS, FROZEN, Arm, Learned, learn
from benchmarks.streams.catalogue import Sizes
from benchmarks.streams.items import asked, traffic
from benchmarks.streams.measure import Meter
from benchmarks.streams.rows import Row, Rows, commit, say
from benchmarks.streams.subjects import ORDINARY

_WATCHED = 30
"""How many pairs of each earlier night are looked at inside an update."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which life: the model, the stream, the seed and the arm; ``settings`` are for all arms."""

    model: str
    stream: str
    order: str
    seed: int
    arm: str
    sizes: Sizes
    settings: Mapping[str, Any]

    def key(self, base: str) -> Row:
        """What a row of this life has, and no row of another."""
        return {
            "model": Path(self.model).name,
            "base": base,
            "stream": self.stream,
            "order": self.order,
            "seed": self.seed,
            "arm": self.arm,
            "sizes": list(self.sizes),
            "settings": dict(self.settings),
        }


class Life:
    """A life as far as it was lived, and the nights that are still to come."""

    def __init__(self, plan: Plan, meter: Meter, rows: Rows, work: Path) -> None:
        self.plan, self._meter, self._rows = plan, meter, rows
        self._key = plan.key(meter.base)
        parts = (plan.stream, plan.order, str(plan.seed), plan.arm, _slug(self._key))
        self._place = work / "homes" / "-".join(parts)
        self.nights = catalogue.nights_of(
            plan.stream,
            meter.subject,
            meter.samples,
            bundled=plan.model == "tiny",
            sizes=plan.sizes,
            seed=plan.seed,
            order=plan.order,
        )

    def go_on(self, most: int | None, is_late: Callable[[], bool]) -> bool:
        """Live through the nights that have no row, up to ``most``; whether all of them have one.

        Raises:
            FileNotFoundError: there are rows, and the home that they left is gone.
        """
        if self.plan.arm == FROZEN:
            if not self._rows.find(self._key) and not is_late():
                self._keep(0, "base", Learned(FROZEN), self._meter.measure(None, self.nights), 0.0)
            return bool(self._rows.find(self._key))
        done, last = len(self._rows.find(self._key)), min(most or 99, len(self.nights))
        for number in range(done + 1, last + 1):
            if is_late():
                return False
            self._live_through(number, ARMS[self.plan.arm])
        if last == len(self.nights):
            shutil.rmtree(self._place, ignore_errors=True)
        return True

    def _live_through(self, number: int, arm: Arm) -> None:
        before, home = (self._place / f"night-{n}" for n in (number - 1, number))
        shutil.rmtree(home, ignore_errors=True)
        if number == 1 or arm.joint:
            Home.create(home)
        else:
            if not before.exists():
                raise FileNotFoundError(
                    f"{before} is gone, and night {number} goes on from it; remove the rows of "
                    f"{self.plan} to start this life again"
                )
            shutil.copytree(before, home)
        registry = agentpref.Registry(home)
        if arm.traffic:
            self._serve(home, number)
        nights = self.nights[:number]
        learned = learn(
            arm,
            home,
            self.plan.model,
            nights,
            {**self.plan.settings, "seed": self.plan.seed},
            watch=[night.examples()[:_WATCHED] for night in nights[:-1]],
        )
        started = time.perf_counter()
        measured = self._meter.measure(registry.live(), self.nights)
        self._keep(number, nights[-1].name, learned, measured, time.perf_counter() - started)
        shutil.rmtree(home if arm.joint else before, ignore_errors=True)

    def _serve(self, home: Path, number: int) -> None:
        """Let what serves answer a day of ordinary requests, and log them."""
        drawn = self._meter.subject.ordinary(f"{self.plan.seed} {number}")
        prompts = [asked(text) for text in islice(drawn, ORDINARY)]
        live = agentpref.Registry(home).live()
        answers = self._meter.answers(live, [(messages, ()) for messages in prompts])
        with agentpref.Log(home) as log:
            traffic(log, prompts, answers)

    def _keep(
        self, number: int, name: str, learned: Learned, measured: Mapping[str, Any], took: float
    ) -> None:
        row = {
            **self._key,
            "night": number,
            "name": name,
            "columns": [night.name for night in self.nights],
            "verdict": learned.verdict,
            "reasons": list(learned.reasons),
            **measured,
            "inside": list(learned.inside),
            "seconds": round(learned.seconds, 2),
            "cpu": round(learned.cpu, 2),
            "measured_s": round(took, 2),
            "training": dict(learned.training),
            "counts": dict(learned.counts),
            "commit": commit(),
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
        }
        self._rows.append(row)
        say(f"{_named(self.plan)} night {number}: {_words(row)}")


def live_all(
    plans: Sequence[Plan],
    meter: Meter,
    rows: Rows,
    work: Path,
    *,
    nights: int | None,
    is_late: Callable[[], bool],
) -> bool:
    """Live through all lives, one after the other; whether there was time for all."""
    for plan in plans:
        if is_late():
            return False
        if not Life(plan, meter, rows, work).go_on(nights, is_late):
            return False
    with suppress(OSError):
        (work / "homes").rmdir()
    return True


def _slug(key: Row) -> str:
    return hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=5).hexdigest()


def _named(plan: Plan) -> str:
    return f"{plan.stream}/{plan.order}/{plan.seed}/{plan.arm}"


def _words(row: Row) -> str:
    def mean(name: str) -> float:
        seen = row[name][: max(1, row["night"])]
        return float(sum(seen) / len(seen))

    return (
        f"{row['verdict']}, ranking {mean('ranking'):.3f}, behaviour {mean('behaviour'):.3f}, "
        f"KL {row['kl']:.3f}, perplexity {row['perplexity']:.2f}, capability "
        f"{row['capability']:.2f}, {row['seconds']:.0f} s + {row['measured_s']:.0f} s"
    )
