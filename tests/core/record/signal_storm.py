"""A process whose signal handler raises thousands of times, in the middle of whatever a log does.

Run as `python signal_storm.py FOLDER STROKES`. It goes on until so many exceptions were raised, and
a tenth as many judgements acknowledged. Prints what was lost, and ends by itself.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from agentpref.home import Home
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.store import Store

ASKED = [{"role": "user", "content": "2 + 2?"}]
LIFE_SECONDS = 0.7


class Storm(BaseException):
    """No Exception, like KeyboardInterrupt and SystemExit."""


class Sky:
    """Raises out of a signal handler at random moments while it is ``armed``."""

    def __init__(self) -> None:
        self.armed = False
        self.strokes = 0
        self.random = random.Random(7)
        signal.signal(signal.SIGALRM, self.strike)

    def strike(self, *_: object) -> None:
        """Handle the signal: raise."""
        if self.armed:
            self.strokes += 1
            raise self.random.choice((Storm, TimeoutError, KeyboardInterrupt))

    def storm(self, call: Callable[[], object]) -> None:
        """Call, and interrupt it, until it comes to its end."""
        is_done = False
        while not is_done:
            try:
                self.armed = True
                signal.setitimer(signal.ITIMER_REAL, self.random.uniform(2e-5, 8e-4))
                call()
                is_done = True
                self.armed = False
            except (Storm, TimeoutError, KeyboardInterrupt):  # noqa: PERF203
                self.armed = False


class App:
    """Logs from four threads; remembers what was acknowledged and what was tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.acknowledged: list[str] = []
        self.recorded: list[str] = []
        self.dropped = 0

    def use(self, log: Log, dice: random.Random, until: float) -> None:
        """Log and judge until some time."""
        while time.monotonic() < until:
            run = log.record(ASKED, "4")
            self.recorded.append(run)
            what = dice.random()
            if what < 0.6:
                self.acknowledged.append(log.feedback(run, key="k", score=1))
            elif what < 0.8:
                log.flush(1)
            else:
                log.dropped  # noqa: B018  reading it must be safe, too

    def live(self, sky: Sky) -> None:
        """Use a log from all threads, and close it, in the storm."""
        until = time.monotonic() + LIFE_SECONDS
        log = Log(self.folder)
        threads = [
            threading.Thread(target=self.use, args=(log, random.Random(n), until)) for n in range(3)
        ]
        for thread in threads:
            thread.start()
        sky.storm(lambda: self.use(log, sky.random, until))
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive(), "a thread hangs"
        log.record(ASKED, "the last one, which is still queued")
        sky.storm(log.close)
        log.close()
        self.dropped += sum(log.dropped.values())


def main() -> None:
    """Log in the storm, then compare what was said with what is found."""
    app, sky = App(Path(sys.argv[1])), Sky()
    wanted = int(sys.argv[2])
    while sky.strokes < wanted or len(app.acknowledged) < wanted / 10:
        app.live(sky)
    home = Home.open(app.folder)
    with closing(connect(home, readonly=True)) as connection:
        store = Store(connection)
        runs = {run.run_id for run in store.runs("default")}
        said = {each.feedback_id for each in store.feedback("default")}
    found = {
        "strokes": sky.strokes,
        "acknowledged": len(app.acknowledged),
        "lost": len(set(app.acknowledged) - said),
        "missing": len(set(app.recorded) - runs),
        "dropped": app.dropped,
        "threads": threading.active_count(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
