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
        output = model(
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def append(self, chosen: Tensor) -> None:
        """Continue every row with a token, (rows,)."""
        import torch

        self.tokens, self.positions = chosen[:, None], self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(chosen), 1)], dim=1)


class Answers(NamedTuple):
    """The tokens of each answer, its end token included, and whether log-probs were finite."""

    tokens: list[Ids]
    finite: bool


Choose: TypeAlias = "Callable[[Tensor], Tensor]"
"""Chooses each row's next token, (rows,), from logits, (rows, vocabulary)."""


def greedy(model: Any, prompts: Sequence[Ids], decoding: Decoding, *, limit: int) -> Answers:
    """The likeliest token after each prompt, and so on to an end token or to ``limit`` tokens.

    A prompt has room for fewer tokens where the model's positions end.

    Raises:
        GenerationFailed: a prompt leaves no room at all.
    """
    return _continued(model, prompts, decoding, limit, lambda logits: logits.argmax(-1))


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

    The draws are the maxima of logits with Gumbel noise, which depends on the seed, the row and the
    step alone: two policies that agree draw the same words.
    """
    import torch

    source = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        uniform = torch.rand(logits.shape, generator=source).clamp_(min=1e-12).to(logits.device)
        return (logits / temperature - (-uniform.log()).log()).argmax(-1)

    return _continued(model, prompts, decoding, limit, choose)


def _continued(
    model: Any, prompts: Sequence[Ids], decoding: Decoding, limit: int, choose: Choose
) -> Answers:
    import torch

    rooms = [decoding.room(prompt, limit) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    finite = True
    with torch.no_grad():
        for group in _groups(
            model, [len(p) + room for p, room in zip(prompts, rooms, strict=True)]
        ):
            batch = Continuation([prompts[i] for i in group], decoding.pad, model.device)
            going = list(range(len(group)))
            while going:
                logits = batch.logits(model)
                finite = finite and bool(logits[going].logsumexp(-1).isfinite().all())
                chosen = choose(logits)
                for row, token in enumerate(chosen.tolist()):
                    if row in going:
                        answers[group[row]].append(token)
                going = [
                    row
                    for row in going
                    if answers[group[row]][-1] not in decoding.end_tokens
                    and len(answers[group[row]]) < rooms[group[row]]
                ]
                batch.append(chosen)
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
