"""Log-probabilities of completions under a model, by the fastest route that gives true numbers.

Values are sums over completion tokens, in natural logs. The caller chooses the active adapter and
whether gradients flow.

There are two ways to lay out rows and two to read the model's output. The *oracle* is the plain
layout with the model's own logits. The *fast* route shares prompts between completions and fuses
the output layer with the log-softmax. A trial on a few rows decides whether a model can take the
fast route, so no list of model names is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from agentpref.learn import batch as layouts
from agentpref.learn.batch import Batch, Layout, Sequences

if TYPE_CHECKING:
    from torch import Tensor

    from agentpref.learn.kernels.head import Head, Reading

Logps: TypeAlias = "tuple[float, ...]"
"""Sequence log-probs of one row: one for each completion, in order."""


class Scored(NamedTuple):
    """Log-probs of one row: of its completions, and of the token that decides between two of them.

    The deciding token is the first in which two completions differ: which of them is written hangs
    on it alone. ``deciding`` has NaN where there is none: see :func:`deciding_place`.
    """

    sums: Logps
    deciding: Logps


def deciding_place(row: Sequences) -> int | None:
    """The number of the first token in which a row's two completions differ.

    ``None`` where there are not two, where one begins the other, or where the token does not count.
    Before it both have the same tokens, so what counts before it is the same where masks are.
    """
    if len(row.completions) != 2:
        return None
    one, other = row.completions
    place = next((at for at, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), None)  # noqa: B905
    if place is None:
        return None
    before = [(mask or (True,) * len(one))[: place + 1] for mask in row.masks]
    return place if before[0] == before[1] and before[0][place] else None


def place_among_counted(row: Sequences) -> int | None:
    """The place of the deciding token among the tokens that count."""
    place = deciding_place(row)
    mask = row.masks[0]
    return place if place is None or mask is None else sum(mask[:place])


_PROBED_TOKENS, _PROBED_ROWS = 32, 8
"""Rows for the trial in bfloat16: as few as have this many tokens that count, and at most so many.
"""

_BENT_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True, slots=True)
class Route:
    """A way from rows to log-probs: a layout, and the output layer that reads hidden states.

    Without a ``head``, the states are the model's own logits. ``mixes`` puts float32 around the
    products of a model in bfloat16, which some modules may not take. Log-probs are those of
    sampling at ``temperature``.
    """

    name: str
    layout: Layout
    head: Head | None = None
    mixes: bool = True
    temperature: float = 1.0

    def at(self, temperature: float) -> Route:
        """The same way, for what is sampled at another temperature."""
        bias = None if self.head is None else self.head.bias
        head = self.head
        if head is not None and bias is not None:
            head = head._replace(bias=bias * self.temperature / temperature)
        return replace(self, head=head, temperature=temperature)

    def cost(self, row: Sequences) -> int:
        """Count the tokens that a row takes in a forward pass, before padding."""
        again = 0 if self.layout is layouts.shared else len(row.completions) - 1
        return row.width + again * len(row.prompt)

    def states(self, model: Any, batch: Batch) -> Tensor:
        """Compute what predicts each token: ``[N, d]`` hidden states or ``[N, vocabulary]``."""
        if self.head is not None:
            return self.hidden(model, batch).flatten(0, 1).index_select(0, batch.where)
        with self._mixed(model):
            return _own_logits(model, _inputs(model, batch), batch)

    def hidden(self, model: Any, batch: Batch) -> Tensor:
        """Compute the last layer's states, ``[sequences, T, d]``."""
        with self._mixed(model):
            return _causal(model).base_model(**_inputs(model, batch)).last_hidden_state  # type: ignore[no-any-return]

    def _mixed(self, model: Any) -> AbstractContextManager[object]:
        from agentpref.learn.precision import mixed

        return mixed(model) if self.mixes else nullcontext()

    def read(
        self, states: Tensor, batch: Batch, *, live: Tensor | None = None, collision: bool = False
    ) -> Reading:
        """Read log-probs from states; ``live`` are the live policy's states, for the KL."""
        from agentpref.learn.kernels import head

        if self.temperature != 1.0:  # logits are linear in states
            states = states / self.temperature
            live = None if live is None else live / self.temperature
        if self.head is None:
            return head.read_logits(states, batch.targets, live=live, collision=collision)
        return head.read(states, self.head, batch.targets, live=live, collision=collision)


ORACLE = Route("plain", layouts.plain)
UNMIXED = Route("plain, unmixed", layouts.plain, mixes=False)


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
    return [one.sums for one in score_whole(model, rows, route=route, pad=pad, progress=progress)]


def score_whole(
    model: Any,
    rows: Sequence[Sequences],
    *,
    route: Route,
    pad: int,
    progress: Callable[[int], object] | None = None,
) -> list[Scored]:
    """As :func:`score`, with the log-probs of deciding tokens."""
    import torch

    scores: dict[int, Scored] = {}
    with torch.no_grad():
        for run, batch in passes(model, rows, route, pad):
            logps = route.read(route.states(model, batch), batch).logps
            own = [rows[number] for number in run]
            scores.update(zip(run, scored(own, batch, logps), strict=True))
            if progress is not None:
                progress(len(scores))
    return [scores[number] for number in range(len(rows))]


def scored(rows: Sequence[Sequences], batch: Batch, logps: Tensor) -> list[Scored]:
    """The scores of the rows of one pass, from the log-probs of its tokens, ``[N]``."""
    sums = map(tuple, batch.sums(logps).tolist())
    deciding = batch.pick(logps, [place_among_counted(row) for row in rows])
    return list(map(Scored, sums, deciding))


@dataclass(frozen=True, slots=True)
class Choice:
    """The route that was chosen for a model, and why.

    ``errors`` are the rounding errors of the routes tried, by name: root mean squares of the
    differences to the same model in float32, in nats a token. A model in float32 has none.
    """

    route: Route
    reason: str
    errors: dict[str, float] = field(default_factory=dict)


def choose_route(model: Any, rows: Sequence[Sequences], *, pad: int, longest: int) -> Choice:
    """Choose the fastest route that gives this model the log-probs of its own modules.

    Models with linear attention, masks of their own or logits that they scale or cap may misread
    shared rows or raise an error on them. ``longest`` is the length of the longest sequence to
    come; a shorter sliding window rules out sharing.
    """
    trial = _Trial(model, rows, pad)
    for route in _candidates(model, longest, trial.objections):
        if trial.passes(route):
            return trial.choice(route)
    return trial.choice(ORACLE if trial.errors or not trial.rounds else UNMIXED)


def _candidates(model: Any, longest: int, objections: list[str]) -> Iterator[Route]:
    """The routes to try, the fastest first; the model is set up for the last one given."""
    head = _head(model)
    window = getattr(model.config.get_text_config(), "sliding_window", None) or None
    if window is not None and window < longest:
        objections.append(f"the model's window of {window} tokens is shorter than {longest}")
    elif not _with_our_attention(model):
        objections.append("the model's attention cannot be replaced")
    else:
        yield Route("shared", layouts.shared, head)
        _causal(model).set_attn_implementation("sdpa")
    if head:
        yield Route("plain, fused head", layouts.plain, head)


class _Trial:
    """Routes tried on a few rows, against the model's own modules in float32.

    In float32 the log-probs of a right route are the same, so nothing hides a wrong one. These
    rows are the shortest and the longest, and in bfloat16 some more. There a route must also round
    no worse than the oracle, as far as these rows can tell.
    """

    def __init__(self, model: Any, rows: Sequence[Sequences], pad: int) -> None:
        from agentpref.learn.kernels.fuse import unfused

        self.rounds = model.dtype.itemsize < 4
        self.objections: list[str] = []
        self.errors: dict[str, float] = {}
        self._model, self._pad = model, pad
        self._rows = _probe(rows, _PROBED_TOKENS if self.rounds else 0)
        with unfused(model):
            self._true = self._logps(ORACLE, exactly=True)
        if self.rounds:
            self._measure(ORACLE)

    def passes(self, route: Route) -> bool:
        """Whether a route gives the log-probs of the model's own modules, to rounding."""
        import torch

        found = self._logps(route, exactly=True)
        if found is None or self._true is None:
            return False
        sums, true = (torch.stack([x.sum() for x in each]) for each in (found, self._true))
        if not torch.allclose(sums, true, rtol=1e-4, atol=1e-3):
            apart = float((sums - true).abs().max())
            self.objections.append(f"{route.name}: wrong by {apart:.2g} nats in float32")
            return False
        return not self.rounds or self._rounds_no_worse(route)

    def choice(self, route: Route) -> Choice:
        """The choice of a route, by all that was found."""
        reason = "; ".join(self.objections) or "it gives the log-probs of the model's own modules"
        return Choice(route, reason, self.errors)

    def _rounds_no_worse(self, route: Route) -> bool:
        """Whether a route's rounding error is the oracle's, as far as the tokens can tell.

        The ratio of two root mean squares of N values each that are alike has a standard deviation
        of 1/√N: four of them are allowed, and a half more than the oracle's error.
        """
        self._measure(route)
        if route.name not in self.errors or ORACLE.name not in self.errors:
            return False
        tokens = sum(len(logps) for logps in self._true or ())
        own, most = self.errors[route.name], self.errors[ORACLE.name] * (1.5 + 4 / tokens**0.5)
        if not own <= most:
            self.objections.append(
                f"{route.name}: rounds by {own:.2g} nats a token, more than {most:.2g}"
            )
        return bool(own <= most)

    def _measure(self, route: Route) -> None:
        """Store the rounding error of a route, if it can be measured."""
        import torch

        found = self._logps(route)
        if found is not None and self._true is not None:
            apart = torch.cat(found) - torch.cat(self._true)
            self.errors[route.name] = float(apart.square().mean().sqrt())

    def _logps(self, route: Route, *, exactly: bool = False) -> list[Tensor] | None:
        """Log-probs of each completion's tokens, row by row; ``None`` if the model raises."""
        import torch

        from agentpref.learn.precision import exact

        found: dict[int, list[Tensor]] = {}
        try:
            with torch.no_grad(), exact(self._model) if exactly else nullcontext():
                # By twos: rows beside one another show padding, and more logits would fill memory.
                for two in range(0, len(self._rows), 2):
                    rows = self._rows[two : two + 2]
                    for run, batch in passes(self._model, rows, route, self._pad):
                        logps = route.read(route.states(self._model, batch), batch).logps.double()
                        parts = [logps[batch.owner == at] for at in range(batch.n * batch.rows)]
                        for at, row in enumerate(run):
                            found[two + row] = parts[at :: batch.rows]
        except (ValueError, RuntimeError, TypeError, IndexError, AttributeError) as error:
            where = " in float32" if exactly and self.rounds else ""
            what = str(error).strip().partition("\n")[0]
            self.objections.append(f"{route.name}{where}: {type(error).__name__}: {what}")
            return None
        return [logps for row in sorted(found) for logps in found[row]]


def _probe(rows: Sequence[Sequences], tokens: int) -> list[Sequences]:
    """The shortest and the longest row, and as many between as hold so many tokens that count."""
    ordered = sorted(rows, key=lambda row: row.width)
    picked: list[Sequences] = ordered[:1]
    for count in range(2, min(len(ordered), _PROBED_ROWS) + 1):
        picked = [ordered[at * (len(ordered) - 1) // (count - 1)] for at in range(count)]
        if sum(map(_counted, picked)) >= tokens:
            break
    return picked


def _counted(row: Sequences) -> int:
    sides = zip(row.completions, row.masks, strict=True)
    return sum(len(ids) if mask is None else sum(mask) for ids, mask in sides)


def known_route(model: Any, name: str) -> Route:
    """Set up the route that another process with the same model found by :func:`choose_route`."""
    if name in (ORACLE.name, UNMIXED.name):
        return ORACLE if name == ORACLE.name else UNMIXED
    shared = name == "shared" and _with_our_attention(model)
    return Route(name, layouts.shared if shared else layouts.plain, _head(model))


def _with_our_attention(model: Any) -> bool:
    """Switch a model from torch's attention to ours, which reads plain rows with torch's."""
    from agentpref.learn.kernels import attention

    if model.config._attn_implementation == "sdpa":
        attention.register()
        _causal(model).set_attn_implementation(attention.NAME)
    return bool(model.config._attn_implementation == attention.NAME)


def _inputs(model: Any, batch: Batch) -> dict[str, Any]:
    return {
        "input_ids": batch.ids,
        "attention_mask": _mask(batch.mask, model.dtype),
        "position_ids": batch.positions,
        "use_cache": False,
    }


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
