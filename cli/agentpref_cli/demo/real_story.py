"""The demo on a real model: ask, import what people preferred, update, swap, ask again.

``tell`` runs two nights and returns what happened as plain values. The questions that are asked
before and after are held out: no update ever trains on them. Answers are greedy, so that a
difference is the adapter's and not chance's.
"""

from __future__ import annotations

import io
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson

import agentpref
from agentpref.config import UpdateConfig
from agentpref.errors import NotAHome, ServingError
from agentpref.home import Home
from agentpref.models.base import load_base
from agentpref.prefer.exchange import import_file
from agentpref.serve.backend import GenerationRequest
from agentpref.types import Progress, UpdateReport
from agentpref_cli.demo.real_people import LISTS, SHORTER, Answer, Asked, Preference, questions

NIGHTS = (SHORTER, LISTS)
MAX_TOKENS = 160
IN_FLIGHT = 32
ASKED = 28
SHOWN = 3
CLIENTS = 3
BESIDE_SWAP, AFTER_SWAP = 6, 3


def settings(seed: int) -> UpdateConfig:
    """The settings of both nights that differ from the defaults.

    docs/training.md says what they gave. Two epochs instead of three save a third of the time.
    """
    return UpdateConfig(seed=seed, learning_rate=2e-4, epochs=2)


def tell(
    folder: Path,
    model: str,
    config: UpdateConfig,
    progress: Progress,
    on_night: Callable[[int, Preference, UpdateReport, Mapping[str, Any]], object],
) -> dict[str, Any]:
    """Run both nights in a new home.

    ``on_night`` is called after each with its number, the preference, the report, and what came of
    it.

    Returns:
        All that happened, as ``--json`` prints it.

    Raises:
        NotAHome: the folder is not empty.
    """
    from agentpref_adapters.transformers import TransformersBackend

    if folder.is_dir() and any(folder.iterdir()):
        raise NotAHome(f"{folder} is not empty; give the demo a new folder of its own")
    started, home = time.monotonic(), Home.create(folder)
    asked = {night.tag: _held_out(night, config) for night in NIGHTS}
    nights: list[dict[str, Any]] = []
    with (
        closing(
            TransformersBackend(load_base(model, precision=config.precision), max_batch=IN_FLIGHT)
        ) as backend,
        agentpref.Router(agentpref.Registry(home), backend) as router,
    ):

        def ask(tags: Sequence[str]) -> dict[str, list[Answer]]:
            progress("ask", 0, len(tags))
            found = {}
            for number, tag in enumerate(tags, start=1):
                found[tag] = answer(router, asked[tag])
                progress("ask", number, len(tags))
            return found

        tags = [night.tag for night in NIGHTS]
        serving = ask(tags[:1])
        learned = dict[str, list[Answer]]()
        for number, night in enumerate(NIGHTS, start=1):
            rows = b"".join(orjson.dumps(row) + b"\n" for row in night.comparisons())
            import_file(home, io.BytesIO(rows), tag=night.tag)
            report = agentpref.update(home.path, model=model, config=config, progress=progress)
            swap = follow(router, asked[night.tag])
            after = ask(tags[: number + 1])
            nights.append(outcome(night, report, asked, serving, after, learned, swap, config.seed))
            learned[night.tag] = after[night.tag]
            serving = after
            on_night(number, night, report, nights[-1])
    return {"model": model, "nights": nights, "seconds": round(time.monotonic() - started, 1)}


def _held_out(night: Preference, config: UpdateConfig) -> list[Asked]:
    """Some of the held-out questions of a night, drawn with the seed."""
    found = [asked for asked in questions(night.tag) if asked.is_held_out(config.held_out)]
    return random.Random(config.seed).sample(found, min(ASKED, len(found)))


def answer(router: agentpref.Router, asked: Sequence[Asked]) -> list[Answer]:
    """Ask what serves all questions together."""

    def one(question: Asked) -> Answer:
        reply = router.generate(GenerationRequest(question.messages, max_tokens=MAX_TOKENS))
        return Answer(str(reply.message["content"]), reply.finish_reason == "stop")

    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        return [*threads.map(one, asked)]


def follow(router: agentpref.Router, asked: Sequence[Asked]) -> Counter[str]:
    """Follow a promotion while requests are in flight.

    Returns how many requests each revision answered, and how many ``failed``.
    """

    def request(question: Asked) -> str:
        try:
            return router.generate(GenerationRequest(question.messages, max_tokens=32)).revision
        except ServingError:  # a dropped request, and counted as one
            return "failed"

    with ThreadPoolExecutor(CLIENTS) as clients:
        requests = [clients.submit(request, question) for question in asked[:BESIDE_SWAP]]
        requests[0].result()
        router.sync()
        requests += [clients.submit(request, question) for question in asked[:AFTER_SWAP]]
    return Counter(done.result() for done in requests)


def outcome(
    night: Preference,
    report: UpdateReport,
    asked: Mapping[str, Sequence[Asked]],
    before: Mapping[str, Sequence[Answer]],
    after: Mapping[str, Sequence[Answer]],
    learned: Mapping[str, Sequence[Answer]],
    swap: Mapping[str, int],
    seed: int,
) -> dict[str, Any]:
    """What came of a night, as plain values.

    ``shown`` has some of the held-out questions, drawn with the seed whatever became of their
    answers. ``kept`` measures what earlier nights taught: as they left it, and now.
    """
    old, new, tag = before[night.tag], after[night.tag], night.tag
    rows = [
        {"question": question.question, "before": _plain(first), "after": _plain(second)}
        for question, first, second in zip(asked[tag], old, new, strict=True)
    ]
    return {
        "stratum": tag,
        "verdict": report.verdict,
        "accuracy_before": report.accuracy.get(tag, {}).get("before"),
        "accuracy_after": report.accuracy.get(tag, {}).get("after"),
        "asked": len(rows),
        "before": summary(old),
        "after": summary(new),
        "win_rate": night.win_rate(old, new),
        "kept": {
            earlier: {"left": summary(answers), "now": summary(after[earlier])}
            for earlier, answers in learned.items()
        },
        "swap": dict(swap),
        "max_tokens": MAX_TOKENS,
        "seed": seed,
        "shown": random.Random(seed).sample(rows, min(SHOWN, len(rows))),
    }


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Mean words, and how many answers are lists, were cut off, or are empty."""
    return {
        "words": statistics.fmean(answer.words for answer in answers),
        "lists": sum(answer.is_list for answer in answers),
        "cut_off": sum(not answer.whole for answer in answers),
        "empty": sum(not answer.text.strip() for answer in answers),
    }


def _plain(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "words": answer.words, "whole": answer.whole}
