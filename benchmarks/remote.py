"""Logs on other machines: what arrives, and how fast, while everything is killed.

    python -m benchmarks.remote --seconds 20 --rate 2000 --replicas 8 --runs 2000

1. Four processes record through `RemoteLog` to one collector, which is killed and restarted three
   times. Counted is what the home holds in the end: nothing recorded is missing, nothing is there
   twice.
2. Replicas log runs and judgements, and ship them to a folder, as to object storage. One home
   merges them. Shipments and merges are killed at random. In the end, the digest of the home's
   content is that of one home that was given every row.

The promise for the second is 100,000 runs for each of eight replicas; the default is smaller, so
that a small machine takes a minute. The last line is the report.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.transfer.merge import merge
from agentpref.record.transfer.ship import ship
from benchmarks._report import Target, at_least, at_most, print_report

SENDERS, KILLS = 4, 3
KEY = "ap-benchmark"
ASK = [{"role": "system", "content": "You answer questions about an online shop." * 4}]

_SERVER = f"""
import sys, uvicorn
from starlette.applications import Starlette
from agentpref.record.log import Log
from agentpref_adapters._collector_http import collector_routes
log = Log(sys.argv[1], namespace="shop")
async def authenticate(request):
    return log if request.headers.get("authorization") == "Bearer {KEY}" else None
app = Starlette(routes=collector_routes(authenticate))
uvicorn.run(app, port=int(sys.argv[2]), log_level="error", lifespan="off")
"""


def send(url: str, outbox: Path, name: int, rate: float, seconds: float, result: Any) -> None:
    """Record at a rate for a time; report the ids, the calls' costs, and the time to drain."""
    from agentpref_adapters.remote import RemoteLog

    ids: list[str] = []
    costs: list[float] = []
    with RemoteLog(url, KEY, outbox=outbox) as log:
        begin = time.perf_counter()
        while (at := len(ids) / rate) < seconds:
            if (wait := begin + at - time.perf_counter()) > 0:
                time.sleep(wait)
            ask = [*ASK, {"role": "user", "content": f"question {name} {len(ids)}"}]
            called = time.perf_counter()
            ids.append(log.record(ask, f"answer {len(ids)}", thread_id=f"{name}", user_id="ada"))
            costs.append(time.perf_counter() - called)
        took = time.perf_counter() - begin
        delivered = log.flush(120)
        drained = time.perf_counter() - begin - took
        result.put((ids, statistics.median(costs), took, drained, delivered, log.dropped))


def collect(folder: Path, rate: float, seconds: float) -> dict[str, Any]:
    """Four senders, and one collector that is killed and restarted three times."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", _SERVER, str(folder / "home"), str(port)]
    server = subprocess.Popen(command)
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    begin = time.perf_counter()
    senders = [
        context.Process(
            target=send,
            args=(f"http://127.0.0.1:{port}", folder / f"outbox{n}", n, rate / SENDERS, seconds,
                  result),
        )
        for n in range(SENDERS)
    ]  # fmt: skip
    for sender in senders:
        sender.start()
    for turn in range(KILLS):
        time.sleep(max(0.0, begin + seconds * (turn + 1) / (KILLS + 1) - time.perf_counter()))
        server.kill()
        server.wait()
        server = subprocess.Popen(command)
    told = [result.get(timeout=seconds + 240) for _ in senders]
    for sender in senders:
        sender.join()
    server.terminate()
    server.wait()
    said = [name for ids, *_ in told for name in ids]
    with closing(connect(Home.open(folder / "home"), readonly=True)) as connection:
        kept = [name for (name,) in connection.execute("SELECT run_id FROM run")]
    return {
        "runs": len(said),
        "runs_per_second": sum(len(ids) / took for ids, _, took, *_ in told),
        "record_us": 1e6 * statistics.median(cost for _, cost, *_ in told),
        "seconds_to_drain": max(drained for *_, drained, _, _ in told),
        "missing": len({*said} - {*kept}),
        "doubled": len(kept) - len({*kept}) + len({*kept} - {*said}),
        "undelivered": sum(not delivered for *_, delivered, _ in told),
        "dropped": sum(sum(dropped.values()) for *_, dropped in told),
    }


# Replicas


def rows(replica: int, runs: int) -> Iterator[dict[str, Any]]:
    """What one replica logs: runs, a judgement of one in ten, and comparisons."""
    for n in range(runs):
        name = f"{replica}-{n}"
        ask = [*ASK, {"role": "user", "content": f"question {n % 500} of {replica}"}]
        who = {"user_id": f"user {n % 97}", "created_at": 1.7e9 + n}
        yield {"type": "run", "id": name, "messages": ask, "output": f"answer {n}", **who}
        if n % 10 == 0:
            yield {"type": "feedback", "id": f"f{name}", "run_id": name, "key": "thumbs",
                   "score": n % 20 // 10, "scale": [0, 1], **who}  # fmt: skip
        if n % 500 == 0 and n:
            other = f"{replica}-{n - 500}"
            yield {"type": "comparison", "id": f"c{name}", "run_a": name, "run_b": other,
                   "winner": "a", **who}  # fmt: skip


def give(log: Log, given: list[dict[str, Any]]) -> None:
    """Give rows to a home, as a collector does."""
    for at in range(0, len(given), 1_000):
        outcomes = log.receive(given[at : at + 1_000])
        assert not any(outcomes), next(filter(None, outcomes))


def digest(home: Home) -> str:
    """A hash of everything that was said in a home, whatever the order in which it came."""
    whole = hashlib.sha256()
    columns = {
        "message": "id, parent, body",
        "run": "run_id, namespace, created_at, prompt, output, user_id, params, tags, metadata",
        "feedback": "feedback_id, run_id, created_at, key, score, value, source, user_id, scale",
        "comparison": "comparison_id, created_at, run_a, run_b, winner, source, user_id",
    }
    with closing(connect(home, readonly=True)) as connection:
        for table, names in columns.items():
            for row in connection.execute(f"SELECT {names} FROM {table} ORDER BY 1"):
                whole.update(repr(row).encode())
    return whole.hexdigest()


def killed(call: Any, *args: Any) -> bool:
    """Run a call in a process that is killed at random; returns whether it was."""
    process = multiprocessing.get_context("fork").Process(target=call, args=args)
    process.start()
    process.join(random.expovariate(1 / 2.0))
    if process.is_alive():
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        return True
    assert process.exitcode == 0
    return False


def replicate(folder: Path, replicas: int, runs: int) -> dict[str, Any]:
    """Replicas ship, one home merges; all of it is killed now and then."""
    random.seed(7)
    bus, kills = str(folder / "bus"), 0
    key = os.urandom(32).hex() + "\n"
    logs = []
    for name in ("all", "home", *map(str, range(replicas))):
        with Log(folder / name, namespace="shop") as log:
            log.home.user_keys.write_text(key)
        logs.append(Log(folder / name, namespace="shop"))
    everything, home, *others = logs
    shipping = merging = 0.0
    for part in range(3):
        for replica, log in enumerate(others):
            given = [*rows(replica, runs)]
            share = given[part * len(given) // 3 : (part + 1) * len(given) // 3]
            give(log, share)
            give(everything, share)
            log.close()  # no thread of ours crosses the fork
            others[replica] = Log(log.home.path, namespace="shop")
            begin = time.perf_counter()
            kills += killed(ship, log.home, bus)
            shipping += time.perf_counter() - begin
        begin = time.perf_counter()
        kills += killed(merge, home.home, [bus])
        merging += time.perf_counter() - begin
    begin = time.perf_counter()
    for log in others:
        ship(log.home, bus)
    shipping += time.perf_counter() - begin
    begin = time.perf_counter()
    (merged,) = merge(home.home, [bus])
    merging += time.perf_counter() - begin
    same = digest(home.home) == digest(everything.home)
    for log in (everything, home, *others):
        log.close()
    return {
        "replicas": replicas,
        "runs_each": runs,
        "kills": kills,
        "seconds_shipping": shipping,
        "seconds_merging": merging,
        "segments": len(os.listdir(bus)),
        "refused_or_waiting": len(merged.refused) + len(merged.waiting),
        "same_digest": same,
    }


def main() -> None:
    """Measure, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=2_000.0)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--runs", type=int, default=2_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "collector").mkdir()
        replicated = replicate(path / "replicas", asked.replicas, asked.runs)
        collected = collect(path / "collector", asked.rate, asked.seconds)
    targets = [
        at_least("runs/s from four processes", collected["runs_per_second"], 0.98 * asked.rate),
        at_most("runs missing, doubled or dropped at the collector",
                sum(collected[n] for n in ("missing", "doubled", "undelivered", "dropped")), 0),
        Target("digest of the home after shipping", float(replicated["same_digest"]), "== 1",
               replicated["same_digest"]),
    ]  # fmt: skip
    print_report("remote", {"collector": collected, "replicas": replicated}, targets)


if __name__ == "__main__":
    main()
