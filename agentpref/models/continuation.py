"""Continues prompts on a loaded model, token by token.

The evaluation and the in-process engine share these forward passes. ``model.generate`` would apply
the generation settings that come with a base, and servers apply none of them.

Rows of a batch end together, on the right: prompts are padded on the left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.models.decoding import Decoding
from agentpref.models.tokenizer import Ids

if TYPE_CHECKING:
    from torch import Tensor

_TOGETHER = 1 << 16
"""How many tokens the rows of a batch may grow to, together: 1.5 GB of SmolLM2's keys and values,
8 GB of those of an 8 B model."""


class Prefix(NamedTuple):
    """The first tokens of some prompts, and a plain cache of one row with their keys and values."""

    tokens: Ids
    cache: Any


class Continuation:
    """Prompts that are continued together, a row each; all may begin with a ``prefix``.

    ``tokens`` and ``positions`` (rows, n) are the input of the next pass. ``mask`` (rows, all
    tokens so far) is 0 for padding, on the left. ``cache`` holds keys and values of the passes
    before.
    """

    def __init__(
        self, prompts: Sequence[Ids], pad: int, device: Any, prefix: Prefix | None = None
    ) -> None:
        import torch

        known = 0 if prefix is None else len(prefix.tokens)
        width = max(map(len, prompts)) - known
        gaps = [width + known - len(prompt) for prompt in prompts]
        rows = [[pad] * gap + [*prompt[known:]] for gap, prompt in zip(gaps, prompts, strict=True)]
        self.tokens = torch.tensor(rows, device=device)
        self.mask = torch.tensor(
            [[1] * known + [0] * gap + [1] * (width - gap) for gap in gaps], device=device
        )
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, known:]
        self.cache: Any = None if prefix is None else _repeated(prefix.cache, len(prompts))

    def logits(self, model: Any) -> Tensor:
        """Run one forward pass; the logits of each row's next token, (rows, vocabulary)."""
        import torch

        # By its number, the last state is taken out as a copy. A slice lies in strides, for which
        # torch multiplies by a copy of the head's weight for each row: gigabytes and seconds.
        last = torch.tensor([self.tokens.shape[1] - 1], device=self.tokens.device)
        output = model(
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last,
        )
        self.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def append(self, chosen: Tensor) -> None:
        """Continue every row with a token, (rows,)."""
        import torch

        self.tokens, self.positions = chosen[:, None], self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(chosen), 1)], dim=1)

    def is_plain(self) -> bool:
        """Whether the cache holds just (rows, heads, tokens, size) of keys and values per layer.

        Others (sliding windows, linear attention) cannot be cut or joined.
        """
        from transformers.cache_utils import DynamicCache, DynamicLayer

        layers = self.cache.layers if type(self.cache) is DynamicCache else [None]
        return all(type(layer) is DynamicLayer for layer in layers)

    def keep(self, order: Sequence[int]) -> None:
        """Continue with these rows, in this order, and drop padding that all of them have.

        The cache must be plain.
        """
        import torch

        rows = torch.tensor(order, device=self.mask.device)
        mask = self.mask.index_select(0, rows)
        begin = int(mask.argmax(-1).min())  # where the first of the rows begins
        for layer in self.cache.layers:
            on_device = rows.to(layer.keys.device)
            layer.keys = layer.keys[:, :, begin:].index_select(0, on_device)
            layer.values = layer.values[:, :, begin:].index_select(0, on_device)
        self.mask = mask[:, begin:]
        self.tokens = self.tokens.index_select(0, rows)
        self.positions = self.positions.index_select(0, rows)


def _repeated(cache: Any, rows: int) -> Any:
    """A plain cache of one row for several; nothing is copied before the next pass adds to it."""
    from transformers.cache_utils import DynamicCache

    found = DynamicCache()
    for number, layer in enumerate(cache.layers):
        keys, values = (one.expand(rows, -1, -1, -1) for one in (layer.keys, layer.values))
        found.update(keys, values, number)
    return found


class Ask(NamedTuple):
    """A prompt to answer in at most ``limit`` tokens: the likeliest ones, or drawn ones.

    At a ``temperature`` above 0 tokens are drawn. The draws are the maxima of logits with Gumbel
    noise, which depends on the seed and the step alone: two policies that agree draw the same
    words, whatever is answered beside them.
    """

    prompt: Ids
    limit: int
    temperature: float = 0.0
    seed: int = 0


class Answers(NamedTuple):
    """The tokens of each answer, its end token included, and whether log-probs were finite."""

    tokens: list[Ids]
    finite: bool


def greedy(model: Any, prompts: Sequence[Ids], decoding: Decoding, *, limit: int) -> Answers:
    """The likeliest token after each prompt, and so on to an end token or to ``limit`` tokens.

    A prompt has room for fewer tokens where the model's positions end.

    Raises:
        GenerationFailed: a prompt leaves no room at all.
    """
    return answered(model, [[Ask(prompt, limit) for prompt in prompts]], decoding)[0]


def sampled(
    model: Any,
    prompts: Sequence[Ids],
    decoding: Decoding,
    *,
    limit: int,
    temperature: float,
    seed: int,
) -> Answers:
    """Answers as :func:`greedy` gives them, but drawn at a temperature above 0.

    Each prompt has a seed of its own, by its number.
    """
    asks = [Ask(prompt, limit, temperature, seed + n) for n, prompt in enumerate(prompts)]
    return answered(model, [asks], decoding)[0]


def answered(model: Any, sets: Sequence[Sequence[Ask]], decoding: Decoding) -> list[Answers]:
    """The answers to several sets, all of them together: a pass takes hardly longer for more rows.

    Raises:
        GenerationFailed: a prompt leaves no room at all.
    """
    import torch

    asks = [ask for own in sets for ask in own]
    rooms = [decoding.room(ask.prompt, ask.limit) for ask in asks]
    answers: list[list[int]] = [[] for _ in asks]
    going, finite = set(range(len(asks))), [True] * len(asks)
    drawn = _Draws(asks)
    with torch.no_grad():
        for group in _groups(
            model, [len(ask.prompt) + room for ask, room in zip(asks, rooms, strict=True)]
        ):
            batch = Continuation([asks[i].prompt for i in group], decoding.pad, model.device)
            while True:
                logits = batch.logits(model)
                for number, is_finite in zip(
                    group, logits.amax(-1).isfinite().tolist(), strict=True
                ):
                    finite[number] &= is_finite or number not in going
                chosen = drawn(logits, group)
                for number, token in zip(group, chosen.tolist(), strict=True):
                    if number in going:
                        answers[number].append(token)
                        if token in decoding.end_tokens or len(answers[number]) == rooms[number]:
                            going.remove(number)
                left = [row for row, number in enumerate(group) if number in going]
                if not left:
                    break
                batch.append(chosen)
                if len(left) < len(group) and batch.is_plain():
                    batch.keep(left)
                    group = [group[row] for row in left]
                if decoding.positions is not None:  # rows that have ended wait at the last one
                    batch.positions.clamp_(max=decoding.positions - 1)
    found, begin = list[Answers](), 0
    for own in sets:
        end = begin + len(own)
        found.append(Answers([*map(tuple, answers[begin:end])], all(finite[begin:end])))
        begin = end
    return found


class _Draws:
    """Chooses the next token of rows from their logits, each as it was asked."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        import torch

        self._temperatures = [ask.temperature for ask in asks]
        self._sources = {
            number: torch.Generator().manual_seed(ask.seed)
            for number, ask in enumerate(asks)
            if ask.temperature
        }

    def __call__(self, logits: Tensor, numbers: Sequence[int]) -> Tensor:
        """The tokens, (rows,), from (rows, vocabulary), and the number of what each row answers."""
        import torch

        rows = [row for row, number in enumerate(numbers) if number in self._sources]
        chosen = logits.argmax(-1)
        if rows:
            own = [numbers[row] for row in rows]
            drawn = [torch.rand(logits.shape[-1], generator=self._sources[n]) for n in own]
            uniform = torch.stack(drawn).clamp_(min=1e-12).to(logits.device)
            heat = logits.new_tensor([self._temperatures[n] for n in own])[:, None]
            chosen[rows] = (logits[rows] / heat - (-uniform.log()).log()).argmax(-1)
        return chosen


def _groups(model: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Which rows are continued together, by number, given the lengths they may grow to.

    All rows of a group take as much memory as its longest. A row that may grow beyond the turning
    point is continued alone.
    """
    point, groups = turning_point(model), list[list[int]]()
    for number in sorted((n for n, length in enumerate(lengths) if length <= point),
                         key=lambda n: lengths[n]):  # fmt: skip
        if not groups or (len(groups[-1]) + 1) * lengths[number] > _TOGETHER:
            groups.append([])
        groups[-1].append(number)
    groups = [sorted(group) for group in groups]
    return groups + [[number] for number, length in enumerate(lengths) if length > point]


def turning_point(model: Any) -> float:
    """The length beyond which longrope rotates a whole batch differently; infinity without it."""
    settings = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [settings, *(kind for kind in settings.values() if isinstance(kind, dict))]
    longropes = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((kind["original_max_position_embeddings"] for kind in longropes), default=math.inf)
