"""How much longer than its judge agentpref takes to ask 1,000 questions in both orders.

The judge is a server in another process that takes ``delay`` for a call, does not answer one call
in twenty before the client's time-out, and gives no verdict in another one in twenty. Four times
are taken, with 16 calls at a time:

    allowed    what the server alone allows, computed: every call takes the delay, or the time-out,
               and what failed is asked again at once
    bare       asyncio and httpx make the same calls, and keep nothing
    hear       ``hear`` with the engine ``openai``, and keeps nothing
    home       ``judge_runs`` in a home of 1,000 prompts with two answers each: verdicts and
               comparisons are written

Which call fails is drawn from what is asked and the seed, so that all make nearly the same calls.
Nothing may be lost and nothing may be asked or kept twice.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from agentpref import Log
from agentpref.home import Home
from agentpref.judging import Asking, calibrate_judge, judge_runs
from agentpref.prefer.judges import rubric as rubrics
from agentpref.prefer.judges.asking import Said, messages_for, read_verdict
from agentpref.prefer.judges.hearing import Case, Forgetful, Spending, hear
from agentpref.prefer.judges.rubric import Rubric
from agentpref.prefer.judges.verdicts import Question
from agentpref.record.database import connect
from agentpref.testing.judges import drawn
from agentpref.types import Message
from benchmarks._report import Target, at_most
from benchmarks.judges.server import served

QUESTIONS, CONCURRENCY, GOLD = 1_000, 16, 20
TIMEOUT, STALLS, MALFORMED = 1.0, 0.05, 0.05
DELAYS = (0.05, 0.5)
"""Seconds of a call: far quicker than models answer, and about as quick as a fast one does."""

MODEL = "fake"
_RUBRIC = """---
engine: openai
model: {model}
base_url: {url}
timeout: {timeout}
scale: 2
principles:
  - name: brief
    text: Prefer the shorter answer.
---
"""
_NOWHERE = "http://127.0.0.1:9/v1"
_AGAIN = "That is no verdict."


def measure(seeds: int = 1) -> dict[str, Any]:
    """All times, for each delay and seed."""
    return {
        f"delay {delay}, seed {seed}": _measured(delay, seed)
        for delay in DELAYS
        for seed in range(seeds)
    }


def targets(found: dict[str, Any]) -> list[Target]:
    """What was promised of the time, and that nothing is lost or doubled."""
    promised = []
    for name, one in found.items():
        for path in ("hear", "home"):
            ratio = one[path]["seconds"] / one["allowed"]
            promised.append(at_most(f"throughput, {name}: {path} to allowed", ratio, 1.1))
            promised += [
                at_most(f"throughput, {name}: {path}, {what}", one[path][what], 0)
                for what in ("lost", "doubled")
            ]
    return promised


def _measured(delay: float, seed: int) -> dict[str, Any]:
    faults = {"delay": delay, "stalls": STALLS, "stall": 2 * TIMEOUT, "malformed": MALFORMED,
              "seed": seed}  # fmt: skip
    found: dict[str, Any] = {"allowed": _allowed(delay, seed)}
    with served(**faults) as server:
        begun = time.monotonic()
        asyncio.run(_bare(server.url))
        found["bare"] = {"seconds": time.monotonic() - begun, "calls": server.calls()}
    with served(**faults) as server:
        found["hear"] = _heard(server.url)
        found["hear"]["calls"] = server.calls()
    with served(**faults) as server:
        found["home"] = _at_home(server.url)
        found["home"]["calls"] = server.calls()
    for path, asked in (("hear", 2 * QUESTIONS), ("home", 2 * (QUESTIONS + GOLD))):
        # Answers that came after the client had given up, because the machine was busy.
        found[path]["late"] = found[path]["calls"]["judged"] - asked
    for path in ("bare", "hear", "home"):
        found[path]["to allowed"] = round(found[path]["seconds"] / found["allowed"], 3)
    return found


def _answers(number: int) -> tuple[Message, Message, Message]:
    """A question and its answers, the shorter one first in every other question."""
    texts = [f"Number {number}.", f"Well, as to that, it would be number {number}, I should say."]
    texts = texts[:: 1 if number % 2 else -1]
    a, b = ({"role": "assistant", "content": text} for text in texts)
    return {"role": "user", "content": f"What is the number of question {number}?"}, a, b


def _rubric(url: str) -> Rubric:
    return rubrics.parse("brief", _RUBRIC.format(model=MODEL, url=url, timeout=TIMEOUT))


def _cases() -> list[Case]:
    return [Case(Question((asked,), a, b)) for asked, a, b in map(_answers, range(QUESTIONS))]


def _asked(rubric: Rubric) -> Iterator[list[Message]]:
    """What the server is asked, in the order in which it is."""
    for case in _cases():
        for question in (case.question, case.question.swap()):
            yield messages_for(rubric, question)


def _allowed(delay: float, seed: int) -> float:
    """The seconds of the server's own draws, on lanes that are never idle."""
    lanes = [0.0] * CONCURRENCY
    for messages in _asked(_rubric(_NOWHERE)):
        begun = heapq.heappop(lanes)
        heapq.heappush(lanes, begun + _alone(messages, delay, seed))
    return max(lanes)


def _alone(messages: list[Message], delay: float, seed: int) -> float:
    """The seconds until one question has a verdict."""
    seconds, attempt = 0.0, 1
    while True:
        asked = json.dumps(messages), str(attempt)
        if drawn(seed, "stalls", *asked) < STALLS:
            seconds, attempt = seconds + TIMEOUT, attempt + 1
            continue
        seconds += delay
        if drawn(seed, "malformed", *asked) >= MALFORMED:
            return seconds
        messages, attempt = [*messages, {"role": "user", "content": _AGAIN}], 1


async def _bare(url: str) -> None:
    """Ask everything without agentpref and openai."""
    import httpx

    waiting = _asked(_rubric(url))
    limits = httpx.Limits(max_connections=CONCURRENCY)
    async with httpx.AsyncClient(timeout=TIMEOUT, limits=limits) as client:

        async def lane() -> None:
            for messages in waiting:
                while not await _answered(client, url, messages):
                    pass

        await asyncio.gather(*(lane() for _ in range(CONCURRENCY)))


async def _answered(client: Any, url: str, messages: list[Message]) -> bool:
    import httpx

    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 400}
    try:
        answer = (await client.post(f"{url}/chat/completions", json=body)).json()
    except httpx.TimeoutException:
        return False
    text = answer["choices"][0]["message"]["content"]
    if read_verdict(Said(text)) is None:
        messages.append({"role": "user", "content": _AGAIN})
        return False
    return True


def _heard(url: str) -> dict[str, Any]:
    """Ask everything by ``hear``."""
    from agentpref_adapters.judges import openai

    rubric = _rubric(url)
    judge, spending, cases = openai(rubric), Spending(), _cases()
    begun, cpu = time.monotonic(), time.process_time()
    heard = hear(judge, cases, memory=Forgetful(), spending=spending, concurrency=CONCURRENCY)
    numbers = [number for number, _ in heard]
    return {
        "seconds": time.monotonic() - begun,
        "cpu": time.process_time() - cpu,
        "failed": dict(spending.failed),
        "lost": QUESTIONS - len(set(numbers)),
        "doubled": len(numbers) - len(set(numbers)),
    }


def _at_home(url: str) -> dict[str, Any]:
    """Ask everything by ``judge_runs``, by a judge that was calibrated on a file."""
    with tempfile.TemporaryDirectory() as folder:
        place, gold = Path(folder) / "home", Path(folder) / "gold.jsonl"
        with Log(place) as log:
            for asked, *answers in map(_answers, range(QUESTIONS)):
                for answer in answers:
                    log.record([asked], answer, tags=["numbers"])
        rubrics.write(Home.open(place), "brief", _rubric(url).source)
        rows = [_gold(number) for number in range(QUESTIONS, QUESTIONS + GOLD)]
        gold.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        asking = Asking(concurrency=CONCURRENCY)
        calibrate_judge(place, "brief", gold=gold, tag="numbers", asking=asking)
        begun, cpu = time.monotonic(), time.process_time()
        done = judge_runs(place, "brief", recheck=0, asking=asking)
        seconds, cpu = time.monotonic() - begun, time.process_time() - cpu
        with closing(connect(Home.open(place))) as connection:
            count = """SELECT count(*), count(DISTINCT run_a || run_b),
                (SELECT count(*) FROM verdict) FROM comparison"""
            rows_, pairs, verdicts = connection.execute(count).fetchone()
    return {
        "seconds": seconds,
        "cpu": cpu,
        "failed": dict(done.spending.failed),
        "decided": done.decided,
        "lost": 2 * QUESTIONS - min(pairs, verdicts - 2 * GOLD, 2 * done.asked),
        "doubled": rows_ - pairs + max(0, done.spending.asked - 2 * QUESTIONS),
    }


def _gold(number: int) -> dict[str, Any]:
    asked, a, b = _answers(number)
    better, worse = sorted((a, b), key=lambda one: len(str(one["content"])))
    return {"prompt": [asked], "chosen": [better], "rejected": [worse]}
