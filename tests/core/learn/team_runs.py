"""A program of one or two processes that trains; test_team.py runs it and compares results.

``python team_runs.py BASE FOLDER [RUN…]`` does each run with a new learner. It writes the
adapter that every process ended with, and the results of the main one's steps.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import orjson

from agentpref.config import KLSettings, UpdateConfig
from agentpref.errors import UpdateError
from agentpref.learn import memory
from agentpref.learn.checkpoint import Checkpoint
from agentpref.learn.encode import EncodedExample
from agentpref.learn.follower import follow
from agentpref.learn.learner import Learner
from agentpref.learn.objective import Objective
from agentpref.learn.process import Interrupts
from agentpref.learn.team import Team, assembled
from agentpref.learn.trainer import Limits
from agentpref.models.adapter_files import read_adapter
from agentpref.models.base import load_base
from agentpref.types import Completion, Example, Prompt

PLAIN = UpdateConfig(batch_size=4, learning_rate=3e-3, epochs=2, kl=KLSettings(target=0.001))
CONFIGS = {
    "budgeted": PLAIN,
    "on live": PLAIN,
    "many passes": UpdateConfig(
        batch_size=6, learning_rate=3e-3, epochs=1, kl=KLSettings(weight=0.0)
    ),
    "pairs": PLAIN,
    "uneven": UpdateConfig(batch_size=3, learning_rate=3e-3, epochs=2, kl=KLSettings(weight=1.0)),
    "mixed": PLAIN,
    "groups": PLAIN,
    "resumed": PLAIN,
    "dies": PLAIN,
    "differs": PLAIN,
}
PROMPT = Prompt("prompt", ({"role": "user", "content": "?"},))


def ids(number, length):
    return tuple((7 * number + 3 * at) % 300 + 3 for at in range(length))


def row(name, labels, completions, prompt, **changes):
    own = tuple(Completion({"role": "assistant", "content": "."}, label) for label in labels)
    example = Example(name, "", 0.0, PROMPT, own, **{"origin": "comparison", **changes})
    return EncodedExample(example, prompt, completions, (None,) * len(completions))


def pair(number):
    origin = "correction" if number % 4 == 0 else "comparison"
    completions = (ids(number + 1, 6), ids(number + 2, 4))
    prompt = ids(number, 5 + number % 4)
    name, noise = f"p{number}", 0.01 * number
    return row(name, (1.0, 0.0), completions, prompt, origin=origin, noise=noise)


def thumb(number):
    completions = (ids(number + 5, 5), ids(number + 9, 7))
    label = float(number % 3 > 0)
    return row(f"t{number}", (label,), completions, ids(number, 6), origin="thumb")


def ordinary(number):
    return row(f"o{number}", (None,), (ids(number + 3, 8),), ids(number, 5), origin="ordinary")


def group(number):
    """Four graded answers; of the first, the last two tokens do not count."""
    completions = tuple(ids(number + at, 4 + at % 3) for at in (11, 14, 18, 21))
    found = row(f"g{number}", (0.4, 1.0, 0.0, 0.4), completions, ids(number, 7))
    mask = (*(True,) * (len(completions[0]) - 2), False, False)
    return replace(found, masks=(mask, None, None, None))


def rows_of(run):
    if run == "mixed":
        return [*map(pair, range(7)), *map(thumb, range(5)), *map(ordinary, range(3))]
    if run == "groups":
        return [*map(group, range(5)), *map(pair, range(4)), *map(thumb, range(3))]
    return [pair(number) for number in range(7 if run == "uneven" else 12)]


def lead(run, base, folder, team):
    """Do a run as the main process, or as the only one, and write its results."""
    live = read_and_removed(folder / "pairs-0") if run == "on live" else None
    learner = Learner(
        load_base(str(base)), live, CONFIGS[run], caches={}, progress=lambda *_: None, team=team
    )
    rows, steps, interrupts = rows_of(run), [], Interrupts()
    budget = {"seconds": 35.0, "clock": lambda: 10.0 * len(steps)} if run == "budgeted" else {}
    path = folder / "training" / f"{run}.safetensors"
    with interrupts.listening():
        report = learner.fit(
            rows,
            new=len(rows),
            imitation=2.0 if run == "groups" else 0.0,
            observe=steps.append,
            checkpoint=Checkpoint(path) if run in ("resumed", "dies") else None,
            limits=Limits(interrupts=interrupts, **budget),
        )
    found = {
        "steps": [list(step) for step in steps],
        "scores": [list(logps) for logps in learner.score("candidate", rows)],
        "processes": report.processes,
        "tokens_per_pass": report.tokens_per_pass,
        "resumed_at": report.resumed_at,
    }
    (folder / f"{run}.json").write_bytes(orjson.dumps(found))


def read_and_removed(folder):
    """An adapter that is nowhere but in this process: followers may be on another machine."""
    live = read_adapter(shutil.copytree(folder, folder.with_name("live")))
    shutil.rmtree(live.folder)
    return live


def interrupted(base, folder, team):
    """Start the run that is resumed, and interrupt it after two steps."""
    learner = Learner(
        load_base(str(base)), None, PLAIN, caches={}, progress=lambda *_: None, team=team
    )
    limits, seen = Limits(), []

    def observe(result):
        seen.append(result)
        limits.interrupts.signum = signal.SIGINT if len(seen) == 2 else None

    rows = rows_of("resumed")
    path = folder / "training" / "resumed.safetensors"
    try:
        learner.fit(rows, new=12, observe=observe, checkpoint=Checkpoint(path), limits=limits)
    except KeyboardInterrupt:
        return
    raise AssertionError("it was not interrupted")


@contextmanager
def passes_of(tokens):
    """Let this process take passes of so many tokens; the others must take the same."""
    usual = memory.tokens_per_pass
    memory.tokens_per_pass = lambda device: tokens
    yield
    memory.tokens_per_pass = usual


def write_what_each_process_trains(folder, team, runs):
    left, train = iter(runs), Learner.train

    def trained(self, *args, **options):
        report = train(self, *args, **options)
        self.save(folder / f"{next(left)}-{team.rank}")
        return report

    Learner.train = trained


def sabotage(run, team):
    """Let the follower die at its third step, or train something else."""
    if run == "dies" and not team.main:
        step, steps = Objective.__call__, iter(range(9))

        def dying(self, rows):
            if next(steps) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, rows)

        Objective.__call__ = dying
    if run == "differs" and not team.main:
        together = Team.sum_gradients

        def apart(self, parameters):
            parameters = list(parameters)
            together(self, parameters)
            for parameter in parameters:
                parameter.grad[0] += 1

        Team.sum_gradients = apart


def main(base, folder, *runs):
    with assembled() as team:
        write_what_each_process_trains(folder, team, runs)
        for run in runs:
            sabotage(run, team)
        if not team.main:
            print(follow(team))
            return
        for run in runs:
            if run == "resumed":
                interrupted(base, folder, team)
            with passes_of(40 if run == "many passes" else 2048):
                lead(run, base, folder, team)
        team.finish({"runs": len(runs)})


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # peft's and transformers'
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    except UpdateError as error:
        sys.exit(str(error))
