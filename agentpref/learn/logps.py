"""Log-probabilities of completions under a model, by the fastest route that gives true numbers.

Values are sums over completion tokens, in natural logs. The caller chooses the active adapter and
whether gradients flow.

There are two ways to lay out rows and two to read the model's output. The *oracle* is the plain
layout with the model's own logits. The *fast* route shares prompts between completions and fuses
the output layer with the log-softmax. A trial on two rows decides whether a model can take the
fast route, so no list of model names is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from agentpref.learn import batch as layouts
from agentpref.learn.batch import Batch, Layout, Sequences

if TYPE_CHECKING:
    from torch import Tensor

    from agentpref.learn.kernels.head import Head, Reading

Logps: TypeAlias = "tuple[float, ...]"
"""Sequence log-probs of one row: one for each completion, in order."""

_BENT_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True, slots=True)
class Route:
    """A way from rows to log-probs: a layout, and the output layer that reads hidden states.

    Without a ``head``, the states are the model's own logits.
    """

    name: str
    layout: Layout
    head: Head | None = None

    def cost(self, row: Sequences) -> int:
        """Count the tokens that a row takes in a forward pass, before padding."""
        again = 0 if self.layout is layouts.shared else len(row.completions) - 1
        return row.width + again * len(row.prompt)

    def states(self, model: Any, batch: Batch) -> Tensor:
        """Compute what predicts each token: ``[N, d]`` hidden states or ``[N, vocabulary]``."""
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
        self, states: Tensor, batch: Batch, *, live: Tensor | None = None, collision: bool = False
    ) -> Reading:
        """Read log-probs from states; ``live`` are the live policy's states, for the KL."""
        from agentpref.learn.kernels import head

        if self.head is None:
            return head.read_logits(states, batch.targets, live=live, collision=collision)
        return head.read(states, self.head, batch.targets, live=live, collision=collision)


ORACLE = Route("plain", layouts.plain)


def passes(
    model: Any, rows: Sequence[Sequences], route: Route, pad: int
) -> Iterator[tuple[list[int], Batch]]:
    """Yield batches as large as the device takes, each with the numbers of its rows."""
    for run in runs(model, rows, route):
        yield run, route.layout([rows[number] for number in run], pad).to(model.device)


def runs(
    model: Any, rows: Sequence[Sequences], route: Route, *, side_by_side: int = 1
) -> Iterator[list[int]]:
    """Yield the numbers of the rows of each pass that ``side_by_side`` processes share.

    The rows of a pass have about the same cost and the same number of completions. Without the rows
    of the first passes, the others come in the same passes: what was ended goes on to the bit.
    """
    from agentpref.learn.memory import tokens_per_pass

    def cost(number: int) -> int:
        return route.cost(rows[number])

    return layouts.chunks(
        sorted(range(len(rows)), key=cost),
        cost,
        tokens_per_pass(model),
        n=lambda number: len(rows[number].completions),
        side_by_side=side_by_side,
    )


def score(
    model: Any,
    rows: Sequence[Sequences],
    *,
    route: Route,
    pad: int,
    progress: Callable[[int], object] | None = None,
) -> list[Logps]:
    """Score rows without gradients; calls ``progress`` with the number of rows done so far."""
    import torch

    scores: dict[int, Logps] = {}
    with torch.no_grad():
        for run, batch in passes(model, rows, route, pad):
            logps = batch.sums(route.read(route.states(model, batch), batch).logps)
            scores.update(zip(run, map(tuple, logps.tolist()), strict=True))
            if progress is not None:
                progress(len(scores))
    return [scores[number] for number in range(len(rows))]


def trusted_route(model: Any, rows: Sequence[Sequences], *, pad: int, longest: int) -> Route:
    """Find the fastest route that gives this model the oracle's log-probs on two rows.

    These are the shortest and the longest. Models with linear attention, masks of their own or
    logits that they scale or cap may misread shared rows or raise an error on them. ``longest`` is
    the length of the longest sequence to come; a shorter sliding window rules out sharing.
    """
    probe = sorted(rows, key=lambda row: row.width)[:: max(1, len(rows) - 1)]
    expected = score(model, probe, route=ORACLE, pad=pad)
    head = _head(model)
    window = getattr(model.config.get_text_config(), "sliding_window", None) or None
    if (window is None or window >= longest) and _with_our_attention(model):
        route = Route("shared", layouts.shared, head)
        if _is_true(route, model, probe, expected, pad):
            return route
        _causal(model).set_attn_implementation("sdpa")
    route = Route("plain, fused head", layouts.plain, head)
    return route if head and _is_true(route, model, probe, expected, pad) else ORACLE


def known_route(model: Any, name: str) -> Route:
    """Set up the route that another process with the same model found by :func:`trusted_route`."""
    if name == ORACLE.name:
        return ORACLE
    shared = name == "shared" and _with_our_attention(model)
    return Route(name, layouts.shared if shared else layouts.plain, _head(model))


def _is_true(
    route: Route, model: Any, probe: Sequence[Sequences], expected: Sequence[Logps], pad: int
) -> bool:
    """Whether a route gives the oracle's log-probs, to rounding."""
    import torch

    try:
        found = score(model, probe, route=route, pad=pad)
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError):
        return False
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.25
    return all(
        torch.allclose(torch.tensor(own), torch.tensor(true), rtol=1e-4, atol=tolerance)
        for own, true in zip(found, expected, strict=True)
    )


def _with_our_attention(model: Any) -> bool:
    """Switch a model from torch's attention to ours, which reads plain rows with torch's."""
    from agentpref.learn.kernels import attention

    if model.config._attn_implementation == "sdpa":
        attention.register()
        _causal(model).set_attn_implementation(attention.NAME)
    return bool(model.config._attn_implementation == attention.NAME)


def _causal(model: Any) -> Any:
    """The language model inside the adapters, if there are any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _own_logits(model: Any, inputs: Mapping[str, Any], batch: Batch) -> Tensor:
    """The model's own logits of each token that counts, ``[N, vocabulary]``.

    Logits are the largest tensor of a pass, and most columns belong to prompts. A model that takes
    ``logits_to_keep`` computes only the columns that are needed.
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
    """The output layer, if it is a plain linear one whose logits are used as they are."""
    import torch

    from agentpref.learn.kernels.head import Head

    layer = _causal(model).get_output_embeddings()
    settings = model.config.get_text_config()
    bent = any(getattr(settings, name, None) not in (None, 1.0) for name in _BENT_LOGITS)
    return None if bent or type(layer) is not torch.nn.Linear else Head(layer.weight, layer.bias)


def _mask(mask: Tensor, dtype: Any) -> Tensor:
    """The mask a model takes: of shared rows, what is added to scores; else the batch's own."""
    import torch

    if mask.dim() == 2:
        return mask
    return mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
