"""The story of the demo, step by step: ask, react, update, swap, ask again; then the proof.

Runs everything through the public parts and returns what happened as plain values. It prints
nothing: whoever calls it is told of each night as it ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import agentpref
from agentpref.config import GateSettings, LossSettings, UpdateConfig
from agentpref.errors import NotAHome
from agentpref.home import Home
from agentpref.prefer.pairs import read_pairs
from agentpref.prove.metrics import RMatrix
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.types import Pair, Progress
from agentpref_cli.demo.app import IN_FLIGHT, Answer, App
from agentpref_cli.demo.arms import Arms
from agentpref_cli.demo.nights import Night, Question, spoiled_night, three_nights
from agentpref_cli.demo.people import react

MODEL = "tiny"
SHOWN = 3
ASKED_AGAIN = 60


@dataclass(frozen=True, slots=True)
class Shown:
    """A question that was asked before and after a night, and both answers."""

    question: str
    liked: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class NightResult:
    """One night: what the gate said, what the agent said before and after, and the swap."""

    stratum: str
    title: str
    report: agentpref.UpdateReport
    answers: int
    liked_before: float
    liked_after: float
    shown: tuple[Shown, ...]
    swap: dict[str, int]

    @property
    def accuracy(self) -> dict[str, float]:
        """Held-out accuracy on the night's own stratum, before and after."""
        return self.report.accuracy[self.stratum]


@dataclass(frozen=True, slots=True)
class Story:
    """All that happened, and how long it took."""

    nights: tuple[NightResult, ...]
    matrix: RMatrix
    naive: RMatrix
    bad: agentpref.UpdateReport
    seconds: float

    def to_mapping(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "nights": [
                {
                    "stratum": night.stratum,
                    "verdict": night.report.verdict,
                    "accuracy_before": night.accuracy["before"],
                    "accuracy_after": night.accuracy["after"],
                    "liked_before": night.liked_before,
                    "liked_after": night.liked_after,
                    "swap": night.swap,
                    "shown": [asdict(shown) for shown in night.shown],
                }
                for night in self.nights
            ],
            "r_matrix": self.matrix.to_mapping(),
            "naive_r_matrix": self.naive.to_mapping(),
            "bwt": self.matrix.bwt,
            "naive_forgetting": self.naive.forgetting,
            "bad_update_verdict": self.bad.verdict,
            "bad_update_reasons": self.bad.reasons,
            "seconds": round(self.seconds, 1),
        }


def settings(seed: int) -> UpdateConfig:
    """What differs from the defaults, and why.

    The answers are one word long, so that a change of mind costs many nats per token where a real
    answer spreads it over dozens: hence the wider KL budget. β and the learning rate are those
    tuned for the bundled model. One trait has 177 held-out statements.
    """
    return UpdateConfig(
        seed=seed,
        learning_rate=2.5e-3,
        epochs=3,
        precision="float32",  # bfloat16 gains nothing on one-word answers
        loss=LossSettings(beta=1.0),
        gate=GateSettings(min_pairs=150, kl_budget=0.4),
    )


@dataclass
class Narrator:
    """Who is told of the story as it goes on: stages of long work, and each night's result."""

    progress: Progress
    night: Callable[[int, NightResult], object] = field(default=lambda number, result: None)


def tell(folder: Path, seed: int, narrator: Narrator) -> Story:
    """Live through three nights in a new home, then through a bad one; compare with a naive arm."""
    from agentpref_adapters.transformers import TransformersBackend

    started = time.monotonic()
    nights, config = three_nights(seed), settings(seed)
    home = _new_home(folder)
    with (
        Log(folder) as log,
        closing(TransformersBackend(MODEL, max_batch=IN_FLIGHT)) as backend,
        agentpref.Router(agentpref.Registry(home), backend) as router,
    ):
        app = App(log, router)
        results, ours = [], []
        for number, night in enumerate(nights, start=1):
            results.append(_live(app, home, night, config, narrator))
            narrator.night(number, results[-1])
            live = app.router.registry.live()  # after a refused night, the one before
            ours.append(None if live is None else live.path)
        trained, exams = _pairs(home, [night.tag for night in nights], config)
        bad = _spoil(app, home, spoiled_night(seed), config, narrator)
    with closing(connect(home)) as connection:
        arms = Arms(MODEL, config, connection, narrator.progress)
        naive = arms.train_naively(trained, folder / "naive")
        matrices = [arms.r_matrix(adapters, exams) for adapters in (ours, naive)]
    return Story(
        nights=tuple(results),
        matrix=matrices[0],
        naive=matrices[1],
        bad=bad,
        seconds=time.monotonic() - started,
    )


def _new_home(folder: Path) -> Home:
    """A home of the demo's own: a home in use would learn from its invented users."""
    if folder.is_dir() and any(folder.iterdir()):
        raise NotAHome(f"{folder} is not empty; give the demo a new folder of its own")
    return Home.create(folder)


def _live(
    app: App, home: Home, night: Night, config: UpdateConfig, narrator: Narrator
) -> NightResult:
    """A day of questions and feedback, a night of learning, and the same questions again."""
    before = _day(app, night)
    report = agentpref.update(home.path, model=MODEL, config=config, progress=narrator.progress)
    proving = [(q, a) for q, a in zip(night.questions, before, strict=True) if q.proves]
    proving = proving[:ASKED_AGAIN]
    questions = [question for question, _ in proving]
    swap = _swap_under_load(app, [question.text for question in questions])
    after = app.ask([question.text for question in questions], tag="asked again")
    return NightResult(
        stratum=night.tag,
        title=night.title,
        report=report,
        answers=len(before),
        liked_before=_liked([answer for _, answer in proving], questions),
        liked_after=_liked(after, questions),
        shown=_shown(questions, [answer for _, answer in proving], after),
        swap=swap,
    )


def _day(app: App, night: Night) -> list[Answer]:
    """The agent answers every question, and people react; all of it is in the log afterwards."""
    answers = app.ask([question.text for question in night.questions], tag=night.tag)
    for number, (question, answer) in enumerate(zip(night.questions, answers, strict=True)):
        react(app.log, night.tag, question, answer, number)
    app.log.flush()
    return answers


def _swap_under_load(app: App, questions: Sequence[str]) -> dict[str, int]:
    """Follow the promotion while requests are in flight; count who answered them."""
    with app.traffic(questions) as traffic:
        traffic.wait_for(20)
        app.router.sync()
        traffic.wait_for(20)
    return dict(traffic.answered)


def _spoil(
    app: App, home: Home, night: Night, config: UpdateConfig, narrator: Narrator
) -> agentpref.UpdateReport:
    _day(app, night)
    return agentpref.update(home.path, model=MODEL, config=config, progress=narrator.progress)


def _pairs(
    home: Home, tags: Sequence[str], config: UpdateConfig
) -> tuple[list[list[Pair]], dict[str, list[Pair]]]:
    """What each night trained on, and what its exam is."""
    with closing(connect(home)) as connection:
        found = read_pairs(Store(connection), "default", held_out=config.held_out).pairs
    trained = [[p for p in found if p.tag == tag and not p.held_out] for tag in tags]
    return trained, {tag: [p for p in found if p.tag == tag and p.held_out] for tag in tags}


def _liked(answers: Sequence[Answer], questions: Sequence[Question]) -> float:
    """Share of the answers that are, word for word, what the users like."""
    return sum(a.text == q.liked for a, q in zip(answers, questions, strict=True)) / len(questions)


def _shown(
    questions: Sequence[Question], before: Sequence[Answer], after: Sequence[Answer]
) -> tuple[Shown, ...]:
    """A few questions whose answer changed, or the first few if none did."""
    rows = [
        Shown(q.text, q.liked, b.text, a.text)
        for q, b, a in zip(questions, before, after, strict=True)
    ]
    return tuple([row for row in rows if row.before != row.after][:SHOWN] or rows[:SHOWN])
