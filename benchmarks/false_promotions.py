"""How often a gain is called proven where there is none, and where there is one.

A night is a number of comparisons of one persona trait, fresh from the base model: the bundled
model is trained on them with the shipped settings, and the gate's check on new preferences decides
(without probes and guards, which could only refuse more, so that a night takes seconds). Labels are
``true``, or ``shuffled``: a fair coin each. Each night is one JSON row of ``--out``; rows that are
there are not computed again, so a run can be ended and continued, and several with other labels or
seeds (``--first``) may share a file. Run as
``python -m benchmarks.false_promotions --labels shuffled --nights 100 --out nights.jsonl``;
``--report`` sums up the rows, and ``--compare`` simulates the test beside others, without a model.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentpref.config import GateSettings, UpdateConfig
from agentpref.home import Home
from agentpref.prefer.examples import example_id_of, is_held_out
from agentpref.record.database import connect
from agentpref.record.messages import prompt_of
from agentpref.types import BASE, Completion, Example
from benchmarks._report import at_least, at_most, print_report

SIZES = (20, 50, 100, 200)
FRESH = 100
"""Further statements, which neither train nor prove, on which the true accuracy is measured."""

_PERSONA = Path(__file__).parent / "data" / "persona"
_STATEMENT = 'Is the following statement something you would say?\n"{}"'


def main() -> None:
    """Compute the nights that are missing, or sum up those that are there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--labels", choices=("shuffled", "true"), default="shuffled")
    parser.add_argument("--nights", type=int, default=100, help="of each size")
    parser.add_argument("--first", type=int, default=0, help="seed of the first night")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="comparisons a night")
    parser.add_argument("--folds", type=int, default=GateSettings().folds)
    parser.add_argument("--epochs", type=int, help="passes over the data [default: as shipped]")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no night after these")
    parser.add_argument("--out", type=Path, default=Path("false_promotions.jsonl"))
    parser.add_argument("--report", action="store_true", help="only sum up the rows of --out")
    parser.add_argument("--compare", action="store_true", help="only simulate other tests")
    options = parser.parse_args()
    if options.compare:
        compare()
        return
    if not options.report:
        run(options)
    report([json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()])


def run(options: argparse.Namespace) -> None:
    """Compute the nights that are missing, the sizes in turn."""
    kept = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
    names = ("labels", "size", "folds", "epochs", "seed")
    done = {tuple(row[name] for name in names) for row in map(json.loads, kept)}
    wanted = [
        (options.labels, size, options.folds, options.epochs, seed)
        for seed in range(options.first, options.first + options.nights)
        for size in options.sizes
    ]
    end, nights = time.monotonic() + 60 * options.minutes, Nights(options.folds, options.epochs)
    with options.out.open("a", encoding="utf-8") as rows:
        for key in (each for each in wanted if each not in done):
            if time.monotonic() > end:
                break
            labels, size, *_, seed = key
            row = dict(zip(names, key, strict=True)) | nights.night(labels, size, seed)
            print(json.dumps(row), file=rows, flush=True)


class Nights:
    """One bundled model that lives through all nights, and forgets each."""

    def __init__(self, folds: int, epochs: int | None) -> None:
        from agentpref.learn.cache import LogpCache
        from agentpref.learn.learner import Learner
        from agentpref.models.base import load_base

        self._folder = tempfile.TemporaryDirectory()
        self._connection = connect(Home.create(Path(self._folder.name) / "home"))
        base = load_base("tiny")
        gate = GateSettings(folds=folds)
        self._config = UpdateConfig(epochs=epochs, gate=gate)
        cache = LogpCache(self._connection, base.numbers, BASE)
        self._learner = Learner(base, None, self._config, caches={"base": cache, "live": cache})
        self._traits = [
            [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            for file in sorted(_PERSONA.glob("*.jsonl"))
        ]

    def night(self, labels: str, size: int, seed: int) -> dict[str, Any]:
        """Train on a night's comparisons, and say what the gate finds."""
        from agentpref.learn.data import UpdateData, UpdateRows
        from agentpref.learn.trainer import Limits
        from agentpref.prove import crossfit, evaluate
        from agentpref.prove.evidence import Evidence, Generations
        from agentpref.prove.metrics import accuracy

        started, rng = time.monotonic(), random.Random(f"{labels} {size} {seed}")
        learner, config = self._learner, replace(self._config, seed=seed)
        learner.config = config
        trait = self._traits[seed % len(self._traits)]
        drawn = rng.sample(trait, size + (FRESH if labels == "true" else 0))
        examples = [
            comparison(each["statement"], each["answer"], flip=labels == "shuffled" and coin)
            for each, coin in ((each, rng.random() < 0.5) for each in drawn)
        ]
        encoded = learner.encode(examples)
        judged, fresh = encoded[:size], encoded[size:]
        trained = [row for row in judged if not row.example.held_out]
        held_out = [row for row in judged if row.example.held_out]
        rows = UpdateRows(UpdateData(), trained, [], held_out, [])
        writes = Generations(distinct_2=1.0, mean_length=1.0)
        with learner.trial(trained) as training:
            evidence = Evidence(
                new=evaluate.score(learner, held_out).paired(matched=True),
                kl=0.0,
                live=writes,
                candidate=writes,
                comparisons=size,
            )
            true = accuracy(evaluate.score(learner, fresh).candidate) if fresh else None
            _, result = crossfit.decide(
                learner, rows, evidence, training=training, config=config, limits=Limits()
            )
        seconds = round(time.monotonic() - started, 2)
        return {"verdict": result.verdict, "accuracy": true, "seconds": seconds, **result.gain}


def comparison(statement: str, answer: str, *, flip: bool) -> Example:
    """A comparison of both answers to a statement; flipped, the other one is chosen."""
    asked = [{"role": "user", "content": _STATEMENT.format(statement)}]
    other = "No" if answer == "Yes" else "Yes"
    chosen, rejected = (other, answer) if flip else (answer, other)
    completions = tuple(
        Completion({"role": "assistant", "content": text}, label)
        for text, label in ((chosen, 1.0), (rejected, 0.0))
    )
    prompt = prompt_of(asked)
    return Example(
        example_id_of(prompt.id, completions),
        "default",
        0.0,
        prompt,
        completions,
        "comparison",
        held_out=is_held_out(asked, UpdateConfig().held_out),
    )


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line for each kind of night, and the JSON object."""
    figures: dict[str, Any] = {}
    names = ("labels", "size", "folds", "epochs")
    kinds = {tuple(row[name] for name in names): row for row in rows}
    for kind in sorted(kinds, key=str):
        some = [row for row in rows if tuple(row[name] for name in names) == kind]
        labels, size, folds, epochs = kind
        name = f"{labels} {size}, {folds} folds, {epochs or 'default'} epochs"
        figures[name] = found = {
            "nights": len(some),
            "passed": _passed(some),
            "refused": sum(row["verdict"] == "refused" for row in some) / len(some),
            "signs better": _better(some),
            "seconds": sum(row["seconds"] for row in some) / len(some),
        }
        if labels == "true":
            good = _reached(some)
            found |= {"accuracy": sum(row["accuracy"] for row in some) / len(some)}
            found |= {"reached .75": len(good), "passed of these": _passed(good)}
        print(f"{name}: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items()))
    shuffled = [row for row in rows if row["labels"] == "shuffled"]
    good = _reached([r for r in rows if r["labels"] == "true" and r["size"] == 100])
    targets = []
    if shuffled:
        targets.append(at_most("false promotions", _passed(shuffled), 0.05))
    if good:
        targets.append(at_least("gains to .75 proven by 100 comparisons", _passed(good), 0.8))
    print_report("false_promotions", figures, targets)


def _passed(rows: Sequence[dict[str, Any]]) -> float:
    return sum(1 for row in rows if row["verdict"] == "passed") / max(1, len(rows))


def _better(rows: Sequence[dict[str, Any]]) -> float:
    """The share of better ones among all signs: a half, unless labels leak to their judges."""
    better = sum(row["better"] + row["cross_fitted_better"] for row in rows)
    worse = sum(row["worse"] + row["cross_fitted_worse"] for row in rows)
    return float(better / max(1, better + worse))


def _reached(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["accuracy"] >= 0.75]


def compare(nights: int = 20_000) -> None:
    """Simulate tests at the first look: power where 80 trained prompts reach .75.

    Learning curves from n trained prompts: none, and gains that grow as √n, as n and as n².
    """
    curves: dict[str, Callable[[int], float]] = {
        "nothing to learn": lambda n: 0.5,
        "√n": lambda n: 0.5 + 0.25 * min(1.0, (n / 80) ** 0.5),
        "n": lambda n: 0.5 + 0.25 * min(1.0, n / 80),
        "n²": lambda n: 0.5 + 0.25 * min(1.0, (n / 80) ** 2),
    }
    for name, curve in curves.items():
        for size in SIZES[1:]:
            powers = _powers(size, curve, nights)
            shown = ", ".join(f"{test} {power:.3f}" for test, power in powers.items())
            print(f"{name}, {size} comparisons: {shown}")
    for rates in ((0.5, 0.5), (0.6, 0.55), (0.65, 0.6), (0.75, 0.65)):
        shown = ", ".join(
            f"night {night} promoted {promoted:.3f} refused {refused:.3f}"
            for night, promoted, refused in _in_a_row(*rates, nights)
            if night in (1, 2, 3, 5, 10, 15)
        )
        print(f"rates {rates[0]} held out and {rates[1]} on the way, by then: {shown}")


def _in_a_row(held_out: float, on_the_way: float, streams: int) -> list[tuple[int, float, float]]:
    """Nights of 100 comparisons until the first that decides: the shares of each end by then."""
    import numpy as np
    from scipy.stats import binom

    rng, better, found = np.random.default_rng(0), np.zeros(streams, int), []
    promoted, refused = np.zeros(streams, bool), np.zeros(streams, bool)
    for look in range(1, 16):
        better = better + rng.binomial(20, held_out, streams)
        of, trained, error = 20 * look, 53 * look, 0.05 / (look * (look + 1))
        small = of < GateSettings().cross_fit_below
        proven = binom.sf(better - 1, of, 0.5) <= error * (0.5 if small else 1.0)
        refuted = binom.cdf(better, of, 0.5) <= 0.05
        refuted = ~proven & (refuted | (2 * binom.cdf(better, of, 0.6) <= 0.05))
        if small:
            both = better + rng.binomial(trained, on_the_way, streams)
            late = binom.sf(both - 1, of + trained, 0.5) <= 0.5 * error
            proven |= ~refuted & late & (2 * better > of)
        open_ = ~(promoted | refused)
        promoted, refused = promoted | (open_ & proven), refused | (open_ & refuted)
        found.append((look, float(promoted.mean()), float(refused.mean())))
    return found


def _powers(size: int, curve: Callable[[int], float], nights: int) -> dict[str, float]:
    import numpy as np
    from scipy.special import betainc, betaln
    from scipy.stats import binom

    def e_value(better: Any, of: int) -> Any:
        """Mean likelihood ratio of rates uniform on (½, 1] to a coin."""
        shape = better + 1, of - better + 1
        upper = np.maximum(1 - betainc(*shape, 0.5), 1e-300)
        return np.exp((of + 1) * np.log(2) + betaln(*shape) + np.log(upper))

    rng, held_out = np.random.default_rng(0), size // 5
    trained = size - held_out
    alone = rng.binomial(held_out, curve(trained), nights)
    third = trained // 3
    folds = e_value(rng.binomial(third, curve(2 * third), (3, nights)), third).mean(axis=0)
    powers = {
        "e-value held out": np.mean(e_value(alone, held_out) >= 40),
        "sign test held out": np.mean(binom.sf(alone - 1, held_out, 0.5) <= 0.025),
        "e-value of 3 folds times held out": np.mean(folds * e_value(alone, held_out) >= 40),
    }
    for parts in (3, 4, 5):
        part, better, of = trained // parts, alone, held_out
        for number in range(1, parts):
            better, of = better + rng.binomial(part, curve(number * part), nights), of + part
        early = binom.sf(alone - 1, held_out, 0.5) <= 0.0125
        late = (binom.sf(better - 1, of, 0.5) <= 0.0125) & (alone > held_out / 2)
        powers[f"ours, {parts} parts"] = np.mean(early | late)
    return {name: float(power) for name, power in powers.items()}


if __name__ == "__main__":
    main()
