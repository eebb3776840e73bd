"""Log-probabilities of completions under a model, and by which route it can be trusted with them.

Sums over completion tokens, in natural logs. Which adapter is active, and whether gradients flow,
is the caller's affair.

There are two ways to lay rows out and two to read the model's output. The *oracle* is the plain
layout and the model's own logits; the *fast* route shares prompts and fuses the head with the
log-softmax. Two rows decide at run time, not a list of names, which route gives a model the
oracle's numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.learn import batch as layouts
from agentpref.learn import loss as losses
from agentpref.learn.batch import Batch, Layout
from agentpref.learn.encode import Encoded

if TYPE_CHECKING:
    from torch import Tensor

    from agentpref.learn.kernels.head import Head, Reading

_BENT_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)


class PairLogps(NamedTuple):
    """Sequence log-probs of one row's two completions; of a pair the chosen one comes first."""

    chosen: float
    rejected: float


@dataclass(frozen=True, slots=True)
class Route:
    """A way from rows to log-probs: how they are laid out, and which head reads the states.

    Without a ``head``, the states are the model's own logits.
    """

    name: str
    layout: Layout
    head: Head | None = None

    def cost(self, row: Encoded) -> int:
        """Tokens that a row takes in a forward pass, before padding."""
        shared = self.layout is layouts.shared
        return row.width if shared else row.width + len(row.prompt)

    def states(self, model: Any, batch: Batch) -> Tensor:
        """What predicts each completion token: ``[N, d]`` hidden states, or ``[N, vocabulary]``."""
        inputs = {
            "input_ids": batch.ids,
            "attention_mask": _mask(batch.mask, model.dtype),
            "position_ids": batch.positions,
            "use_cache": False,
        }
        if self.head is None:
            return _own_logits(model, inputs, batch)
        states = _causal(model).base_model(**inputs).last_hidden_state
        return states.flatten(0, 1).index_select(0, batch.where)  # type: ignore[no-any-return]

    def read(
        self,
        states: Tensor,
        batch: Batch,
        *,
        live: Tensor | None = None,
        collision: bool = False,
    ) -> Reading:
        """What the states say of each completion token, live's states beside them for the KL."""
        from agentpref.learn.kernels import head

        if self.head is not None:
            return head.read(states, self.head, batch.targets, live=live, collision=collision)
        logits = states.float()
        return head.Reading(
            logits.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0],
            None if live is None else losses.token_kl(live.float(), logits),
            losses.log_collision(logits.detach()) if collision else None,
        )


ORACLE = Route("plain", layouts.plain)


def passes(
    model: Any, rows: Sequence[Encoded], route: Route, pad: int
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of rows of like cost, as large as the device takes, with the rows' numbers."""
    from agentpref.learn.memory import tokens_per_pass

    most = tokens_per_pass(model)
    order = sorted(range(len(rows)), key=lambda number: route.cost(rows[number]))
    for run in layouts.chunks(order, lambda number: route.cost(rows[number]), most):
        yield run, route.layout([rows[number] for number in run], pad).to(model.device)


def score(
    model: Any,
    rows: Sequence[Encoded],
    *,
    route: Route,
    pad: int,
    progress: Callable[[int], object] | None = None,
) -> list[PairLogps]:
    """Score rows without gradients; ``progress`` is told rows done."""
    import torch

    scores: dict[int, PairLogps] = {}
    with torch.no_grad():
        for run, batch in passes(model, rows, route, pad):
            logps = batch.sums(route.read(route.states(model, batch), batch).logps)
            scores.update(zip(run, starmap(PairLogps, by_row(logps)), strict=True))
            if progress is not None:
                progress(len(scores))
    return [scores[i] for i in range(len(rows))]


def by_row(found: Tensor) -> Iterator[tuple[float, float]]:
    """What was found of a batch's completions, ``[completions]``, two and two of each row."""
    yield from zip(*found.view(2, -1).tolist(), strict=True)


def trusted_route(model: Any, rows: Sequence[Encoded], *, pad: int, longest: int) -> Route:
    """The fastest route that gives this model the oracle's log-probs on two rows.

    These are the longest and the shortest. Models with linear attention, masks of their own or
    logits that are bent afterwards may read shared rows differently or refuse them. ``longest`` is
    the longest sequence that may come: with a sliding window below it, rows are laid out plainly.
    """
    probe = sorted(rows, key=lambda row: row.width)[:: max(1, len(rows) - 1)]
    expected = score(model, probe, route=ORACLE, pad=pad)
    head = _head(model)
    if _reaches_back(model, longest) and _with_our_attention(model):
        route = Route("shared", layouts.shared, head)
        if _is_true(route, model, probe, expected, pad):
            return route
        _causal(model).set_attn_implementation("sdpa")
    route = Route("plain, fused head", layouts.plain, head)
    return route if head and _is_true(route, model, probe, expected, pad) else ORACLE


def known_route(model: Any, name: str) -> Route:
    """The route of this name, which another process with the same model found to be trusted."""
    if name == ORACLE.name:
        return ORACLE
    shared = name == "shared" and _with_our_attention(model)
    return Route(name, layouts.shared if shared else layouts.plain, _head(model))


def _is_true(
    route: Route, model: Any, probe: Sequence[Encoded], expected: Sequence[PairLogps], pad: int
) -> bool:
    """Whether a route gives the oracle's log-probs, to rounding."""
    import torch

    try:
        found = score(model, probe, route=route, pad=pad)
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError):
        return False
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.25
    return torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=tolerance)


def _reaches_back(model: Any, longest: int) -> bool:
    """Whether a token may look back at all before it, in sequences of up to ``longest``."""
    window = getattr(model.config, "sliding_window", None)
    return window is None or window >= longest


def _with_our_attention(model: Any) -> bool:
    """Let a model that uses torch's attention use ours, which is torch's where rows are plain."""
    from agentpref.learn.kernels import attention

    if model.config._attn_implementation == "sdpa":
        attention.register()
        _causal(model).set_attn_implementation(attention.NAME)
    return bool(model.config._attn_implementation == attention.NAME)


def _causal(model: Any) -> Any:
    """The language model inside of whatever adapters it has."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _own_logits(model: Any, inputs: Mapping[str, Any], batch: Batch) -> Tensor:
    """The model's own logits of each completion token, ``[N, vocabulary]``.

    Prompts are most of a row, and logits the largest tensor there is: a model that can be told
    which columns to give them for makes no others.
    """
    import torch

    if "logits_to_keep" not in inspect.signature(_causal(model).forward).parameters:
        return model(**inputs).logits.flatten(0, 1).index_select(0, batch.where)  # type: ignore[no-any-return]
    width = batch.ids.shape[1]
    columns, at = torch.unique(batch.where % width, return_inverse=True)
    logits = model(**inputs, logits_to_keep=columns).logits.flatten(0, 1)
    where = batch.where.div(width, rounding_mode="floor") * len(columns) + at
    return logits.index_select(0, where)  # type: ignore[no-any-return]


def _head(model: Any) -> Head | None:
    """The output layer, if it is a plain one behind which nothing bends the logits."""
    import torch

    from agentpref.learn.kernels.head import Head

    layer = _causal(model).get_output_embeddings()
    bent = any(getattr(model.config, name, None) not in (None, 1.0) for name in _BENT_LOGITS)
    return None if bent or type(layer) is not torch.nn.Linear else Head(layer.weight, layer.bias)


def _mask(mask: Tensor, dtype: Any) -> Tensor:
    """Shared rows' masks are added to scores; the others are left to the model."""
    import torch

    if mask.dim() == 2:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )
