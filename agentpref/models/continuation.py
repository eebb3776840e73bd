"""Continues prompts on a loaded model, token by token.

The evaluation and the in-process engine share these forward passes. ``model.generate`` would apply
the generation settings that come with a base, and servers apply none of them.

Rows of a batch end together, on the right: prompts are padded on the left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from agentpref.models.decoding import Decoding
from agentpref.models.tokenizer import Ids

if TYPE_CHECKING:
    from torch import Tensor


class Continuation:
    """Prompts that are continued together, a row each.

    ``tokens`` and ``positions`` (rows, n) are the input of the next pass. ``mask`` (rows, all
    tokens so far) is 0 for padding, on the left. ``cache`` holds keys and values of the passes
    before.
    """

    def __init__(self, prompts: Sequence[Ids], pad: int, device: Any) -> None:
        import torch

        width = max(map(len, prompts))
        gaps = [width - len(prompt) for prompt in prompts]
        rows = [[pad] * gap + [*prompt] for gap, prompt in zip(gaps, prompts, strict=True)]
        self.tokens = torch.tensor(rows, device=device)
        self.mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps], device=device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.cache: Any = None

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


class Answers(NamedTuple):
    """The tokens of each answer, its end token included, and whether log-probs were finite."""

    tokens: list[Ids]
    finite: bool


Choose: TypeAlias = "Callable[[Tensor, Sequence[int]], Tensor]"
"""Chooses each row's next token, (rows,), from logits, (rows, vocabulary), and whose they are."""


def greedy(model: Any, prompts: Sequence[Ids], decoding: Decoding, *, limit: int) -> Answers:
    """The likeliest token after each prompt, and so on to an end token or to ``limit`` tokens.

    A prompt has room for fewer tokens where the model's positions end.

    Raises:
        GenerationFailed: a prompt leaves no room at all.
    """
    return _continued(model, prompts, decoding, limit, lambda logits, _: logits.argmax(-1))


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

    The draws are the maxima of logits with Gumbel noise, which depends on the seed, the number of
    the prompt and the step alone: two policies that agree draw the same words.
    """
    import torch

    sources = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]

    def choose(logits: Tensor, numbers: Sequence[int]) -> Tensor:
        drawn = [torch.rand(logits.shape[-1], generator=sources[number]) for number in numbers]
        uniform = torch.stack(drawn).clamp_(min=1e-12).to(logits.device)
        return (logits / temperature - (-uniform.log()).log()).argmax(-1)

    return _continued(model, prompts, decoding, limit, choose)


def _continued(
    model: Any, prompts: Sequence[Ids], decoding: Decoding, limit: int, choose: Choose
) -> Answers:
    import torch

    rooms = [decoding.room(prompt, limit) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    going, finite = set(range(len(prompts))), True
    with torch.no_grad():
        for group in _groups(
            model, [len(p) + room for p, room in zip(prompts, rooms, strict=True)]
        ):
            batch = Continuation([prompts[i] for i in group], decoding.pad, model.device)
            while True:
                logits = batch.logits(model)
                asked = [row for row, number in enumerate(group) if number in going]
                finite = finite and bool(logits[asked].amax(-1).isfinite().all())
                chosen = choose(logits, group)
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
    return Answers([tuple(answer) for answer in answers], finite)


def _groups(model: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Which rows may be continued together, by number, given the lengths they may grow to.

    A row that may grow beyond the turning point is continued alone.
    """
    point = turning_point(model)
    together = [i for i, length in enumerate(lengths) if length <= point]
    alone = [[i] for i, length in enumerate(lengths) if length > point]
    return [together, *alone] if together else alone


def turning_point(model: Any) -> float:
    """The length beyond which longrope rotates a whole batch differently; infinity without it."""
    settings = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [settings, *(kind for kind in settings.values() if isinstance(kind, dict))]
    longropes = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((kind["original_max_position_embeddings"] for kind in longropes), default=math.inf)
