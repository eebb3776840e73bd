"""What each offline method earns in worlds whose best policy is known, from the same log.

    python -m benchmarks.traces                        what has no row yet, then the table
    python -m benchmarks.traces --seeds 1 --arms iql --worlds desk,guess
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

from scipy.stats import spearmanr

import agentpref
from agentpref.config import GateSettings, KLSettings, OfflineSettings, UpdateConfig
from agentpref.home import Home
from agentpref.learn.learner import Learner
from agentpref.models.base import load_base
from agentpref.models.continuation import sampled
from agentpref.models.tokenizer import encode_prompt
from agentpref.models.tool_calls import assistant_message
from agentpref.serve.backend import Revision
from agentpref.serve.registry import Registry
from agentpref.serve.validate import check_revision
from agentpref.types import Prompt, UpdateReport
from benchmarks._report import Target, at_least, at_most, print_report
from benchmarks.streams.rows import Row, Rows, commit, say
from benchmarks.traces.clarify import CLARIFY
from benchmarks.traces.desk import DESK, WHOLE
from benchmarks.traces.guess import GUESS
from benchmarks.traces.worlds import World, mean_return

MODEL, KEY = "tiny", "outcome"
CONVERSATIONS, CASES, TEMPERATURE = 600, 200, 0.7
CLONE = "clone"
ARMS = ("filtered-bc", "awr", "iql", "cql", "bcq", "mopo", "combo", "airl", "trajectory-dpo")
WORLDS = {"desk": DESK, "whole": WHOLE, "clarify": CLARIFY, "guess": GUESS}
LOOKING_AHEAD = ("iql", "cql", "bcq", "mopo", "combo")
# The words of these worlds are far from what the bundled model says, and all arms share that way.
_GATE = GateSettings(kl_budget=20.0, canary=0.0, distinct_floor=0.0, length_ratio=(0.2, 5.0))


def main() -> None:
    """Run the arms that were asked for, and show all rows."""
    options = _options()
    rows = Rows(options.rows)
    if options.what == "run":
        os.nice(10)
        warnings.simplefilter("ignore", FutureWarning)  # of peft, at every update
        for seed in range(options.seeds):
            for world in options.worlds:
                _run(seed, world, options, rows)
    found = list(Rows(options.rows))
    print(table(found))
    print_report("traces", figures(found), targets(found))


def _run(seed: int, name: str, options: argparse.Namespace, rows: Rows) -> None:
    size, world = options.conversations, WORLDS[name]
    common = {"seed": seed, "world": name, "conversations": size}
    done_before = {row["arm"] for row in rows if common.items() <= row.items()}
    wanted = [arm for arm in (CLONE, *options.arms) if arm not in done_before]
    if not wanted:
        return
    common |= {"commit": commit()}
    with tempfile.TemporaryDirectory(prefix="traces-") as folder:
        home = Path(folder) / "home"
        common |= {"logged": log(home, world, seed, size)}
        begun = time.monotonic()
        done = learn(home, clone_of(seed, world))
        clone = serving(home, done)
        if CLONE in wanted:
            rows.append({**common, **_row(CLONE, done, clone, world, seed, begun)})
        for arm in (arm for arm in wanted if arm != CLONE):
            own = Path(folder) / arm
            shutil.copytree(home, own)
            begun = time.monotonic()
            done = learn(own, config_of(arm, seed, world))
            revision = None
            if done.revision is not None:
                revision = Registry(own).get(done.revision)
            rows.append({**common, **_row(arm, done, revision, world, seed, begun)})


def log(home: Path, world: World, seed: int, count: int) -> float:
    """Write a log of conversations; return what they earned in the mean."""
    Home.create(home)
    earned = []
    with agentpref.Log(home) as writer:
        for number, turns in enumerate(world.log(seed, count)):
            for turn in turns:
                answer = assistant_message(turn.answer, turn=len(turn.messages))
                run = writer.record(
                    turn.messages, answer, model=MODEL, thread_id=f"t{number}", tools=world.tools
                )
                if turn is turns[-1]:
                    writer.feedback(run, key=KEY, score=turn.reward, source="code")
            earned.append(sum(turn.reward - world.cost for turn in turns))
    return statistics.fmean(earned)


def config_of(method: str, seed: int, world: World) -> UpdateConfig:
    """The settings of an arm: the defaults, but for what the world pays by."""
    settings = OfflineSettings(rewards={KEY: 1.0}, gamma=0.97, cost=world.cost)
    return UpdateConfig(method=method, offline=settings, gate=_GATE, seed=seed)


def clone_of(seed: int, world: World) -> UpdateConfig:
    """The settings that do what the log did, and leave the bundled model behind."""
    config = config_of("filtered-bc", seed, world)
    settings, kl = replace(config.offline, share=1.0), KLSettings(weight=0.0)
    return replace(config, offline=settings, kl=kl, epochs=world.epochs)


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


def play(revision: Revision | None, world: World, seed: int, count: int = CASES) -> float:
    """What a revision earns on new cases from the start, all of them step by step together."""
    base = load_base(MODEL)
    files = None if revision is None else check_revision(revision)
    learner = Learner(base, files, UpdateConfig(seed=seed))
    source = random.Random(f"play {seed}")
    cases = [world.case(source) for _ in range(count)]
    step = 0
    while going := [case for case in cases if not case.done]:
        asked = [Prompt("", tuple(case.messages), world.tools) for case in going]
        prompts = [encode_prompt(prompt, base.template) for prompt in asked]
        with learner.policy("live") as model:
            answers = sampled(
                model, prompts, learner.decoding, limit=64, temperature=TEMPERATURE,
                seed=10_000 * step + seed,
            )  # fmt: skip
        for case, ids in zip(going, answers.tokens, strict=True):
            case.answer(learner.decoding.text(ids))
        step += 1
    return mean_return(cases)


def _row(
    arm: str,
    done: UpdateReport,
    revision: Revision | None,
    world: World,
    seed: int,
    begun: float,
) -> Row:
    row = {
        "arm": arm,
        "verdict": done.verdict,
        "return": None if revision is None else round(play(revision, world, seed), 3),
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
        lines.append(
            f"| {world} (best: {WORLDS[world].optimum:g}) | return of each seed | verdicts |"
        )
        lines.append("|---|---|---|")
        logged = sorted({(row["seed"], row["logged"]) for row in own})
        lines.append(f"| the log | {' '.join(f'{earned:.2f}' for _, earned in logged)} | |")
        for arm in (CLONE, *ARMS):
            of = sorted((row for row in own if row["arm"] == arm), key=lambda row: row["seed"])
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
    """What arms must earn on the desk, in every seed, and how values rank them elsewhere."""
    rows, found = [row for row in rows if row.get("conversations") == CONVERSATIONS], list[Target]()
    if earned := _returns(rows, "desk", "filtered-bc"):
        found.append(at_most("filtered-bc", max(earned), 0.32))
    must = {arm: _returns(rows, "desk", arm) for arm in LOOKING_AHEAD}
    found += [at_least(arm, min(earned), 0.9) for arm, earned in must.items() if earned]
    for world in ("clarify", "guess"):
        pairs = [
            (row["value"]["candidate"], row["return"])
            for row in rows
            if row["world"] == world and row["value"] and row["return"] is not None
        ]
        if len(pairs) > 2:
            rank = spearmanr(*zip(*pairs, strict=True)).statistic
            found.append(at_least(f"{world}: values rank policies", float(rank), 0.8))
    return found


def _returns(rows: Sequence[Row], world: str, arm: str) -> list[float]:
    return [r["return"] for r in rows
            if (r["world"], r["arm"]) == (world, arm) and r["return"] is not None]  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("what", nargs="?", choices=("run", "report"), default="run")
    add("--arms", type=lambda text: text.split(","), default=[*ARMS], help=", ".join(ARMS))
    add("--seeds", type=int, default=5)
    add("--worlds", type=lambda text: text.split(","), default=[*WORLDS], help=", ".join(WORLDS))
    add("--conversations", type=int, default=CONVERSATIONS)
    add("--rows", type=Path, default=Path(__file__).parents[1] / "data" / "traces.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
