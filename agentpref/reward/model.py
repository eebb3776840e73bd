"""A reward model at work: scores answers to a prompt."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.errors import ConfigError, RewardError, WrongBase
from agentpref.home import Home
from agentpref.reward.heads import Heads
from agentpref.reward.kept import Shelf
from agentpref.serve import decisions
from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.types import Message, Prompt, Tool

if TYPE_CHECKING:
    from agentpref.learn.answer_reader import AnswerReader
    from agentpref.learn.features import Features
    from agentpref.models.base import BaseModel


class Score(NamedTuple):
    """What a reward model gives an answer, in log-odds.

    Of several answers to a prompt, scores are differences from their mean: σ(a − b) is the
    probability that a is better. That of one answer alone compares with another one's to the same
    prompt. ``mean`` and
    ``variance`` are over the heads; ``lower`` is mean − variance, which an answer that is only good
    by one head does not reach.
    """

    mean: float
    variance: float

    @property
    def lower(self) -> float:
        """mean − variance."""
        return self.mean - self.variance


@dataclass(frozen=True)
class RewardModel:
    """A namespace's reward model, with its base. It may be called from several threads.

    ``name`` is under what the home keeps it, and ``about`` what its fit reported.
    """

    name: str
    path: Path
    heads: Heads
    about: Mapping[str, Any]
    reader: AnswerReader

    @property
    def base(self) -> BaseModel:
        """The base that reads answers."""
        return self.reader.base

    def score(
        self,
        messages: Sequence[Message],
        answers: Sequence[Message | str],
        *,
        tools: Sequence[Tool] = (),
        length_controlled: bool = False,
    ) -> list[Score]:
        """Score answers to one prompt.

        Args:
            messages: the prompt.
            answers: one or more.
            tools: what was offered.
            length_controlled: leave out how scores go with length, among several answers.

        Raises:
            RewardError: the model was deleted from the home since, or an answer cannot be read
                under its base.
        """
        self._require_kept()
        if not answers:
            return []
        features = self.reader.read(messages, answers, tools)
        several = len(answers) > 1
        return self._scores(
            features, several=several, length_controlled=length_controlled and several
        )

    def _require_kept(self) -> None:
        if not self.path.exists():
            raise RewardError(
                f"{self.name} was deleted, by a removal or newer models; open the reward model of "
                "the namespace again (`agentpref reward fit` fits one)"
            )

    def _scores(
        self, features: Features, *, several: bool, length_controlled: bool = False
    ) -> list[Score]:
        """Of ``several`` answers, differences from the mean of those that can be read."""
        import numpy as np

        rewards = self.heads.rewards(
            features.prompt, features.answers, length_controlled=length_controlled
        )
        if several:
            rewards = rewards - rewards.mean(0)
        return [Score(float(np.mean(own)), float(np.var(own))) for own in rewards]

    def features(self, asked: Sequence[tuple[Prompt, Sequence[Message]]]) -> list[Features | None]:
        """What its base makes of answers to prompts, in batches; ``None`` where it reads none."""
        return self.reader.read_many(asked)

    def scorer(self, messages: Sequence[Message], answer: str) -> float:
        """The score of one answer: a scorer for ``agentpref.update(scorers=…)``.

        It compares with that of another answer to the same prompt, as the gate does.
        """
        return self.score(messages, [answer])[0].mean

    def rank(self, request: GenerationRequest, replies: Sequence[Reply]) -> list[float]:
        """The lower bounds of the scores of several replies: what best-of-N chooses by.

        An answer that cannot be read under the base has −∞.

        Raises:
            RewardError: none of them can be read.
        """
        self._require_kept()
        return self.reader.rank(
            request.messages,
            [one.message for one in replies],
            request.tools,
            lambda features: [one.lower for one in self._scores(features, several=True)],
        )


def open_reward(
    home: Home | str | Path | None,
    *,
    namespace: str = "default",
    name: str | None = None,
    model: str | None = None,
) -> RewardModel:
    """Open a namespace's reward model, the newest one unless it is named.

    Args:
        home: a home or its folder; ``None`` means ``AGENTPREF_HOME`` or ``./.agentpref``.
        namespace: whose.
        name: as ``agentpref reward list`` shows it.
        model: where its base is; by default the name that it was fitted with.

    Raises:
        RewardError: there is none, or its file was changed.
        WrongBase: the base is another one than it was fitted on.
        Everything that loading a model raises.
    """
    from agentpref.learn.answer_reader import AnswerReader
    from agentpref.models.base import load_base

    kept = Shelf(Home.open(home), namespace).read(name)
    trained_on, heads = kept.about["base"], Heads.from_arrays(kept.arrays)
    base = load_base(
        model or trained_on["name"],
        precision=kept.about["precision"],
        chat_template_kwargs=trained_on.get("chat_template_kwargs", {}),
    )
    if decisions.digests_of(trained_on) != decisions.digests_of(base.identity):
        raise WrongBase(
            f"{kept.name} was fitted on {trained_on['name']!r}, whose weights or chat template are "
            f"not those of {base.name!r}; name its base, or fit it again"
        )
    return RewardModel(kept.name, kept.path, heads, kept.about, AnswerReader(base))


class RewardFollower:
    """The newest reward model of a namespace: each ranking is by what is newest then.

    Args:
        home: the home.
        namespace: whose.
        model: where its base is; by default the name that it was fitted with.
    """

    def __init__(
        self,
        home: Home | str | Path | None,
        *,
        namespace: str = "default",
        model: str | None = None,
    ) -> None:
        self._shelf, self._model = Shelf(Home.open(home), namespace), model
        self._opened: RewardModel | None = None
        self._lock = threading.Lock()

    def rank(self, request: GenerationRequest, replies: Sequence[Reply]) -> list[float]:
        """As :meth:`RewardModel.rank`.

        Raises:
            RewardError: there is no reward model, or an answer cannot be read under its base.
        """
        names = self._shelf.names()
        with self._lock:
            if self._opened is None or names[-1:] != [self._opened.name]:
                self._opened = open_reward(
                    self._shelf.home, namespace=self._shelf.namespace, model=self._model
                )
        return self._opened.rank(request, replies)


def kl_of_best(n: int) -> float:
    """KL(best of n ‖ one sample) in nats: log n − (n − 1)/n.

    Exact where no two samples score alike, else an upper bound (2401.01879).

    >>> round(kl_of_best(4), 3)
    0.636
    """
    if n < 1:
        raise ConfigError(f"n is {n}, but must be 1 or more")
    return math.log(n) - (n - 1) / n
