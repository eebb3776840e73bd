"""What each offline method earns on the support desk, from the same log.

    python -m benchmarks.traces                        what has no row yet, then the table
    python -m benchmarks.traces --seeds 1 --arms iql
    python -m benchmarks.traces report

The bundled model first learns to do what the log did (``filtered-bc`` with a share of 1), and
serves; each arm is then one ``agentpref.update`` from there, and its candidate answers new cases
from the start. Rows are JSON, one for each seed and arm. The last line of the output is one JSON
object.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import agentpref
from agentpref.config import GateSettings, KLSettings, OfflineSettings, UpdateConfig
from agentpref.home import Home
from agentpref.learn.learner import Learner
from agentpref.models.base import load_base
from agentpref.models.continuation import sampled
from agentpref.models.tokenizer import encode_prompt
from agentpref.serve.backend import Revision
from agentpref.serve.registry import Registry
from agentpref.serve.validate import check_revision
from agentpref.types import Prompt, UpdateReport
from benchmarks._report import Target, at_least, at_most, print_report
from benchmarks.streams.rows import Row, Rows, commit, say
from benchmarks.traces import desk

MODEL, KEY = "tiny", "outcome"
CONVERSATIONS, CASES, TEMPERATURE = 600, 200, 0.7
CLONE, CLONE_EPOCHS = "clone", 6
ARMS = ("filtered-bc", "awr", "iql", "cql", "bcq", "trajectory-dpo")
# The desk's words are far from what the bundled model says, and all arms share that way.
_GATE = GateSettings(kl_budget=20.0, canary=0.0, distinct_floor=0.0, length_ratio=(0.2, 5.0))


def main() -> None:
    """Run the arms that were asked for, and show all rows."""
    options = _options()
    rows = Rows(options.rows)
    if options.what == "run":
        os.nice(10)
        warnings.simplefilter("ignore", FutureWarning)  # of peft, at every update
        for seed in range(options.seeds):
            _run(seed, options, rows)
    found = list(Rows(options.rows))
    print(table(found))
    print_report("traces", figures(found), targets(found))


def _run(seed: int, options: argparse.Namespace, rows: Rows) -> None:
    wanted = [a for a in (CLONE, *options.arms) if not any(
        row["seed"] == seed and row["arm"] == a and row["world"] == options.world for row in rows
    )]  # fmt: skip
    if not wanted:
        return
    stitched = options.world == "desk"
    with tempfile.TemporaryDirectory(prefix="traces-") as folder:
        home = Path(folder) / "home"
        logged = log(home, seed, options.conversations, stitched=stitched)
        begun = time.monotonic()
        done = learn(home, config_of("filtered-bc", seed, clone=True))
        clone = serving(home, done)
        common = {"seed": seed, "world": options.world, "commit": commit()}
        if CLONE in wanted:
            rows.append({**common, **_row(CLONE, done, clone, seed, begun), "logged": logged})
        for arm in (arm for arm in wanted if arm != CLONE):
            own = Path(folder) / arm
            shutil.copytree(home, own)
            begun = time.monotonic()
            done = learn(own, config_of(arm, seed))
            revision = None
            if done.revision is not None:
                revision = Registry(own).get(done.revision)
            rows.append({**common, **_row(arm, done, revision, seed, begun), "logged": logged})


def log(home: Path, seed: int, count: int, *, stitched: bool = True) -> float:
    """Write a log of conversations; return what they earned in the mean."""
    Home.create(home)
    earned = []
    with agentpref.Log(home) as writer:
        for number, turns in enumerate(desk.conversations(seed, count, stitched=stitched)):
            for turn in turns:
                answer = {"role": "assistant", "content": turn.answer}
                run = writer.record(turn.messages, answer, model=MODEL, thread_id=f"t{number}")
                if turn is turns[-1]:
                    writer.feedback(run, key=KEY, score=turn.reward, source="code")
            earned.append(sum(turn.reward for turn in turns))
    return statistics.fmean(earned)


def config_of(method: str, seed: int, *, clone: bool = False) -> UpdateConfig:
    """The settings of an arm: the defaults, but for what the desk pays by.

    To ``clone`` the log is to leave the bundled model behind.
    """
    settings = OfflineSettings(rewards={KEY: 1.0}, gamma=0.97)
    settings = replace(settings, share=1.0) if clone else settings
    kl = KLSettings(weight=0.0) if clone else KLSettings()
    epochs = CLONE_EPOCHS if clone else None
    return UpdateConfig(
        method=method, offline=settings, gate=_GATE, kl=kl, epochs=epochs, seed=seed
    )


def learn(home: Path, config: UpdateConfig) -> UpdateReport:
    """One update."""
    return agentpref.update(home, model=MODEL, config=config)


def serving(home: Path, done: UpdateReport) -> Revision | None:
    """The revision of an update, which serves then, whatever was proven."""
    if done.revision is None:
        return None
    registry = Registry(home)
    if done.verdict != "promoted":
        registry.promote(done.revision)
    return registry.get(done.revision)


def play(revision: Revision | None, seed: int, count: int = CASES) -> float:
    """What a revision earns on new cases from the start, all of them step by step together."""
    base = load_base(MODEL)
    files = None if revision is None else check_revision(revision)
    learner = Learner(base, files, UpdateConfig(seed=seed))
    source = random.Random(f"play {seed}")
    cases = [desk.Case(source) for _ in range(count)]
    step = 0
    while going := [case for case in cases if not case.done]:
        prompts = [encode_prompt(Prompt("", tuple(c.messages)), base.template) for c in going]
        with learner.policy("live") as model:
            answers = sampled(
                model, prompts, learner.decoding, limit=32, temperature=TEMPERATURE,
                seed=10_000 * step + seed,
            )  # fmt: skip
        for case, ids in zip(going, answers.tokens, strict=True):
            case.answer(learner.decoding.text(ids))
        step += 1
    return desk.mean_return(cases)


def _row(arm: str, done: UpdateReport, revision: Revision | None, seed: int, begun: float) -> Row:
    row = {
        "arm": arm,
        "verdict": done.verdict,
        "return": None if revision is None else round(play(revision, seed), 3),
        "expected": done.training.get("expected"),
        "value": done.training.get("value"),
        "steps": done.training.get("steps"),
        "seconds": round(time.monotonic() - begun, 1),
        "failed": done.reasons,
    }
    say(f"{arm} {seed}: {done.verdict}, earns {row['return']}, {row['seconds']} s; {done.reasons}")
    return row


def table(rows: Sequence[Row]) -> str:
    """Returns by arm, a column for each seed."""
    lines = []
    for world in sorted({row["world"] for row in rows}):
        own = [row for row in rows if row["world"] == world]
        lines.append(f"| {world} | return of each seed | verdicts |")
        lines.append("|---|---|---|")
        for arm in (CLONE, *ARMS):
            of = [row for row in own if row["arm"] == arm]
            if of:
                earned = " ".join("-" if r["return"] is None else f"{r['return']:.2f}" for r in of)
                verdicts = " ".join(r["verdict"] for r in of)
                lines.append(f"| {arm} | {earned} | {verdicts} |")
    return "\n".join(lines)


def figures(rows: Sequence[Row]) -> dict[str, float | int | str | None]:
    """The mean return of each arm in each world."""
    found: dict[str, float | int | str | None] = {"rows": len(rows)}
    for world in sorted({row["world"] for row in rows}):
        for arm in (CLONE, *ARMS):
            earned = _returns(rows, world, arm)
            if earned:
                found[f"{world} {arm}"] = round(statistics.fmean(earned), 3)
    return found


def targets(rows: Sequence[Row]) -> list[Target]:
    """What the arms must earn on the desk, in every seed."""
    found = []
    if earned := _returns(rows, "desk", "filtered-bc"):
        found.append(at_most("filtered-bc", max(earned), 0.32))
    must = {arm: _returns(rows, "desk", arm) for arm in ("iql", "cql", "bcq")}
    return found + [at_least(arm, min(earned), 0.9) for arm, earned in must.items() if earned]


def _returns(rows: Sequence[Row], world: str, arm: str) -> list[float]:
    return [r["return"] for r in rows
            if (r["world"], r["arm"]) == (world, arm) and r["return"] is not None]  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("what", nargs="?", choices=("run", "report"), default="run")
    add("--arms", type=lambda text: text.split(","), default=[*ARMS], help=", ".join(ARMS))
    add("--seeds", type=int, default=5)
    add("--world", choices=("desk", "whole"), default="desk",
        help="`whole`: all conversations begin at 0, so nothing is to be stitched")  # fmt: skip
    add("--conversations", type=int, default=CONVERSATIONS)
    add("--rows", type=Path, default=Path(__file__).parents[1] / "data" / "traces.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
