"""The demo, step by step: ask, give feedback, update, swap, ask again; then compare both arms.

``tell`` runs everything and returns what happened as plain values. ``App`` is what a user of
agentpref writes: an agent, a callback and a router.

The naive arm trains on the same pairs in the same order, each time from its own previous adapter,
without replay, KL penalty and gate. Both arms are evaluated on the held-out pairs of every update.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import agentpref
from agentpref.config import GateSettings, KLSettings, LossSettings, ReplaySettings, UpdateConfig
from agentpref.errors import NotAHome
from agentpref.home import Home
from agentpref.learn.adapter import Policy
from agentpref.learn.cache import LogpCache
from agentpref.learn.learner import Learner
from agentpref.models.adapter_files import read_adapter
from agentpref.models.base import load_base
from agentpref.prefer.examples import read_examples
from agentpref.prove.evaluate import policy_scores
from agentpref.prove.metrics import RMatrix, accuracy
from agentpref.record.database import connect
from agentpref.record.store import Store
from agentpref.serve.folders import is_revision_id
from agentpref.types import BASE, Example, Progress, UpdateReport
from agentpref_cli.demo.users import (
    Question,
    Reply,
    Round,
    give_feedback,
    shuffled_round,
    three_rounds,
)

MODEL = "tiny"
MAX_TOKENS = 48
IN_FLIGHT = 48
CLIENTS = 3
SHOWN = 3
ASKED_AGAIN = 60
BESIDE_SWAP = 20


def settings(seed: int) -> UpdateConfig:
    """The settings that differ from the defaults.

    The answers are one word long, so that a change of mind costs many nats per token, which a real
    answer spreads over dozens of tokens: hence the wider KL budget. β and the learning rate are
    tuned for the bundled model.
    """
    return UpdateConfig(
        seed=seed,
        learning_rate=2.5e-3,
        epochs=3,
        precision="float32",  # the same on machines with and without bfloat16
        loss=LossSettings(beta=1.0),
        gate=GateSettings(kl_budget=0.4, canary=0.0),
    )


def tell(
    folder: Path,
    seed: int,
    progress: Progress,
    on_update: Callable[[int, Round, UpdateReport, Mapping[str, Any]], object],
) -> dict[str, Any]:
    """Run three updates in a new home and a bad one, and compare them with a naive arm.

    ``on_update`` is called after each of the three with its number, what the users asked, its
    report, and what came of it.

    Returns:
        All that happened, as ``--json`` prints it.

    Raises:
        NotAHome: the folder is not empty. The demo's invented users must not train a home in use.
    """
    from agentpref_adapters.transformers import TransformersBackend

    if folder.is_dir() and any(folder.iterdir()):
        raise NotAHome(f"{folder} is not empty; give the demo a new folder of its own")
    started = time.monotonic()
    rounds, config, home = three_rounds(seed), settings(seed), Home.create(folder)

    def update() -> UpdateReport:
        return agentpref.update(home.path, model=MODEL, config=config, progress=progress)

    with (
        agentpref.Log(folder) as log,
        closing(TransformersBackend(MODEL, max_batch=IN_FLIGHT)) as backend,
        agentpref.Router(agentpref.Registry(home), backend) as router,
    ):
        app = App(log, router)
        updates: list[dict[str, Any]] = []
        adapters: list[Path | None] = []
        for number, asked in enumerate(rounds, start=1):
            replies = _collect_feedback(app, asked)
            report = update()
            pairs = zip(asked.questions, replies, strict=True)
            before = [(q, reply) for q, reply in pairs if q.held_out][:ASKED_AGAIN]
            texts = [q.text for q, _ in before]
            swap, after = app.swap(texts), app.ask(texts, tag="asked again")
            updates.append(outcome(asked, report, before, after, swap, seed))
            on_update(number, asked, report, updates[-1])
            live = router.registry.live()  # of a refused update, the revision before it
            adapters.append(None if live is None else live.path)
        _collect_feedback(app, shuffled_round(seed))
        bad = update()
    with closing(connect(home)) as connection:
        found = read_examples(Store(connection), "default", held_out=config.held_out).pairs
        tags = [asked.tag for asked in rounds]
        trained = [[p for p in found if p.tag == tag and not p.held_out] for tag in tags]
        held_out = {tag: [p for p in found if p.tag == tag and p.held_out] for tag in tags}
        arms = Arms(config, connection, progress)
        naive = arms.r_matrix([*arms.train_naively(trained, folder / "naive")], held_out)
        ours = arms.r_matrix(adapters, held_out)
    return summary(updates, ours, naive, bad, time.monotonic() - started)


def summary(
    updates: Sequence[Mapping[str, Any]],
    ours: RMatrix,
    naive: RMatrix,
    bad: UpdateReport,
    seconds: float,
) -> dict[str, Any]:
    """What happened, as plain values."""
    return {
        "updates": updates,
        "r_matrix": ours.to_mapping(),
        "naive_r_matrix": naive.to_mapping(),
        "bwt": ours.bwt,
        "naive_forgetting": naive.forgetting,
        "bad_update_verdict": bad.verdict,
        "bad_update_reasons": bad.reasons,
        "seconds": round(seconds, 1),
    }


def outcome(
    asked: Round,
    report: UpdateReport,
    before: Sequence[tuple[Question, Reply]],
    after: Sequence[Reply],
    swap: Mapping[str, int],
    seed: int,
) -> dict[str, Any]:
    """What came of an update, as plain values.

    ``shown`` has a few held-out questions, with the liked answer and the replies before and after.
    They are drawn with the seed, whatever became of them.
    """
    rows = [
        {"question": question.text, "liked": question.liked, "before": old.text, "after": new.text}
        for (question, old), new in zip(before, after, strict=True)
    ]
    return {
        "stratum": asked.tag,
        "verdict": report.verdict,
        "accuracy_before": report.accuracy[asked.tag]["before"],
        "accuracy_after": report.accuracy[asked.tag]["after"],
        "liked_before": _liked(rows, "before"),
        "liked_after": _liked(rows, "after"),
        "swap": dict(swap),
        "asked_again": len(rows),
        "shown": random.Random(seed).sample(rows, min(SHOWN, len(rows))),
    }


def _liked(rows: Sequence[Mapping[str, str]], when: str) -> float:
    """Share of the replies that are, word for word, what the users like."""
    return sum(row[when] == row["liked"] for row in rows) / len(rows)


def _collect_feedback(app: App, asked: Round) -> list[Reply]:
    """Ask the agent every question of a round, and log what the users think of the replies."""
    replies = app.ask([question.text for question in asked.questions], tag=asked.tag)
    for number, (question, reply) in enumerate(zip(asked.questions, replies, strict=True)):
        give_feedback(app.log, asked.tag, question, reply, number)
    app.log.flush()
    return replies


class App:
    """A LangChain agent without tools that the live revision serves and the log records."""

    def __init__(self, log: agentpref.Log, router: agentpref.Router) -> None:
        from langchain.agents import create_agent

        from agentpref_adapters.langchain import AgentprefChatModel

        self.log, self.router = log, router
        model = AgentprefChatModel(router=router, model=MODEL, max_tokens=MAX_TOKENS)
        self._agent: Any = create_agent(model, tools=[])

    def ask(self, questions: Sequence[str], *, tag: str) -> list[Reply]:
        """Ask the agent all questions, many at a time, and log each reply under the tag."""
        from agentpref_adapters.langchain import AgentprefCallback

        callback = AgentprefCallback(self.log, tags=[tag], user_id=tag)
        traces = [uuid4() for _ in questions]
        inputs = [{"messages": [("user", text)]} for text in questions]
        shared = {"callbacks": [callback], "max_concurrency": IN_FLIGHT}
        results = self._agent.batch(inputs, [{**shared, "run_id": trace} for trace in traces])
        return [
            Reply(callback.answer_of(trace) or "", _text(message), _revision(message))
            for trace, message in zip(traces, (r["messages"][-1] for r in results), strict=True)
        ]

    def swap(self, questions: Sequence[str]) -> Counter[str]:
        """Follow the promotion while requests are in flight, from three threads.

        Returns how many requests each revision answered, and how many ``failed``.
        """

        def request(text: str) -> str:
            try:
                result = self._agent.invoke({"messages": [("user", text)]})
            except Exception:  # any error is a dropped request, and counted as one
                return "failed"
            return _revision(result["messages"][-1])

        with ThreadPoolExecutor(CLIENTS) as clients:
            requests = [clients.submit(request, text) for text in questions]
            for answered in requests[:BESIDE_SWAP]:
                answered.result()
            self.router.sync()
            requests += [clients.submit(request, text) for text in questions[:BESIDE_SWAP]]
        return Counter(answered.result() for answered in requests)


def _revision(message: Any) -> str:
    return str(message.response_metadata["revision"])


def _text(message: Any) -> str:
    """What the user sees: the text, or the tools that were called."""
    calls = ", ".join(f"{call['name']}({call['args']})" for call in message.tool_calls)
    return str(message.text) or f"[calls {calls}]"


@dataclass(frozen=True)
class Arms:
    """What both arms share: the settings, and the home that caches log-probabilities."""

    config: UpdateConfig
    connection: sqlite3.Connection
    progress: Progress

    def train_naively(self, updates: Sequence[Sequence[Example]], folder: Path) -> Iterator[Path]:
        """Train on the pairs of each update without protection; yield the adapter after each."""
        naive = replace(self.config, replay=ReplaySettings(minimum=0), kl=KLSettings(weight=0.0))
        live: Path | None = None
        for number, pairs in enumerate(updates, start=1):
            learner = self._learner("naive arm", live, naive)
            rows = learner.encode(pairs)
            learner.fit(rows, new=len(rows))
            live = folder / str(number)
            learner.save(live)
            yield live

    def r_matrix(
        self, adapters: Sequence[Path | None], held_out: Mapping[str, Sequence[Example]]
    ) -> RMatrix:
        """Accuracy on the held-out pairs of every update: one row for the base, one per adapter.

        An adapter that is ``None`` stands for the base model.
        """
        rows = [tuple(0.5 for _ in held_out)]  # the base is its own reference: .5 by definition
        for adapter in adapters:
            learner = self._learner("evaluation", adapter, self.config)
            scores = (policy_scores(learner, "live", learner.encode(p)) for p in held_out.values())
            rows.append(tuple(map(accuracy, scores)))
        return RMatrix(tuple(held_out), tuple(rows))

    def _learner(self, name: str, live: Path | None, config: UpdateConfig) -> Learner:
        base = load_base(MODEL, precision=self.config.precision)
        caches: dict[Policy, LogpCache] = {"base": LogpCache(self.connection, base.numbers, BASE)}
        if live is not None and is_revision_id(live.name):
            caches["live"] = LogpCache(self.connection, base.numbers, live.name)
        return Learner(
            base,
            None if live is None else read_adapter(live),
            config,
            caches=caches,
            progress=lambda stage, done, total: self.progress(f"{name}: {stage}", done, total),
        )
