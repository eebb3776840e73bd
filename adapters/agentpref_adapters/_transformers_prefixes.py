"""What prompts begin alike with is read once: a system prompt, tools, the turns so far.

A prompt that begins as the one before it did, under the same revision, is read in two parts, which
costs as much as one. The first part is kept, as long as there is room and its revision is loaded,
so all further prompts that begin so are read from there, and longer beginnings, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.models.continuation import Continuation, Prefix
from agentpref.models.tokenizer import Ids
from agentpref_adapters._transformers_adapters import Adapter, Layers, shares_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST = 32
"""So many tokens must be alike: below, a pass of their own takes longer than it saves."""

MOST = 8192
"""So many tokens are kept, of all prefixes together; those that were used last."""


class _Kept(NamedTuple):
    """A prefix under a revision, which ``adapter`` refers to weakly; ``None`` is the base."""

    adapter: Any
    prefix: Prefix


@dataclass
class _Alike:
    """Prompts of one revision that begin alike, by their numbers; one alone is its own tokens."""

    tokens: Ids
    members: list[int]
    alone: bool = True


class Prefixes:
    """The prefixes that were read, the last used one last. For the thread that runs the model."""

    def __init__(self, model: PreTrainedModel, layers: Layers) -> None:
        self._model, self._layers = model, layers
        self._kept: list[_Kept] = []
        self._before: dict[Any, Ids] = {}  # the last prompt, by a reference to its revision
        self._shares = True

    def common(self, prompts: Sequence[tuple[Adapter | None, Ids]]) -> list[Ids]:
        """What to read first of each prompt, as others begin so: some tokens, or none."""
        if not self._shares:
            return [()] * len(prompts)
        self._kept = [one for one in self._kept if one.adapter is None or one.adapter()]
        self._before = {of: ids for of, ids in self._before.items() if of is None or of()}
        found: list[Ids] = []
        groups = {of: [_Alike(ids, [])] for of, ids in self._before.items()}
        for number, (adapter, prompt) in enumerate(prompts):
            reference = _reference(adapter)
            known = (one.prefix.tokens for one in self._kept if one.adapter == reference)
            found.append(max((ids for ids in known if _begins(prompt, ids)), key=len, default=()))
            own = groups.setdefault(reference, [])
            for group in own:
                last = group.alone and bool(group.members)  # of it, too, a token is left to read
                alike = _alike(prompt[:-1], group.tokens[: len(group.tokens) - last])
                enough = len(found[number]) + LEAST
                if not group.alone:  # others would have to read the more by themselves
                    enough = max(enough, len(group.tokens) // 2)
                if alike >= enough:
                    group.tokens, group.alone = prompt[:alike], False
                    group.members.append(number)
                    break
            else:
                own.append(_Alike(prompt, [number]))
            self._before[reference] = prompt
        for group in (group for own in groups.values() for group in own if not group.alone):
            for number in group.members:
                found[number] = group.tokens
        return found

    def read(self, adapter: Adapter | None, tokens: Ids) -> Prefix | None:
        """The keys and values of a prefix; ``None`` if there is none, or none can be kept apart."""
        import torch

        if not tokens:
            return None
        reference = _reference(adapter)
        for number, one in enumerate(self._kept):
            if one.adapter == reference and one.prefix.tokens == tokens:
                self._kept.append(self._kept.pop(number))
                return one.prefix
        known = (one.prefix for one in self._kept if one.adapter == reference)
        begun = (one for one in known if _begins(tokens, one.tokens))
        longest = max(begun, key=lambda one: len(one.tokens), default=None)
        row = Continuation([tokens], 0, self._model.device, longest)
        _, shares = shares_of([adapter])
        with torch.inference_mode(), self._layers.answering(shares, *row.tokens.shape):
            row.logits(self._model)
        self._shares = row.is_plain()
        if not self._shares:
            return None
        prefix = Prefix(tokens, row.cache)
        self._kept.append(_Kept(reference, prefix))
        while _size(self._kept) > MOST and len(self._kept) > 1:
            del self._kept[0]
        return prefix


def _reference(adapter: Adapter | None) -> Any:
    return None if adapter is None else weakref.ref(adapter)


def _begins(prompt: Ids, tokens: Ids) -> bool:
    """Whether a prompt begins with some tokens, and goes on."""
    return len(tokens) < len(prompt) and prompt[: len(tokens)] == tokens


def _alike(prompt: Ids, other: Ids) -> int:
    """How many tokens two prompts begin alike with."""
    most = min(len(prompt), len(other))
    return next((n for n in range(most) if prompt[n] != other[n]), most)


def _size(kept: Iterable[_Kept]) -> int:
    return sum(len(one.prefix.tokens) for one in kept)
