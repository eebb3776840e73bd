"""Losses: from log-probabilities of completions to one number per example.

Each loss is one file and registers by name (entry point group ``agentpref.losses``), so a new loss
is one new file, here or in another package. ``loss.kind`` names the loss of examples with several
completions, ``thumbs.kind`` that of lone examples.

Log-probabilities are natural logs, summed over the tokens of a completion. A *log-ratio* is
log[π_θ/π_0](y), the policy against the base model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from agentpref import plugins

if TYPE_CHECKING:
    from torch import Tensor

    from agentpref.config import UpdateConfig
    from agentpref.types import Example


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The examples of one forward pass, all with n completions, and their log-probabilities.

    ``policy``, ``reference``, ``lengths`` (tokens that count) and, where they were asked for,
    ``live`` and ``collision`` are ``[examples, n]``, in the order of ``Example.completions``. Only
    ``policy`` carries a gradient. ``collision`` sums log Σ_v π_θ(v)² over a completion's tokens.
    ``mismatched`` holds, for lone examples, the log-ratio of an answer to another prompt,
    ``[examples]``.
    """

    examples: Sequence[Example]
    policy: Tensor
    reference: Tensor
    lengths: Tensor
    live: Tensor | None = None
    collision: Tensor | None = None
    mismatched: Tensor | None = None

    @property
    def ratios(self) -> Tensor:
        """Log-ratios against the base, ``[examples, n]``."""
        return self.policy - self.reference


class LossOutput(NamedTuple):
    """What each example came to, both ``[examples]``.

    ``margin`` is in nats and carries no gradient; the policy is right where it is above 0.
    """

    loss: Tensor
    margin: Tensor


class Loss:
    """The base of every loss.

    A loss is made once for a training run and called on every pass of a batch; then
    :meth:`end_batch` is called. State changes only there, so an example comes to the same in
    whatever passes its batch is taken. A loss without state overrides ``__call__`` alone.

    Args:
        config: the settings of the update.
        examples: all that the run trains.
        live: the revision that training starts from (``"base"`` for the base model).
    """

    lone: ClassVar[bool] = False
    """Whether the loss is for examples with a single completion (``thumbs.kind``)."""

    reads: ClassVar[frozenset[str]] = frozenset()
    """The settings of the group ``loss`` that the loss reads; a change of others is refused."""

    needs_live: ClassVar[bool] = False
    """Whether the loss reads ``LossInputs.live``, which costs a scoring pass per example."""

    def __init__(self, config: UpdateConfig, examples: Sequence[Example], live: str) -> None:
        self.config, self.live = config, live

    @property
    def needs_collision(self) -> bool:
        """Whether the loss reads ``LossInputs.collision``."""
        return False

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Compute the loss of the examples of one pass."""
        raise NotImplementedError

    def seen(self) -> tuple[float, ...]:
        """Numbers gathered since the last batch ended, to be summed over processes."""
        return ()

    def end_batch(self, seen: Sequence[float]) -> None:
        """Take in what all processes have ``seen`` of the batch, once all its passes are done."""

    def state(self) -> dict[str, float]:
        """All that the next batch depends on."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from a :meth:`state`, bit for bit."""


def load_loss(name: str) -> type[Loss]:
    """The loss that is registered under a name; ``ConfigError`` if there is none."""
    return plugins.load_subclass(plugins.LOSSES, name, Loss)
