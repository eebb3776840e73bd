"""What learning rate, β, precision, epochs and loss do to streams of updates of the bundled model.

Run as ``python -m benchmarks.sweep``. Every point of a grid learns every stream with every seed:
update after update, with replay and KL penalty at their defaults, and is evaluated on the held-out
pairs of all updates after each. It can be run in pieces, and resumes where it was stopped:

    python -m benchmarks.sweep --rates 2e-3 --betas 0.1,1 --seeds 0
    python -m benchmarks.sweep --resume
    python -m benchmarks.sweep --resume --rates 2e-3 --betas 0.3 --precisions float32,bfloat16
    python -m benchmarks.sweep --resume --rates 2e-3 --betas 0.1,1 --kinds hinge,ipo_sum

Reported of each point are ACC, BWT and forgetting (1706.08840, 1801.10112), KL(π_0 ‖ π_θ) in nats
per completion token after the last update, and the processor seconds that training took (of all
threads, so other work on the machine hardly shows), as means over streams and seeds; ``spread`` is
the distance between the best and the worst seed's ACC. The hash of a statement decides its side;
the seed chooses among those that train, their order and the adapter's first weights. There is no
gate: no update is ever refused. The last line is one JSON object; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

from agentpref.config import LossSettings, Precision, UpdateConfig, loss_kinds
from agentpref.errors import TrainingDiverged
from agentpref.home import Home
from agentpref.learn.cache import LogpCache
from agentpref.learn.data import Available, prepare
from agentpref.learn.learner import Learner
from agentpref.models.adapter_files import read_adapter
from agentpref.models.base import BUNDLED, load_base
from agentpref.prefer.examples import is_held_out
from agentpref.prove.evaluate import KL_ROWS, kl_from_base, policy_scores
from agentpref.prove.metrics import RMatrix, accuracy
from agentpref.record.database import connect
from agentpref.types import BASE, Completion, Example, Prompt
from benchmarks._report import print_report
from benchmarks.train.runs import Ledger, Run, say

T = TypeVar("T")

NEW, PROVING = 200, 150
RATES, BETAS, SEEDS = (5e-4, 1e-3, 2e-3, 4e-3), (0.03, 0.1, 0.3, 1.0), (0, 1)
METRICS = ("acc", "bwt", "forgetting", "kl", "seconds")
_PERSONA = Path(__file__).parent / "data" / "persona"
_QUESTION = 'Is the following statement something you would say?\n"{}"'


class Stage(NamedTuple):
    """What the users of one update have in common: a trait, and a system message."""

    trait: str
    system: str = ""


STREAMS: dict[str, tuple[Stage, ...]] = {
    "traits": (Stage("conscientiousness"), Stage("risk-seeking"), Stage("agreeableness")),
    "systems": (
        Stage("risk-averse", "You advise careful savers."),
        Stage("risk-seeking", "You advise bold founders."),
    ),
    "unseen": (
        Stage("interest-in-science"),
        Stage("subscribes-to-utilitarianism"),
        Stage("interest-in-art"),
    ),
}
"""``unseen`` is for proving what was chosen on the other two."""


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of the grid; without ``epochs`` their number follows from an update's size."""

    learning_rate: float
    beta: float
    kind: str = "sigmoid"
    precision: Precision = "float32"
    epochs: int | None = None

    def config(self, seed: int) -> UpdateConfig:
        """The settings of an update; all others stay at their defaults."""
        return UpdateConfig(
            seed=seed,
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            precision=self.precision,
            loss=LossSettings(kind=self.kind, beta=self.beta),
        )

    def __str__(self) -> str:
        """The name in the ledger and in the table."""
        epochs = "" if self.epochs is None else f"/{self.epochs} epochs"
        return f"{self.learning_rate:g}/β {self.beta:g}/{self.kind}/{self.precision}{epochs}"


class Sizes(NamedTuple):
    """How many pairs of an update are trained, and how many held out."""

    new: int = NEW
    proving: int = PROVING


def main() -> None:
    """Measure the grid that was asked for, and end with the JSON object."""
    options = _options()
    sizes = Sizes(options.new, options.proving)
    ledger = Ledger(options.work / "runs.jsonl", resume=options.resume)
    points = list(grid(options))
    say(f"{len(points)} points, streams {options.streams}, seeds {options.seeds}")
    found = sweep(points, options.streams, options.seeds, sizes, ledger, options.model)
    print_table(found)
    figures = {
        "updates_of": sizes._asdict(),
        "streams": options.streams,
        "seeds": options.seeds,
        "points": [{**asdict(point), **summary} for point, summary in found.items()],
    }
    print_report("sweep", figures, [])


def grid(options: argparse.Namespace) -> Iterator[Point]:
    """Every combination of what was asked for."""
    lists = (options.rates, options.betas, options.kinds, options.precisions, options.epochs)
    return itertools.starmap(Point, itertools.product(*lists))


def sweep(
    points: Sequence[Point],
    streams: Sequence[str],
    seeds: Sequence[int],
    sizes: Sizes,
    ledger: Ledger,
    model: str = BUNDLED,
) -> dict[Point, dict[str, Any]]:
    """Run what the ledger does not know yet, seed after seed, and summarise each point."""
    found: dict[Point, dict[tuple[str, int], dict[str, Any]]] = {point: {} for point in points}
    with scores_of_the_base() as connection:
        for seed, point, stream in itertools.product(seeds, points, streams):
            name = f"{model}/{stream}/{seed}/{sizes.new}+{sizes.proving}/{point}"
            life = Stream(model, STREAMS[stream], sizes, point.config(seed), connection)
            run = ledger.once(name, life.run)
            say(f"{name}: {_words(run.result)} ({run.wall_s:.0f} s in all)")
            found[point][stream, seed] = run.result
    return {point: summary(results) for point, results in found.items()}


class Stream:
    """One run: updates in order, each starting from the adapter of the one before."""

    def __init__(
        self,
        model: str,
        stages: Sequence[Stage],
        sizes: Sizes,
        config: UpdateConfig,
        connection: sqlite3.Connection,
    ) -> None:
        self._model, self._stages, self._config = model, stages, config
        self._connection = connection
        sides = [pairs_of(stage, sizes, config) for stage in stages]
        self._training = [[pair for pair in side if not pair.held_out] for side in sides]
        self._held_out = [[pair for pair in side if pair.held_out] for side in sides]

    def run(self) -> Run:
        """Do all updates; ``diverged`` says why where one ended in numbers not finite."""
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = self._run_updates(Path(folder))
            except TrainingDiverged as error:
                result = {"diverged": str(error)}
        return Run(time.perf_counter() - started, 0.0, peak_mb=0.0, result=result)

    def _run_updates(self, folder: Path) -> dict[str, Any]:
        rows = [tuple(0.5 for _ in self._stages)]  # the base is its own reference: a coin
        live: Path | None = None
        seconds = 0.0
        for number, pairs in enumerate(self._training):
            learner = self._learner(live)
            started = time.process_time()
            self._train(learner, pairs, [p for n in self._training[:number] for p in n])
            seconds += time.process_time() - started
            rows.append(tuple(_accuracy(learner, pairs) for pairs in self._held_out))
            live = folder / str(number)
            learner.save(live)
        names = tuple(f"{number} {stage.trait}" for number, stage in enumerate(self._stages, 1))
        kl = kl_from_base(learner, learner.encode(self._probes()), seed=0)
        matrix = RMatrix(names, tuple(rows)).to_mapping()
        return {**matrix, "kl": kl, "seconds": seconds}

    def _train(self, learner: Learner, new: Sequence[Example], old: Sequence[Example]) -> None:
        """Train as an update does: on new pairs, and on old ones drawn beside them."""
        rows = prepare(learner, Available(tuple(new), tuple(old)), None, self._config)
        learner.fit(rows.trained, new=len(rows.new))

    def _learner(self, live: Path | None) -> Learner:
        base = load_base(self._model, precision=self._config.precision)
        known = LogpCache(self._connection, base.numbers, BASE)
        files = None if live is None else read_adapter(live)
        return Learner(base, files, self._config, caches={"base": known}, progress=_silent)

    def _probes(self) -> list[Example]:
        """Held-out pairs of all updates, as many as an evaluation uses for KL."""
        pairs = [pair for pairs in self._held_out for pair in pairs]
        return random.Random(0).sample(pairs, min(KL_ROWS, len(pairs)))


def pairs_of(stage: Stage, sizes: Sizes, config: UpdateConfig) -> list[Example]:
    """The pairs of an update; those held out are the same for every seed.

    Raises:
        ValueError: the trait has fewer statements than are asked for.
    """
    lines = (_PERSONA / f"{stage.trait}.jsonl").read_text(encoding="utf-8").splitlines()
    rows: dict[str, dict[str, str]] = {row["statement"]: row for row in map(json.loads, lines)}
    pairs = [_pair(stage, number, row, config) for number, row in enumerate(rows.values())]
    proving = [pair for pair in pairs if pair.held_out]
    training = [pair for pair in pairs if not pair.held_out]
    if len(proving) < sizes.proving or len(training) < sizes.new:
        raise ValueError(
            f"{stage.trait} has {len(training)} statements that train and {len(proving)} that "
            f"prove, but {sizes.new} and {sizes.proving} are asked for: ask for fewer"
        )
    proving = random.Random(0).sample(proving, sizes.proving)
    return random.Random(config.seed).sample(training, sizes.new) + proving


def _pair(stage: Stage, number: int, row: Mapping[str, str], config: UpdateConfig) -> Example:
    """A statement that users answer one way, as a comparison of Yes with No."""
    asked = [{"role": "user", "content": _QUESTION.format(row["statement"])}]
    system = [{"role": "system", "content": stage.system}] if stage.system else []
    other = {"Yes": "No", "No": "Yes"}[row["answer"]]
    name = f"{stage.trait}/{number}"
    return Example(
        example_id=name,
        namespace="sweep",
        created_at=0.0,  # strata of one age: replay draws from all updates in equal shares
        prompt=Prompt(name, (*system, *asked)),
        completions=(
            Completion({"role": "assistant", "content": row["answer"]}, 1.0),
            Completion({"role": "assistant", "content": other}, 0.0),
        ),
        origin="comparison",
        tag=stage.trait,
        held_out=is_held_out(asked, config.held_out),
    )


@contextmanager
def scores_of_the_base() -> Iterator[sqlite3.Connection]:
    """A database for the base's scores, which are the same at every point of the grid."""
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(connect(Home.create(folder))) as connection,
    ):
        yield connection


def _accuracy(learner: Learner, pairs: Sequence[Example]) -> float:
    return accuracy(policy_scores(learner, "candidate", learner.encode(pairs)))


def _silent(stage: str, done: int, total: int) -> None:
    """Nobody is told of the steps of a run."""


def summary(results: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    """Means of a point's results by (stream, seed), of all and by stream, and the seeds' spread.

    Where any run diverged there are no means: the point is not to be used.
    """
    diverged = [f"{stream}/{seed}" for (stream, seed), r in results.items() if "diverged" in r]
    if diverged:
        return {"diverged": diverged}
    streams, seeds = ({key[side] for key in results} for side in (0, 1))
    by_seed = [
        _means([r for key, r in results.items() if key[1] == seed])["acc"] for seed in sorted(seeds)
    ]
    by_stream = {
        stream: _means([r for key, r in results.items() if key[0] == stream])
        for stream in sorted(streams)
    }
    overall = _means(list(results.values()))
    return {**overall, "spread": max(by_seed) - min(by_seed), "by_stream": by_stream}


def _means(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: statistics.fmean(r[name] for r in results) for name in METRICS}


def print_table(found: Mapping[Point, Mapping[str, Any]]) -> None:
    """The grid, for people, in its order."""
    print(f"{'rate/β/loss/precision':44} {'ACC':>5} {'seeds':>5} {'BWT':>6} {'F':>6} ", end="")
    print(f"{'KL':>5} {'s':>6}")
    for point, figures in found.items():
        if "diverged" in figures:
            print(f"{point!s:44} diverged: {', '.join(figures['diverged'])}")
            continue
        f = figures
        print(
            f"{point!s:44} {f['acc']:5.3f} {f['spread']:5.3f} {f['bwt']:+6.3f} "
            f"{f['forgetting']:+6.3f} {f['kl']:5.3f} {f['seconds']:6.1f}"
        )


def _words(result: Mapping[str, Any]) -> str:
    if "diverged" in result:
        return "diverged"
    return ", ".join(f"{name} {result[name]:.3f}" for name in METRICS)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rates", type=_several(float), default=RATES, help="default: 5e-4,1e-3,2e-3,4e-3")
    add("--betas", type=_several(float), default=BETAS, help="default: .03,.1,.3,1")
    add("--kinds", type=_several(str, loss_kinds()), default=["sigmoid"], help="losses")
    add("--precisions", type=_several(str, get_args(Precision)), default=["float32"])
    add("--epochs", type=_several(int), default=[None], help="default: by the size of the update")
    add("--streams", type=_several(str, STREAMS), default=["traits", "systems"])
    add("--seeds", type=_several(int), default=SEEDS, help="default: 0,1")
    add("--new", type=int, default=NEW, help="pairs of an update that are trained (default: 200)")
    add("--proving", type=int, default=PROVING, help="those that prove (default: 150)")
    add("--model", default=BUNDLED, help="any that an update takes (default: tiny)")
    add("--work", type=Path, default=Path(".bench-sweep"), help="folder of the ledger")
    add("--resume", action="store_true", help="keep the finished runs of the same code in --work")
    return parser.parse_args()


def _several(kind: Callable[[str], T], known: Iterable[T] = ()) -> Callable[[str], list[T]]:
    """An argument type: values with commas between them, out of ``known`` if that is given."""

    def parse(text: str) -> list[T]:
        values = [kind(part) for part in text.split(",")]
        for value in values:
            if known and value not in known:
                raise argparse.ArgumentTypeError(
                    f"{value!r} is none of {', '.join(map(str, known))}"
                )
        return values

    return parse


if __name__ == "__main__":
    main()
