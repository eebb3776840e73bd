"""A week of nightly updates, +200 pairs each: a real home beside two scripts around DPOTrainer.

*Ours* is ``agentpref.update`` on a home: it loads the live revision, trains on the night's pairs
and as many replayed ones, with its KL penalty and anchor, examines the candidate on every held-out
pair of the week and by what it writes, and publishes it. *Replay* is what an expert would write
around TRL: the bundled model with last night's adapter, trained on the night's pairs and as many
old ones, the reference computed beforehand for all of them (TRL keeps none from night to night),
then one evaluation on every held-out pair of the week, and the adapter saved. *All* is the same on
all pairs of the week so far. Both are given token ids, tuned dtype and micro-batch; epochs, batch,
learning rate, β and LoRA are equal. Pairs are logged, and the scripts' rows written, before the
clock starts.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentpref.config import UpdateConfig
from agentpref.home import Home
from agentpref.prefer.examples import is_held_out
from agentpref.record.log import Log
from benchmarks import persona
from benchmarks._report import Target, at_least, at_most
from benchmarks.train import runs, speed
from benchmarks.train.runs import Run, say

if TYPE_CHECKING:
    from benchmarks.train.speed import Bench

NEW, PROVING = 200, 50
_NOMINAL_S = 60  # a night of all arms, roughly
SCRIPTS = ("replay", "all")
TRAITS = (
    "conscientiousness",
    "interest-in-music",
    "openness",
    "agreeableness",
    "risk-averse",
    "interest-in-science",
    "subscribes-to-deontology",
)

Week = list[list[dict[str, Any]]]
"""Questions of each night: ``text``, ``liked``, ``disliked``, ``proves``."""


def week(nights: int, new: int = NEW, proving: int = PROVING) -> Week:
    """One trait a night: ``new`` questions that train, ``proving`` that prove, in mixed order."""
    return [_night(trait, new, proving) for trait in TRAITS[:nights]]


def _night(trait: str, new: int, proving: int) -> list[dict[str, Any]]:
    questions = [*map(_question, persona.questions(trait))]
    rng = random.Random(trait)
    rng.shuffle(questions)
    chosen = [q for q in questions if not q["proves"]][:new]
    chosen += [q for q in questions if q["proves"]][:proving]
    return rng.sample(chosen, len(chosen))


def _question(question: persona.Question) -> dict[str, Any]:
    asked = [{"role": "user", "content": question.text}]
    return {**question._asdict(), "proves": is_held_out(asked, UpdateConfig().held_out)}


def measure(bench: Bench, nights: int, new: int = NEW, proving: int = PROVING) -> dict[str, Any]:
    """Wall time of every night by arm: medians over rounds, and what they come to."""
    setting = speed.best_setting(bench, "tiny", "48:2", UpdateConfig().batch_size)
    questions = week(nights, new, proving)
    rows = bench.work / "nights" / "questions.json"
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text(json.dumps(questions), encoding="utf-8")
    runs.run("benchmarks.train.nights_trl", ["prepare", rows], rows.parent, bench.machine)
    say(f"about {bench.rounds * nights * _NOMINAL_S / 60:.0f} minutes on an idle machine")
    rounds = []
    for number in range(bench.rounds):
        say(f"week {number + 1} of {bench.rounds}")
        stem = f"nights/{nights}x{new}/{number}"
        rounds.append(_week_once(bench, stem, questions, rows, setting))
    return {"nights": summary(rounds)}


def _week_once(
    bench: Bench, stem: str, questions: Week, rows: Path, setting: tuple[str, int]
) -> dict[str, list[Run]]:
    """A week from the ledger, or lived through now; its nights hang together: one entry."""

    def live() -> Run:
        week = _week(bench, stem, questions, rows, setting)
        return Run(0.0, 0.0, 0.0, {arm: [asdict(run) for run in week[arm]] for arm in week})

    kept = bench.ledger.once(stem, live).result
    return {arm: [Run(**run) for run in kept[arm]] for arm in kept}


def _week(
    bench: Bench, stem: str, questions: Week, rows: Path, setting: tuple[str, int]
) -> dict[str, list[Run]]:
    """One week of all arms, night by night."""
    folder = bench.out(stem)
    home = folder / "home"
    took: dict[str, list[Run]] = {"ours": [], **{script: [] for script in SCRIPTS}}
    for night, asked in enumerate(questions):
        _open_home(home, fresh=night == 0)
        log_night(home, asked)
        took["ours"].append(
            _run(bench, f"{stem}/{night}/ours", "benchmarks.train.nights_ours", [home])
        )
        for script in SCRIPTS:
            arguments = ["night", rows, "--script", script, "--night", night]
            arguments += ["--adapters", folder / script, "--dtype", setting[0]]
            arguments += ["--micro", setting[1]]
            took[script].append(
                _run(bench, f"{stem}/{night}/{script}", "benchmarks.train.nights_trl", arguments)
            )
        times = ", ".join(f"{arm} {took[arm][-1].wall_s:.1f} s" for arm in took)
        say(f"  night {night + 1}: {times}; {took['ours'][-1].result['verdict']}")
    return took


def _run(bench: Bench, name: str, module: str, arguments: Sequence[object]) -> Run:
    """One night of one arm."""
    out = bench.out(name)
    return runs.run(module, [*arguments, "--out", out], out, bench.machine)


def _open_home(home: Path, *, fresh: bool) -> None:
    if fresh:
        shutil.rmtree(home, ignore_errors=True)
        Home.create(home)


def log_night(home: Path, asked: Sequence[Mapping[str, Any]]) -> None:
    """Write a night's questions, with both answers and which one was liked, into the home."""
    with Log(home) as log:
        for question in asked:
            messages = [{"role": "user", "content": question["text"]}]
            liked, disliked = (
                log.record(messages, question[side], model="tiny") for side in ("liked", "disliked")
            )
            log.compare(liked, disliked, winner="a", user_id="bench")


def summary(rounds: Sequence[Mapping[str, Sequence[Run]]]) -> dict[str, Any]:
    """Medians over the rounds; ratios are taken within a round."""
    figures: dict[str, Any] = {}
    for arm in rounds[0]:
        nights = zip(*(week[arm] for week in rounds), strict=True)
        figures[f"{arm}_s"] = [round(statistics.median(r.wall_s for r in n), 2) for n in nights]
        figures[f"{arm}_growth"] = _median([_growth(week[arm]) for week in rounds])
    for script in SCRIPTS:
        figures[f"faster_than_{script}"] = _median(
            [_total(week[script]) / _total(week["ours"]) for week in rounds]
        )
    figures["verdicts"] = [run.result["verdict"] for run in rounds[0]["ours"]]
    figures["accuracy"] = {arm: rounds[0][arm][-1].result["accuracy"] for arm in rounds[0]}
    return figures


def _growth(nights: Sequence[Run]) -> float:
    """The last night by the second, the first with something to replay."""
    return nights[-1].wall_s / nights[1].wall_s


def _total(nights: Sequence[Run]) -> float:
    return sum(night.wall_s for night in nights)


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """Nights that do not grow, and a total that beats the faster of the two scripts."""
    found = figures["nights"]
    faster = min(found[f"faster_than_{script}"] for script in SCRIPTS)
    return [
        at_most("last_night_by_second", found["ours_growth"], 1.15),
        at_least("week_faster_than_trl", faster, 8),
    ]
