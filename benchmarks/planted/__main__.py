"""The shipped gate on planted nights: 40 that are bad and 40 that are good, on the bundled model.

    python -m benchmarks.planted                          what has no row yet, then the counts
    python -m benchmarks.planted --each 2 --hours 1       two nights of each kind
    python -m benchmarks.planted --kinds empty,shorter
    python -m benchmarks.planted report

Every case starts from a home with a live revision and a day of ordinary requests, and is one
``agentpref.update`` with default settings. After a bad night that was not promoted comes a good one
in the same home, which must be. There is a JSON row of each night. A bad night that was promoted is
*harmless* where its planted harm is not in the revision that serves, because the update got rid of
it by itself. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import agentpref
from agentpref.config import UpdateConfig
from agentpref.errors import AgentprefError, UpdateInterrupted
from agentpref.home import Home
from benchmarks._report import Target, at_least, print_report
from benchmarks.planted import cases
from benchmarks.planted.cases import BAD, GOOD, Kind
from benchmarks.streams import altered
from benchmarks.streams.items import Night, asked, judge, traffic
from benchmarks.streams.measure import Meter
from benchmarks.streams.rows import Row, Rows, commit, say

MODEL = "tiny"
EACH_BAD, EACH_GOOD, REQUESTS = 4, 5, 60
SERVES = ("promoted", "passed")


def main() -> None:
    """Run the cases that were asked for, and count the verdicts of all rows."""
    options = _options()
    if options.what == "run":
        _run(options)
    rows = list(Rows(options.rows))
    print(table(rows))
    print_report("planted", counts(rows), targets(rows))


def _run(options: argparse.Namespace) -> None:
    from filelock import FileLock, Timeout

    os.nice(10)
    warnings.simplefilter("ignore", FutureWarning)  # of peft, at every update
    until = None if options.hours is None else time.monotonic() + 3600 * options.hours
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(options.work / "lock", timeout=0), Meter(MODEL, options.work) as meter:
            runner = Runner(options.work, Rows(options.rows), meter)
            for number, (name, seed) in enumerate(_cases(options)):
                if until is not None and time.monotonic() > until:
                    say("the time is up; the same command goes on")
                    return
                runner.run(name, seed, number)
    except Timeout as error:
        raise SystemExit(f"error: another process works in {options.work}; wait for it") from error


def _cases(options: argparse.Namespace) -> list[tuple[str, int]]:
    """All cases, seed after seed, so that an early end has some of each kind."""
    found = [
        (name, seed)
        for kinds, each in ((BAD, EACH_BAD), (GOOD, EACH_GOOD))
        for name in kinds
        if name in options.kinds
        for seed in range(options.each or each)
    ]
    return sorted(found, key=lambda case: case[1])


class Runner:
    """Runs cases, and keeps their rows."""

    def __init__(self, work: Path, rows: Rows, meter: Meter) -> None:
        self._work, self._rows, self._meter = work, rows, meter
        self._begun = cache(self._begin)

    def run(self, name: str, seed: int, number: int) -> None:
        """Run a case and, where it is bad and was not promoted, the good night after it."""
        key = {"kind": name, "seed": seed, "base": self._meter.base}
        known = {row["role"]: row for row in self._rows.find(key)}
        if "planted" in known and (not self._is_followed(known["planted"]) or "next" in known):
            return
        home = self._work / f"case-{name}-{seed}"
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(self._begun(seed), home)
        kind = {**BAD, **GOOD}[name]
        row = self._night(home, kind, seed, {**key, "role": "planted", "bad": name in BAD})
        if "planted" not in known:
            self._keep(row)
        if self._is_followed(row):
            after = cases.alternating([*GOOD], number)
            follows = {**key, "role": "next", "bad": False, "next_kind": after}
            self._keep(self._night(home, GOOD[after], seed + 1, follows))
        shutil.rmtree(home)

    def _is_followed(self, row: Row) -> bool:
        return bool(row["bad"] and row["verdict"] not in SERVES)

    def _begin(self, seed: int) -> Path:
        """A home with a live revision, made once a seed. Its first night needs no gate."""
        home = self._work / f"begun-{seed}-{self._meter.base}"
        shutil.rmtree(home, ignore_errors=True)
        Home.create(home)
        self._log(home, cases.learned(seed), seed)
        with altered.no_gate():
            agentpref.update(home, model=MODEL, config=UpdateConfig(seed=seed))
        return home

    def _log(self, home: Path, night: Night, seed: int) -> None:
        """Log what people judged, and a day of ordinary requests that what serves answered."""
        drawn = self._meter.subject.ordinary(f"{night.name} {seed}")
        prompts = [asked(next(drawn)) for _ in range(REQUESTS)]
        live = agentpref.Registry(home).live()
        answers = self._meter.answers(live, [(messages, ()) for messages in prompts])
        with agentpref.Log(home) as log:
            judge(log, night)
            traffic(log, prompts, answers)

    def _night(self, home: Path, kind: Kind, seed: int, key: Row) -> Row:
        """Log a night, update, and measure what serves where that is something new."""
        night, registry = kind.night(seed), agentpref.Registry(home)
        self._log(home, night, seed)
        before = registry.live()
        config = UpdateConfig.from_mapping({"seed": seed, **kind.settings})
        started = time.perf_counter(), time.process_time()
        try:
            with kind.fault():
                report = agentpref.update(home, model=MODEL, config=config)
        except UpdateInterrupted:
            raise
        except AgentprefError as error:
            found: Row = {"verdict": "failed", "reasons": [f"{type(error).__name__}: {error}"]}
        else:
            failed = [check["name"] for check in report.checks if not check["passed"]]
            found = {"verdict": report.verdict, "reasons": report.reasons, "failed": failed}
            found |= {"accuracy": report.accuracy, "counts": report.counts, "notes": report.notes}
        found["seconds"] = round(time.perf_counter() - started[0], 2)
        found["cpu"] = round(time.process_time() - started[1], 2)
        row = {**key, **found, "commit": commit()}
        if found["verdict"] in SERVES:
            strata = [cases.learned(seed), night]
            row["before"] = self._meter.measure(before, strata)
            row["after"] = self._meter.measure(registry.live(), strata)
        return row

    def _keep(self, row: Row) -> None:
        self._rows.append(row)
        name = (
            row["kind"] if row["role"] == "planted" else f"{row['next_kind']} after {row['kind']}"
        )
        why = f" ({'; '.join(row['reasons'])})" if row["reasons"] else ""
        took = f"{row['seconds']:.0f} s ({row['cpu']:.0f} s CPU)"
        say(f"{name} {row['seed']}: {row['verdict']}{why}, {took}")


def is_harmless(row: Row) -> bool:
    """Whether a bad night was promoted without the harm that was planted."""
    if row["verdict"] not in SERVES:
        return False
    before, after = row["before"], row["after"]
    harms: Mapping[str, Callable[[], bool]] = {
        "inverted": lambda: after["ranking"][0] < before["ranking"][0] - 0.05,
        "over-budget": lambda: after["kl"] > UpdateConfig().gate.kl_budget,
        "not-written": lambda: after["behaviour"][1] < before["behaviour"][1] + 0.25,
        "damage": lambda: not _is_capable(row),
    }
    return not harms.get(row["kind"], lambda: True)() and _is_capable(row)


def _is_capable(row: Row) -> bool:
    return bool(row["after"]["capability"] >= row["before"]["capability"] - 0.03)


def table(rows: Sequence[Row]) -> str:
    """Verdicts by kind, and which checks failed how often, as Markdown."""
    titles = ["night", "nights", "promoted", "refused", "other", "harmless", "next promoted"]
    titles += ["CPU s", "checks that failed"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for name in [*BAD, *GOOD]:
        own = [row for row in rows if row["kind"] == name and row["role"] == "planted"]
        if not own:
            continue
        after = [row for row in rows if row["kind"] == name and row["role"] == "next"]
        verdicts = Counter(row["verdict"] for row in own)
        promoted = sum(verdicts[v] for v in SERVES)
        failed = Counter(check for row in own for check in row.get("failed", []))
        cells = [
            f"{'bad' if name in BAD else 'good'}: {name}",
            len(own),
            promoted,
            verdicts["refused"],
            len(own) - promoted - verdicts["refused"],
            sum(map(is_harmless, own)) if name in BAD else "",
            f"{sum(row['verdict'] in SERVES for row in after)} of {len(after)}" if after else "",
            f"{sum(row['cpu'] for row in own) / len(own):.0f}",
            ", ".join(f"{check} {n}" for check, n in failed.most_common()),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def counts(rows: Sequence[Row]) -> dict[str, Any]:
    """How many nights of each sort got which verdict."""
    planted = [row for row in rows if row["role"] == "planted"]
    return {
        "bad": dict(Counter(row["verdict"] for row in planted if row["bad"])),
        "bad_promoted_harmless": sum(is_harmless(row) for row in planted if row["bad"]),
        "good": dict(Counter(row["verdict"] for row in planted if not row["bad"])),
        "next": dict(Counter(row["verdict"] for row in rows if row["role"] == "next")),
        "cpu_s_a_night": round(sum(row["cpu"] for row in rows) / max(1, len(rows)), 1),
    }


def targets(rows: Sequence[Row]) -> list[Target]:
    """At least 38 of 40 bad nights kept out, 36 of 40 good ones in, and every next one in."""
    sides = {
        "bad nights that were not promoted": (
            [row["verdict"] not in SERVES or is_harmless(row) for row in rows if _is(row, True)],
            38 / 40,
        ),
        "good nights that were promoted": (
            [row["verdict"] in SERVES for row in rows if _is(row, False)],
            36 / 40,
        ),
        "good nights promoted after a refused one": (
            [row["verdict"] in SERVES for row in rows if row["role"] == "next"],
            1.0,
        ),
    }
    return [
        at_least(f"{name}, of {len(right)}", sum(right) / len(right), least)
        for name, (right, least) in sides.items()
        if right
    ]


def _is(row: Row, bad: bool) -> bool:
    return bool(row["role"] == "planted" and row["bad"] is bad)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planted",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", nargs="?", choices=("run", "report"), default="run")
    add("--kinds", type=_kinds, default=[*BAD, *GOOD], help=", ".join([*BAD, *GOOD]))
    add("--each", type=int, help=f"nights of each kind ({EACH_BAD} of bad, {EACH_GOOD} of good)")
    add("--hours", type=float, help="begin no case after so many hours")
    add("--rows", type=Path, default=Path("benchmarks/data/planted.jsonl"))
    add("--work", type=Path, default=Path(".bench-planted"), help="folder of the homes")
    return parser.parse_args()


def _kinds(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in {**BAD, **GOOD}]:
        known = ", ".join([*BAD, *GOOD])
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {known}")
    return names


if __name__ == "__main__":
    main()
