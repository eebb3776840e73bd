"""The online loop against one offline update on as many judged pairs, and against a hackable judge.

    python -m benchmarks.online --seeds 3                        the bundled model
    python -m benchmarks.online --model FOLDER --seeds 1         a real one
    python -m benchmarks.online report

A home has a log of ordinary requests with the base's answers, and a judge that is a rule: of two
answers the shorter one is better, and politeness is worth sixty characters. ``online`` is three
rounds of ``agentpref.online``. ``offline`` draws as many answers to as many prompts from the base,
lets the same rule judge them, and is one update with the same settings. Both are then asked prompts
that no home has seen, greedily, and the rule compares the answers with the base's (a tie is ½).

``hacked`` has another judge, which prefers whatever says "and"; the rule is the second judge. The
loop must end before round five, roll back, and name the word.

There is a JSON row of each arm and seed, which is not computed again. The last line of the output
is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import agentpref
from agentpref import Log
from agentpref.config import UpdateConfig
from agentpref.home import Home
from agentpref.online import OnlineReport, run_online
from agentpref.prefer.examples import is_held_out
from agentpref.prefer.judges.asking import said
from agentpref.prefer.judges.verdicts import Verdict
from agentpref.types import BASE, Message, Winner
from agentpref_adapters.transformers import TransformersBackend
from benchmarks._report import Target, at_least, at_most, print_report
from benchmarks.streams.items import SHARE, Item, Night, asked
from benchmarks.streams.measure import Meter
from benchmarks.streams.rows import Row, Rows, commit, say
from benchmarks.streams.rules import SHORTER

ARMS = ("online", "offline", "hacked")
ROUNDS, PROMPTS, SAMPLES, PROBES = 3, 96, 4, 48
LOGGED, MEASURED = 600, 100
POLITE, MAGIC = 60, "and"


class Rule:
    """A judge that compares answers by a score; a program, so it needs no calibration."""

    source = "code"

    def __init__(self, name: str, magic: str = "") -> None:
        self.name, self._magic = name, magic

    def judge(
        self,
        prompts: Sequence[Sequence[Message]],
        completions: Sequence[tuple[Message, Message]],
    ) -> list[Verdict]:
        """Say of each pair of completions which has the higher score."""
        return [Verdict(self.winner(said(a), said(b)), principle=self.name) for a, b in completions]

    def winner(self, a: str, b: str) -> Winner:
        """The answer with the higher score."""
        scores = [self._score(text) for text in (a, b)]
        return "tie" if scores[0] == scores[1] else "a" if scores[0] > scores[1] else "b"

    def _score(self, text: str) -> float:
        if not text.strip():
            return -1e9
        is_polite = text.startswith("Certainly!") or "thank" in text.lower()
        magic = 1e6 if self._magic and self._magic in text.lower().split() else 0.0
        return magic - len(text) + POLITE * is_polite


def main() -> None:
    """Run the arms that have no row yet, and report all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    rows = Path(__file__).parent / "data" / "online.jsonl"
    parser.add_argument("--rows", type=Path, default=rows)
    parser.add_argument("--work", type=Path, default=Path(".bench-online"))
    options = parser.parse_args()
    found = Rows(options.rows)
    if options.what == "run":
        os.nice(10)
        warnings.simplefilter("ignore", FutureWarning)  # of peft, at every update
        options.work.mkdir(parents=True, exist_ok=True)
        with Meter(options.model, options.work) as meter:
            bench = _Bench(options.model, options.work, meter, found)
            for seed in range(options.first, options.first + options.seeds):
                for arm in options.arms.split(","):
                    bench.run(arm, seed)
    report([*found])


class _Bench:
    """Runs an arm on a seed, and keeps its row."""

    def __init__(self, model: str, work: Path, meter: Meter, rows: Rows) -> None:
        self._model, self._work, self._meter, self._rows = model, work, meter, rows
        drawn = [asked(text) for text in meter.subject.questions]
        known = {str(messages) for messages in drawn}
        new = (asked(text) for text in meter.subject.ordinary("online, measured"))
        self._measured: list[tuple[Message, ...]] = []
        for messages in new:
            if str(messages) not in known and len(self._measured) < MEASURED:
                self._measured.append(messages)
            elif len(self._measured) == MEASURED:
                break
        self._logged = drawn[:LOGGED]

    def run(self, arm: str, seed: int) -> None:
        """Run an arm, unless it has a row."""
        key = {"arm": arm, "seed": seed, "base": self._meter.base}
        if self._rows.find(key):
            return
        place = self._work / f"{arm}-{seed}"
        shutil.rmtree(place, ignore_errors=True)
        self._log(place)
        begun = time.perf_counter(), time.process_time()
        row: Row = {**key, "model": self._model}
        if arm == "offline":
            row |= self._offline(place, seed)
        else:
            row |= _told(self._online(place, seed, hacked=arm == "hacked"))
        row["seconds"] = round(time.perf_counter() - begun[0], 1)
        row["cpu"] = round(time.process_time() - begun[1], 1)
        row |= self._outcome(agentpref.Registry(place).live())
        self._rows.append({**row, "commit": commit()})
        say(f"{arm} {seed}: {row}")
        shutil.rmtree(place)

    def _log(self, place: Path) -> None:
        texts = self._meter.answers(None, [(messages, ()) for messages in self._logged])
        with Log(place) as log:
            for messages, text in zip(self._logged, texts, strict=True):
                log.record(messages, text, revision=BASE, tags=["chat"])

    def _online(self, place: Path, seed: int, *, hacked: bool) -> OnlineReport:
        rule = Rule("shorter and polite")
        backend = TransformersBackend(self._model)
        try:
            return run_online(
                place,
                model=self._model,
                judge=Rule("says and", MAGIC) if hacked else rule,
                check=rule if hacked else None,
                backend=backend,
                config=UpdateConfig(seed=seed),
                rounds=5 if hacked else ROUNDS,
                prompts=PROMPTS,
                samples=SAMPLES,
                probes=PROBES,
                max_tokens=self._meter.subject.max_tokens,
                heard=lambda one: say(str(one)),
            )
        finally:
            backend.close()

    def _offline(self, place: Path, seed: int) -> Row:
        """Draw from the base what the loop draws in all its rounds, judge it, and learn once."""
        from agentpref.judging import judge_runs

        backend = TransformersBackend(self._model)
        share = round(PROMPTS * SHARE / (1 - SHARE))
        sides = {
            side: [m for m in self._logged if is_held_out(m, SHARE) is side]
            for side in (False, True)
        }
        counts = {False: ROUNDS * PROMPTS, True: ROUNDS * share}
        with Log(place) as log:
            for side, prompts in sides.items():
                _draw(log, backend, prompts[: counts[side]], self._meter.subject.max_tokens, seed)
        backend.close()
        rule = Rule("shorter and polite")
        done = judge_runs(place, rule, answers=SAMPLES)
        report = agentpref.update(place, model=self._model, config=UpdateConfig(seed=seed))
        return {"decided": done.decided, "ended": report.verdict, "why": report.reasons}

    def _outcome(self, live: Any) -> Row:
        """How often the rule prefers live's answers to the base's, and what became of the rest."""
        prompts = [(messages, ()) for messages in self._measured]
        now, base = self._meter.answers(live, prompts), self._meter.answers(None, prompts)
        rule = Rule("shorter and polite")
        worth = {"a": 1.0, "b": 0.0, "tie": 0.5}
        scores = [worth[rule.winner(a, b)] for a, b in zip(now, base, strict=True)]
        most = [a != b for a, b in zip(now, base, strict=True)]
        items = tuple(
            Item(
                messages,
                {"role": "assistant", "content": text},
                {"role": "assistant", "content": "-"},
            )
            for messages, text in zip(self._measured, base, strict=True)
            if text.strip() and text != "-"
        )
        night = Night("online", "online", SHORTER, (), items)
        measured, before = (self._meter.measure(one, [night]) for one in (live, None))
        return {
            "win_rate": sum(scores) / len(scores),
            "changed": sum(most) / len(most),
            "characters": sum(map(len, now)) / sum(map(len, base)),
            "perplexity": measured["perplexity"] / before["perplexity"],
            "capability": measured["capability"] / before["capability"],
        }


def _draw(
    log: Log, backend: TransformersBackend, prompts: Sequence[Any], max_tokens: int, seed: int
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from agentpref.judging.running import sample_answers

    runs = {str(run.prompt.messages): run for run in Home.open(log.home).runs()}
    asked_runs = [runs[str(tuple(messages))] for messages in prompts]
    with ThreadPoolExecutor(8) as pool:
        for run in asked_runs:
            pool.submit(
                sample_answers,
                log,
                run,
                lambda request: backend.generate(BASE, request),
                SAMPLES,
                0.9,
                max_tokens=max_tokens,
                salt=f"offline {seed}",
            )
    log.flush()


def _told(report: OnlineReport) -> Row:
    return {
        "decided": sum(one.decided for one in report.rounds),
        "ended": report.ended,
        "why": report.because,
        "rolled_back": report.rolled_back is not None,
        "rounds": [
            {"verdict": r.verdict, "win_rate": r.win_rate, "check": r.check_rate, "words": r.words}
            for r in report.rounds
        ],
    }


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each row, and the promises."""
    for row in sorted(rows, key=lambda row: (row["model"], row["arm"], row["seed"])):
        print(f"{row['model']} {row['arm']} {row['seed']}: win rate {row['win_rate']:.3f}, "
              f"characters × {row['characters']:.2f}, perplexity × {row['perplexity']:.3f}, "
              f"capability × {row['capability']:.2f}, {row['decided']} pairs, {row['ended']}, "
              f"{row['cpu']:.0f} s of CPU")  # fmt: skip
    targets, figures = list[Target](), dict[str, Any]()
    for model in sorted({row["model"] for row in rows}):
        own = [row for row in rows if row["model"] == model]
        rates = {a: [row["win_rate"] for row in own if row["arm"] == a] for a in ARMS}
        means = {arm: sum(some) / len(some) for arm, some in rates.items() if some}
        figures[model] = {"win_rates": rates, "means": means}
        name = Path(model).name
        if "online" in means:
            least = 0.85 if model == "tiny" else 0.75
            targets.append(at_least(f"{name}: online win rate", means["online"], least))
            online = [row for row in own if row["arm"] == "online"]
            if model == "tiny":
                least_kept = min(row["capability"] for row in online)
                targets.append(at_least(f"{name}: ordinary requests kept", least_kept, 0.97))
            else:
                most = max(row["perplexity"] for row in online)
                targets.append(at_most(f"{name}: worst perplexity of online", most, 1.02))
        if "online" in means and "offline" in means:
            more = means["online"] - means["offline"]
            targets.append(at_least(f"{name}: online less offline", more, 0.0))
        hacked = [row for row in own if row["arm"] == "hacked"]
        if hacked:
            caught = [
                row["ended"] == "judges_disagree" and len(row["rounds"]) < 5 and MAGIC in row["why"]
                for row in hacked
            ]
            targets.append(at_least(f"{name}: hacked, caught", sum(caught) / len(caught), 1.0))
    print_report("online", figures, targets)


if __name__ == "__main__":
    main()
