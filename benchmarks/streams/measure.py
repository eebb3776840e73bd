"""Measures a revision: what it ranks, what it writes, and what became of everything else.

Nothing that is measured here was ever logged in a home: the product neither trains on it nor proves
with it. Answers come from the backend that serves (:mod:`agentpref_adapters.transformers`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from agentpref.config import UpdateConfig
from agentpref.home import Home
from agentpref.learn.cache import LogpCache
from agentpref.learn.learner import Learner
from agentpref.models.adapter_files import read_adapter
from agentpref.models.base import load_base
from agentpref.prove.evaluate import kl_from_base, policy_scores
from agentpref.prove.metrics import accuracy
from agentpref.record.database import connect
from agentpref.serve.backend import GenerationRequest, Revision
from agentpref.types import BASE, Message, Tool
from agentpref_adapters.transformers import TransformersBackend
from benchmarks.streams.catalogue import Samples
from benchmarks.streams.items import Item, Night, asked, said
from benchmarks.streams.rows import Rows, say
from benchmarks.streams.rules import text_of
from benchmarks.streams.subjects import Subject, subject_of

WRITTEN = 40
"""How many held-out questions of a night are asked."""

TEMPERATURE = 0.9
_TOGETHER = 48

Asked = tuple[Sequence[Message], Sequence[Tool]]


class Meter:
    """Measures revisions of one model; a context manager that stops its backend at the end.

    What the base says, and how likely it finds what is measured, is kept in ``work``.
    """

    def __init__(self, model: str, work: Path) -> None:
        self.model = model
        self.subject: Subject = subject_of(model)
        self._stack = ExitStack()
        self._backend = TransformersBackend(model, max_batch=_TOGETHER)
        self._stack.callback(self._backend.close)
        self.base = self._backend.base.numbers[:12]
        self._kept = Rows(work / f"said-{self.base}.jsonl")
        self._said = {row["key"]: row["text"] for row in self._kept}
        self._connection = connect(Home.create(work / "scores"))
        self._stack.callback(self._connection.close)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def measure(self, revision: Revision | None, nights: Sequence[Night]) -> dict[str, Any]:
        """All measures of a revision (``None``: the base), with a value per night where it has one.

        ``ranking`` is the accuracy of the implicit reward on pairs, against the base, whose own is
        ½; ``behaviour`` is the rule's score of greedy answers, ``words`` their mean length. ``kl``
        is KL(π_0 ‖ π_θ) in nats per token of the pairs' answers, ``perplexity`` that of general
        text, and ``capability`` the share of probes that are answered well.
        """
        written = [night.measured[:WRITTEN] for night in nights]
        prompts: list[Asked] = [(i.messages, i.tools) for items in written for i in items]
        probes: list[Asked] = [(probe.messages, ()) for probe in self.subject.probes]
        answers = iter(self.answers(revision, [*prompts, *probes]))
        base = iter(self.answers(None, prompts))
        behaviour, words = [], []
        for night, items in zip(nights, written, strict=True):
            texts = [next(answers) for _ in items]
            wanted = [item.wanted for item in items]
            behaviour.append(night.rule.behaviour(texts, wanted, [next(base) for _ in items]))
            words.append(sum(len(text.split()) for text in texts) / len(texts))
        good = [probe.is_good(next(answers)) for probe in self.subject.probes]
        return {
            **self._scores(revision, nights),
            "behaviour": behaviour,
            "words": words,
            "capability": sum(good) / len(good),
        }

    def _scores(self, revision: Revision | None, nights: Sequence[Night]) -> dict[str, Any]:
        base = load_base(self.model)
        learner = Learner(
            base,
            None if revision is None else read_adapter(revision.path),
            UpdateConfig(),
            caches={"base": LogpCache(self._connection, base.numbers, BASE)},
        )
        strata = [learner.encode(night.examples()) for night in nights]
        general = learner.encode(
            [
                Item(asked(question), said(answer), said("-")).example("general", number)
                for number, (question, answer) in enumerate(self.subject.general)
            ]
        )
        tokens = sum(len(row.own[0]) for row in general)
        nll = -math.fsum(logps[0] for logps in learner.score("live", general))
        return {
            "ranking": [accuracy(policy_scores(learner, "live", rows)) for rows in strata],
            "kl": kl_from_base(learner, [row for rows in strata for row in rows], seed=0),
            "perplexity": math.exp(nll / tokens),
        }

    def answers(self, revision: Revision | None, prompts: Sequence[Asked]) -> list[str]:
        """Greedy answers of a revision, in order; the base's are kept."""
        requests = [
            GenerationRequest(tuple(messages), tuple(tools), max_tokens=self.subject.max_tokens)
            for messages, tools in prompts
        ]
        if revision is None:
            return self._of_base(requests)
        self._backend.load(revision)
        try:
            return list(self._generate(revision.revision_id, requests))
        finally:
            self._backend.unload(revision.revision_id)

    def samples(self) -> Samples:
        """Answers of the base to each question of the subject: sampled, and with each hint."""
        hints = ["", *dict.fromkeys(style.hint for style in self.subject.styles if style.hint)]
        number = self.subject.samples
        plan = [
            (question, f"{question}\n{hint}" if hint else question, seed)
            for question in self.subject.questions
            for hint in hints
            for seed in range(1 if hint else number)
        ]
        texts = self._of_base(
            [
                GenerationRequest(
                    asked(prompt),
                    max_tokens=self.subject.max_tokens,
                    temperature=TEMPERATURE,
                    seed=seed,
                )
                for _, prompt, seed in plan
            ]
        )
        found: dict[str, list[str]] = {}
        for (question, _, _), text in zip(plan, texts, strict=True):
            found.setdefault(question, []).append(text)
        return found

    def _of_base(self, requests: Sequence[GenerationRequest]) -> list[str]:
        keys = [_key(request) for request in requests]
        missing = {k: r for k, r in zip(keys, requests, strict=True) if k not in self._said}
        if len(missing) > _TOGETHER:
            say(f"asking the base {len(missing)} questions")
        for key, text in zip(missing, self._generate(BASE, missing.values()), strict=True):
            self._kept.append({"key": key, "text": text})
            self._said[key] = text
        return [self._said[key] for key in keys]

    def _generate(self, name: str, requests: Iterable[GenerationRequest]) -> Iterator[str]:
        with ThreadPoolExecutor(_TOGETHER) as clients:
            for reply in clients.map(lambda r: self._backend.generate(name, r), requests):
                yield text_of(reply.message)


def _key(request: GenerationRequest) -> str:
    parts = (request.messages, request.tools, request.max_tokens, request.temperature, request.seed)
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
