"""The demo, step by step: ask, give feedback, update, swap, ask again; then compare both arms.

``tell`` runs everything through the public interface and returns what happened as plain values; the
``print_`` functions show it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import agentpref
from agentpref.config import GateSettings, LossSettings, UpdateConfig
from agentpref.errors import NotAHome
from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.prove.metrics import RMatrix
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.store import Store
from agentpref.types import Progress
from agentpref_cli.demo.app import IN_FLIGHT, App, Reply
from agentpref_cli.demo.arms import Arms
from agentpref_cli.demo.users import Question, Round, give_feedback, shuffled_round, three_rounds
from agentpref_cli.terminal import BAD, BOLD, DIM, GOOD, one_line, read_check, say, table

MODEL = "tiny"
SHOWN = 3
ASKED_AGAIN = 60


@dataclass(frozen=True, slots=True)
class Updated:
    """One update: its report, the swap, and answers to held-out questions before and after.

    ``shown`` has a few of those questions, with the liked answer and both replies.
    """

    stratum: str
    title: str
    report: agentpref.UpdateReport
    answers: int
    liked_before: float
    liked_after: float
    shown: list[dict[str, str]]
    swap: dict[str, int]

    def to_mapping(self) -> dict[str, Any]:
        """This update as ``--json`` prints it."""
        accuracy = self.report.accuracy[self.stratum]
        return {
            "stratum": self.stratum,
            "verdict": self.report.verdict,
            "accuracy_before": accuracy["before"],
            "accuracy_after": accuracy["after"],
            "liked_before": self.liked_before,
            "liked_after": self.liked_after,
            "swap": self.swap,
            "shown": self.shown,
        }


@dataclass(frozen=True, slots=True)
class Story:
    """All that happened, and how long it took."""

    updates: tuple[Updated, ...]
    matrix: RMatrix
    naive: RMatrix
    bad: agentpref.UpdateReport
    seconds: float

    def to_mapping(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "updates": [update.to_mapping() for update in self.updates],
            "r_matrix": self.matrix.to_mapping(),
            "naive_r_matrix": self.naive.to_mapping(),
            "bwt": self.matrix.bwt,
            "naive_forgetting": self.naive.forgetting,
            "bad_update_verdict": self.bad.verdict,
            "bad_update_reasons": self.bad.reasons,
            "seconds": round(self.seconds, 1),
        }


def settings(seed: int) -> UpdateConfig:
    """The settings that differ from the defaults.

    The answers are one word long, so that a change of mind costs many nats per token, which a real
    answer spreads over dozens of tokens: hence the wider KL budget. β and the learning rate are
    tuned for the bundled model. One trait has only 177 held-out statements.
    """
    return UpdateConfig(
        seed=seed,
        learning_rate=2.5e-3,
        epochs=3,
        precision="float32",  # bfloat16 gains nothing on one-word answers
        loss=LossSettings(beta=1.0),
        gate=GateSettings(min_pairs=150, kl_budget=0.4),
    )


def tell(
    folder: Path, seed: int, progress: Progress, on_update: Callable[[int, Updated], object]
) -> Story:
    """Run three updates in a new home and a bad one, and compare them with a naive arm.

    ``on_update`` is called with the number and the result of each of the three.

    Raises:
        NotAHome: the folder is not empty. The demo's invented users must not train a home in use.
    """
    from agentpref_adapters.transformers import TransformersBackend

    if folder.is_dir() and any(folder.iterdir()):
        raise NotAHome(f"{folder} is not empty; give the demo a new folder of its own")
    started = time.monotonic()
    rounds, config, home = three_rounds(seed), settings(seed), Home.create(folder)

    def update() -> agentpref.UpdateReport:
        return agentpref.update(home.path, model=MODEL, config=config, progress=progress)

    with (
        Log(folder) as log,
        closing(TransformersBackend(MODEL, max_batch=IN_FLIGHT)) as backend,
        agentpref.Router(agentpref.Registry(home), backend) as router,
    ):
        app = App(log, router)
        updates, adapters = [], []
        for number, asked in enumerate(rounds, start=1):
            updates.append(_one_update(app, asked, update))
            on_update(number, updates[-1])
            live = app.router.registry.live()  # of a refused update, the revision before it
            adapters.append(None if live is None else live.path)
        _collect_feedback(app, shuffled_round(seed))
        bad = update()
    with closing(connect(home)) as connection:
        found = read_examples(Store(connection), "default", held_out=config.held_out).pairs
        tags = [asked.tag for asked in rounds]
        trained = [[p for p in found if p.tag == tag and not p.held_out] for tag in tags]
        held_out = {tag: [p for p in found if p.tag == tag and p.held_out] for tag in tags}
        arms = Arms(MODEL, config, connection, progress)
        naive = arms.r_matrix(arms.train_naively(trained, folder / "naive"), held_out)
        ours = arms.r_matrix(adapters, held_out)
    return Story(tuple(updates), ours, naive, bad, time.monotonic() - started)


def _one_update(app: App, asked: Round, update: Callable[[], agentpref.UpdateReport]) -> Updated:
    """Ask and collect feedback, update, swap under load, and ask held-out questions again."""
    replies = _collect_feedback(app, asked)
    report = update()
    held_out = [(q, r) for q, r in zip(asked.questions, replies, strict=True) if q.held_out]
    questions, before = zip(*held_out[:ASKED_AGAIN], strict=True)
    texts = [question.text for question in questions]
    with app.traffic(texts) as traffic:
        traffic.wait_for(20)
        app.router.sync()  # follows the promotion while requests are in flight
        traffic.wait_for(20)
    after = app.ask(texts, tag="asked again")
    rows = [
        {"question": q.text, "liked": q.liked, "before": b.text, "after": a.text}
        for q, b, a in zip(questions, before, after, strict=True)
    ]
    changed = [row for row in rows if row["before"] != row["after"]]
    return Updated(
        stratum=asked.tag,
        title=asked.title,
        report=report,
        answers=len(replies),
        liked_before=_liked(before, questions),
        liked_after=_liked(after, questions),
        shown=(changed or rows)[:SHOWN],
        swap=dict(traffic.answered),
    )


def _collect_feedback(app: App, asked: Round) -> list[Reply]:
    """Ask the agent every question of a round, and log what the users think of the replies."""
    replies = app.ask([question.text for question in asked.questions], tag=asked.tag)
    for number, (question, reply) in enumerate(zip(asked.questions, replies, strict=True)):
        give_feedback(app.log, asked.tag, question, reply, number)
    app.log.flush()
    return replies


def _liked(replies: Sequence[Reply], questions: Sequence[Question]) -> float:
    """Share of the replies that are, word for word, what the users like."""
    return sum(r.text == q.liked for r, q in zip(replies, questions, strict=True)) / len(questions)


def print_opening() -> None:
    """Say what the demo does."""
    say("Three updates of the bundled model on real preferences, without a network.", BOLD)
    say("A LangChain agent answers, users give feedback, and each update trains on it.", DIM)


def print_update(number: int, updated: Updated) -> None:
    """Print one update: the verdict, the swap, and answers before and after."""
    say("")
    say(f"Update {number}: {updated.title} ({updated.stratum})", BOLD)
    report, counts = updated.report, updated.report.counts
    say(
        f"  {updated.answers} answers logged -> {counts['new']} new pairs, "
        f"{counts['new_held_out']} held out; {counts.get('replayed', 0)} older pairs replayed"
    )
    say(
        f"  {report.verdict}: {report.revision or ''}",
        GOOD if report.verdict == "promoted" else BAD,
    )
    for check in report.checks:
        passed, message = read_check(check)
        if check["name"] == "new preferences" or not passed:
            say(f"    {check['name']}: {message}", "" if passed else BAD)
    failed = updated.swap.get("failed", 0)
    by = ", ".join(f"{n} by {name}" for name, n in sorted(updated.swap.items()) if name != "failed")
    say(f"  requests during the swap: {by}; {failed} failed", BAD if failed else "")
    say(f"  answers as users like them: {updated.liked_before:.0%} -> {updated.liked_after:.0%}")
    for shown in updated.shown:
        say(f"    {one_line(shown['question'], 96)}", DIM)
        say(f"      before: {one_line(shown['before'], 84)}")
        say(f"      after:  {one_line(shown['after'], 84)}", GOOD)


def print_end(story: Story) -> None:
    """Print both arms' accuracies, the bad update, and the summary line."""
    _print_matrix("Held-out accuracy with agentpref (replay and KL penalty)", story.matrix)
    _print_matrix("The same updates trained naively (neither)", story.naive)
    say("")
    say("An update on shuffled labels", BOLD)
    refused = story.bad.verdict == "refused"
    say(f"  {story.bad.verdict}; what served before still serves", GOOD if refused else BAD)
    for reason in story.bad.reasons:
        say(f"    {reason}")
    say("")
    say(
        f"BWT {story.matrix.bwt:+.3f} | naive forgetting F {story.naive.forgetting:.3f} | "
        f"bad update {story.bad.verdict} | {story.seconds:.0f} s",
        BOLD,
    )


def _print_matrix(title: str, matrix: RMatrix) -> None:
    say("")
    say(title, BOLD)
    after = ["before any update", *(f"after update {n}" for n in range(1, len(matrix.rows)))]
    rows = [
        (name, *(f"{value:.2f}" for value in row))
        for name, row in zip(after, matrix.rows, strict=True)
    ]
    table(("", *matrix.strata), rows)
    say(f"  BWT {matrix.bwt:+.3f}, forgetting F {matrix.forgetting:.3f}")
