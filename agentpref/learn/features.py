"""Features of prompts and answers: what a frozen base model makes of them.

Those of a prompt are the mean state of its tokens in the last layer; and, for critics of
conversations, the state at its end, which the answer begins from. Those of an answer are the
state of that layer once all of the answer but its end has been read, the mean state over its
tokens, and the logarithm of its length, which a mean forgets. A base never changes, so features are
computed once and kept. They are kept in 16 bits, and used as they are kept, so that no score
depends on whether they were known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from agentpref.learn import logps
from agentpref.learn.batch import Batch, Sequences
from agentpref.learn.cache import sequence_key
from agentpref.learn.logps import Route
from agentpref.models.base import BaseModel
from agentpref.models.decoding import Decoding
from agentpref.types import Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_LARGEST = 60_000.0  # what 16 bits hold


class FeatureMemory(Protocol):
    """Where features are kept, by the key of a prompt, or of a completion after its prompt."""

    def find(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        """Those that are known."""

    def keep(self, found: Mapping[str, bytes]) -> None:
        """Keep some more."""


class Features(NamedTuple):
    """The features of a prompt, ``[d]``, and of its n answers, ``[n, 2·d + 1]``, in float32.

    ``turn`` are those at the prompt's end, ``[d]``, where they were asked for.
    """

    prompt: NDArray[Any]
    answers: NDArray[Any]
    turn: NDArray[Any] | None = None


class FeatureReader:
    """Computes features under a base that has no adapter on it.

    Args:
        base: the base model; how it attends may be replaced, see :mod:`agentpref.learn.logps`.
        memory: where features are kept; none unless given.
        turns: whether to read the ends of prompts, too.
    """

    def __init__(
        self, base: BaseModel, *, memory: FeatureMemory | None = None, turns: bool = False
    ) -> None:
        self._base, self._memory, self._turns = base, memory, turns
        self._pad = Decoding.of(base).pad
        self._route: Route | None = None

    def read(self, rows: Sequence[Sequences], progress: Progress | None = None) -> list[Features]:
        """The features of each row; ``progress`` is called with ``("features", done, total)``."""
        import numpy as np

        keys = [_keys(row, turns=self._turns) for row in rows]
        first = 1 + self._turns  # before it are the prompt's own
        known: dict[str, bytes] = {}
        if self._memory is not None:
            known |= self._memory.find([key for own in keys for key in own])
        missing = [n for n, own in enumerate(keys) if not all(key in known for key in own)]
        done = len(rows) - len(missing)
        for run, found in self._compute([rows[n] for n in missing]):
            vectors = {
                key: vector.tobytes()
                for number, own in zip(run, found, strict=True)
                for key, vector in zip(keys[missing[number]], own, strict=True)
            }
            known |= vectors
            if self._memory is not None:
                self._memory.keep(vectors)
            done += len(run)
            if progress is not None:
                progress("features", done, len(rows))

        def of(key: str) -> NDArray[Any]:
            return np.frombuffer(known[key], np.float16).astype(np.float32)

        return [
            Features(
                of(own[0]),
                np.stack([of(key) for key in own[first:]]),
                of(own[1]) if self._turns else None,
            )
            for own in keys
        ]

    def _compute(
        self, rows: Sequence[Sequences]
    ) -> Iterator[tuple[list[int], list[list[NDArray[Any]]]]]:
        """Yield the numbers of each pass's rows, and the features of their prompts and answers."""
        import torch

        if not rows:
            return
        model = self._base.model
        if self._route is None:
            longest = max(row.width for row in rows)
            self._route = logps.choose_route(model, rows, pad=self._pad, longest=longest).route
        with torch.no_grad():
            for run, batch in logps.passes(model, rows, self._route, self._pad):
                states = self._route.hidden(model, batch).float()
                read = states.flatten(0, 1).index_select(0, batch.where)
                answers, ends = _pooled(read, batch), _starts(read, batch)
                found = [
                    # The last token of a prompt lies elsewhere where answers share the prompt.
                    [
                        states[place, : max(1, len(rows[number].prompt) - 1)].mean(0),
                        *([ends[place]] if self._turns else []),
                        *answers[place],
                    ]
                    for place, number in enumerate(run)
                ]
                yield run, [[_packed(vector) for vector in own] for own in found]


def squared_distances(one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """Of each row of the one, ``[m, d]``, from each row of the other, ``[n, d]``: ``[m, n]``."""
    import numpy as np

    squares = (one**2).sum(1)[:, None] + (other**2).sum(1)[None]
    found: NDArray[Any] = np.maximum(squares - 2 * one @ other.T, 0)
    return found


def _keys(row: Sequences, *, turns: bool) -> list[str]:
    sides = zip(row.completions, row.masks, strict=True)
    prompt = sequence_key(row.prompt, ())
    ends = [f"{prompt} end"] if turns else []
    return [prompt, *ends, *(sequence_key(row.prompt, *side) for side in sides)]


def _pooled(states: Tensor, batch: Batch) -> Tensor:
    """The features of each row's completions, ``[rows, n, 2·d + 1]``, from states ``[N, d]``."""
    import torch

    size = batch.n * batch.rows
    counts = batch.owner.bincount(minlength=size)
    sums = states.new_zeros(size, states.shape[1]).index_add(0, batch.owner, states)
    last = states[counts.cumsum(0) - 1]  # the tokens of a completion follow one another
    parts = [last, sums / counts[:, None], counts[:, None].float().log1p()]
    return torch.cat(parts, 1).view(batch.n, batch.rows, -1).transpose(0, 1)


def _starts(states: Tensor, batch: Batch) -> Tensor:
    """The state from which the first completion of each row begins, ``[rows, d]``."""
    counts = batch.owner.bincount(minlength=batch.n * batch.rows)
    return states[(counts.cumsum(0) - counts)[: batch.rows]]


def _packed(vector: Tensor) -> NDArray[Any]:
    packed: NDArray[Any] = vector.clamp(-_LARGEST, _LARGEST).half().cpu().numpy()
    return packed
