"""Reads answers to prompts under a frozen base: what is scored when answers are chosen at work."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from agentpref.errors import RewardError
from agentpref.learn.features import FeatureReader, Features
from agentpref.types import Completion, Example, Message, Prompt, Tool

if TYPE_CHECKING:
    from agentpref.models.base import BaseModel


class _Row(NamedTuple):
    """A prompt with answers, as :class:`~agentpref.learn.batch.Sequences`."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    masks: tuple[tuple[bool, ...] | None, ...]

    @property
    def width(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))


class AnswerReader:
    """Reads answers under a base. It may be called from several threads."""

    def __init__(self, base: BaseModel) -> None:
        from agentpref.models.tokenizer import ExampleTokenizer

        self.base = base
        self._tokenizer = ExampleTokenizer(base.template, base.positions or 1 << 30)
        self._reader = FeatureReader(base)
        self._lock = threading.Lock()

    def read(
        self, messages: Sequence[Message], answers: Sequence[Message | str], tools: Sequence[Tool]
    ) -> Features:
        """The features of a prompt and of its answers.

        Raises:
            RewardError: an answer cannot be read under the base.
        """
        with self._lock:
            (features,) = self._reader.read([self._row(messages, answers, tools)])
        return features

    def read_many(self, asked: Sequence[tuple[Prompt, Sequence[Message]]]) -> list[Features | None]:
        """The features of several prompts and their answers, in batches; ``None``: unreadable."""
        found: list[Features | None] = [None] * len(asked)
        readable: dict[int, _Row] = {}
        with self._lock:
            for number, (prompt, answers) in enumerate(asked):
                with suppress(RewardError):
                    readable[number] = self._row(prompt.messages, answers, prompt.tools)
            read = self._reader.read([*readable.values()])
        for number, one in zip(readable, read, strict=True):
            found[number] = one
        return found

    def rank(
        self,
        messages: Sequence[Message],
        answers: Sequence[Message],
        tools: Sequence[Tool],
        score: Callable[[Features], Sequence[float]],
    ) -> list[float]:
        """The scores of answers; −∞ for one that cannot be read.

        Raises:
            RewardError: none of them can be read.
        """
        if not answers:
            return []
        try:
            return [*score(self.read(messages, answers, tools))]
        except RewardError:  # of one of them, perhaps
            found = [-math.inf] * len(answers)
            readable = {}
            for number, answer in enumerate(answers):
                (one,) = self.read_many([(Prompt("", tuple(messages), tuple(tools)), [answer])])
                if one is not None:
                    readable[number] = answer
            if not readable:
                raise
        scores = score(self.read(messages, [*readable.values()], tools))
        for number, value in zip(readable, scores, strict=True):
            found[number] = value
        return found

    def _row(
        self, messages: Sequence[Message], answers: Sequence[Message | str], tools: Sequence[Tool]
    ) -> _Row:
        from agentpref.models.reasons import Objection

        if not answers:
            raise RewardError("there is no answer to read")
        said = [{"role": "assistant", "content": a} if isinstance(a, str) else a for a in answers]
        example = Example(
            "", "", 0.0, Prompt("", tuple(messages), tuple(tools)),
            tuple(Completion(dict(one), 0.0) for one in said), "comparison",
        )  # fmt: skip
        (found,) = self._tokenizer([example])
        if isinstance(found, Objection):
            raise RewardError(f"an answer cannot be read under {self.base.name!r}: {found.reason}")
        return _Row(found.prompt, found.completions, found.masks)
