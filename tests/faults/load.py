"""A mixed load on one home, run as a process of its own, to be killed: `python load.py HOME`.

It says on standard output what it was promised, one line as soon as the call has returned, written
by one system call each, so that a line that is there was promised.
"""

from __future__ import annotations

import os
import random
import sys
import threading

from agentpref.record import spill
from agentpref.record.log import Log

THREADS = 3


def promise(kind: str, name: str) -> None:
    os.write(1, f"{kind} {name}\n".encode())


def work(log: Log, rng: random.Random) -> None:
    """Record conversations that grow, and judge them; half of the judgements name queued runs."""
    while True:
        asked = [
            {"role": "user", "content": f"question {rng.random()} " + "x" * rng.randrange(2_000)}
        ]
        for _ in range(rng.randrange(1, 5)):
            a, b = (log.record(asked, f"answer {rng.random()}", user_id="u") for _ in "ab")
            promise("feedback", log.feedback(a, key="thumbs", score=rng.choice([0, 1])))
            promise("comparison", log.compare(a, b, winner="a"))
            if rng.random() < 0.3:
                promise("feedback", log.correct(b, "a better answer", comment="shorter"))
            asked += [{"role": "assistant", "content": "fine"}, {"role": "user", "content": "more"}]


def main() -> None:
    """Load the home until killed; with a lock in its way, it spills soon and comes back soon."""
    spill.PATIENCE_SECONDS = 0.01
    spill.REST_SECONDS = 0.02
    log = Log(sys.argv[1])
    promise("ready", str(os.getpid()))
    for n in range(THREADS):
        threading.Thread(target=work, args=(log, random.Random(os.getpid() * 10 + n))).start()


if __name__ == "__main__":
    main()
