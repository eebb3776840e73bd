"""What the log-probs of a batch come to: a loss and a margin for each row, pair or thumb.

Here the settings meet the formulas of loss.py: which loss a pair has, whose noise rate counts, what
each row weighs, and what a thumb is compared with. It is given log-probs and never sees a model, a
batch layout or an optimizer. Rows keep their own terms: means over them are the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from agentpref.config import LossSettings, ThumbSettings
from agentpref.errors import ConfigError
from agentpref.learn import kto
from agentpref.learn import loss as losses
from agentpref.learn.encode import EncodedPair
from agentpref.types import BASE, Origin, Thumb

if TYPE_CHECKING:
    from torch import Tensor

    from agentpref.learn.logps import PairLogps


class LoneThumb(Protocol):
    """An encoded thumb: an answer that was judged, and an answer to another prompt beside it."""

    @property
    def thumb(self) -> Thumb:
        """The judgement."""


class Row(Protocol):
    """An encoded pair or thumb, with the reference log-probs of its two completions.

    The first completion is a pair's chosen answer or a thumb's answer, the second one a pair's
    rejected answer or the answer to another prompt that a thumb's reference point is made of.
    """

    @property
    def encoded(self) -> EncodedPair | LoneThumb:
        """What is trained on."""

    @property
    def reference(self) -> PairLogps:
        """Sequence log-probs of the two under π_0."""


class Judged(NamedTuple):
    """What each row came to, both ``[rows]``: its loss, and its margin in nats, without gradient.

    The margin of a pair is h; that of a thumb is its log-ratio less the reference point, with the
    sign turned where the answer was disliked. Above zero the policy is right.
    """

    loss: Tensor
    margin: Tensor


class _Completions(NamedTuple):
    """Both completions of some rows, ``[2, rows]`` all; ``collision`` as in ``wpo_weight``."""

    logps: Tensor
    ratios: Tensor
    collision: Tensor | None

    def of(self, places: list[int]) -> _Completions:
        """Those of some of the rows."""
        collision = None if self.collision is None else self.collision[:, places]
        return _Completions(self.logps[:, places], self.ratios[:, places], collision)


class Criterion:
    """The loss of a training run, row by row.

    Call it on every pass of a batch and then ``end_batch``: a row comes to the same in whatever
    passes its batch is taken, since what thumbs are compared with stands still until then (kto.py).

    Args:
        settings: what a pair costs.
        thumbs: what a lone thumb costs.
        desirable: how many likes the run trains on, to be balanced with the dislikes.
        undesirable: how many dislikes.
        live: the live revision, whose own answers ``loss.wpo`` leaves alone; ``None`` is the base.
    """

    def __init__(
        self,
        settings: LossSettings,
        thumbs: ThumbSettings,
        *,
        desirable: int,
        undesirable: int,
        live: str | None,
    ) -> None:
        self._settings = settings
        lambdas = kto.balance(thumbs, desirable=desirable, undesirable=undesirable)
        self._thumb_weights = {
            True: thumbs.weight * lambdas.desirable,
            False: thumbs.weight * lambdas.undesirable,
        }
        self._live = BASE if live is None else live
        self._reference_point = kto.ReferencePoint()

    def __call__(
        self, rows: Sequence[Row], logps: Tensor, collision: Tensor | None = None
    ) -> Judged:
        """Judge the rows of one pass.

        Args:
            rows: pairs and thumbs, in any order.
            logps: ``[2·rows]``, sums over tokens: all first completions, then all second ones.
            collision: ``[2·rows]`` in the same order, sums over tokens of ``losses.log_collision``;
                with it ``loss.wpo`` measures answers against what the policy would draw itself.

        Raises:
            ConfigError: for a pair with a noise rate that ``loss.kind`` cannot take.
        """
        completions = _completions(rows, logps, collision)
        pairs: dict[int, EncodedPair] = {}
        thumbs: dict[int, Thumb] = {}
        for place, row in enumerate(rows):
            if isinstance(row.encoded, EncodedPair):
                pairs[place] = row.encoded
            else:
                thumbs[place] = row.encoded.thumb
        parts: list[Judged] = []
        if pairs:
            parts.append(self._pairs(list(pairs.values()), completions.of(list(pairs))))
        if thumbs:
            parts.append(self._thumbs(list(thumbs.values()), completions.of(list(thumbs))))
        return _in_order(parts, [*pairs, *thumbs])

    def seen(self) -> kto.Seen:
        """What this process saw of mismatched answers since the last batch ended."""
        return self._reference_point.seen()

    def end_batch(self, seen: kto.Seen | None = None) -> None:
        """Move the reference point on, once every pass of a batch was judged.

        Processes that share a batch give the sum of what they all have ``seen``.
        """
        self._reference_point.end_batch(seen)

    def state(self) -> dict[str, float]:
        """All that the next batch depends on, to be taken between batches."""
        return self._reference_point.state()

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a state, bit for bit."""
        self._reference_point.restore(state)

    def _pairs(self, pairs: Sequence[EncodedPair], both: _Completions) -> Judged:
        """w·(preference loss) + α·(NLL anchor)."""
        lengths = both.logps.new_tensor(
            [[len(row.chosen) for row in pairs], [len(row.rejected) for row in pairs]]
        )
        weights = both.logps.new_tensor([row.pair.weight for row in pairs])
        if self._settings.wpo:
            weights = weights * self._wpo(pairs, both, lengths)
        alphas = both.logps.new_tensor([self._alpha(row.pair.origin) for row in pairs])
        loss = weights * self._preference(pairs, both.ratios, lengths)
        loss = loss + alphas * losses.nll_anchor(both.logps[0], lengths[0])
        return Judged(loss, (both.ratios[0] - both.ratios[1]).detach())

    def _preference(self, pairs: Sequence[EncodedPair], ratios: Tensor, lengths: Tensor) -> Tensor:
        kind, beta = self._settings.kind, self._settings.beta
        chosen, rejected = losses.per_token(ratios, lengths) if kind == "ipo" else ratios
        margin = chosen - rejected
        if kind in ("ipo", "ipo_sum"):
            return losses.ipo_loss(margin, beta=beta)
        if kind == "hinge":
            return losses.hinge_loss(margin, beta=beta)
        if kind == "apo_zero":
            return losses.apo_zero_loss(chosen, rejected, beta=beta)
        noisy = losses.robust_loss if kind == "robust" else losses.dpo_loss
        return noisy(margin, beta=beta, noise=margin.new_tensor(self._noise(pairs)))

    def _noise(self, pairs: Sequence[EncodedPair]) -> list[float]:
        given = self._settings.noise
        rates = [row.pair.noise if given is None else given for row in pairs]
        worst = max(rates)
        if self._settings.kind == "robust" and worst >= 0.5:
            raise ConfigError(
                f"pair {pairs[rates.index(worst)].pair.pair_id} has a noise rate of {worst}, at "
                "which loss.kind 'robust' divides by zero: set loss.noise, below 0.5, for all "
                "pairs, or loss.kind to 'sigmoid'"
            )
        return rates

    def _alpha(self, origin: Origin) -> float:
        corrected = origin == "correction"
        return self._settings.nll_on_corrections if corrected else self._settings.nll

    def _wpo(self, pairs: Sequence[EncodedPair], both: _Completions, lengths: Tensor) -> Tensor:
        """The product of both answers' weights, 1 for those that the live policy wrote."""
        import torch

        authors = [[row.pair.chosen_by for row in pairs]]
        authors.append([row.pair.rejected_by for row in pairs])
        own = torch.tensor([[author == self._live for author in side] for side in authors])
        collision = 0.0 if both.collision is None else both.collision
        weights = losses.wpo_weight(both.logps, lengths, collision)
        return weights.masked_fill(own.to(weights.device), 1.0).prod(0)

    def _thumbs(self, thumbs: Sequence[Thumb], both: _Completions) -> Judged:
        """λ·(KTO loss); the mismatched completions are noted for later batches and do no more."""
        import torch

        answers, mismatched = both.ratios
        self._reference_point.note(mismatched)
        z0 = self._reference_point.value
        liked = torch.tensor([thumb.desirable for thumb in thumbs], device=answers.device)
        weights = answers.new_tensor([self._thumb_weights[thumb.desirable] for thumb in thumbs])
        loss = losses.kto_loss(answers, liked, beta=self._settings.beta, reference_point=z0)
        margin = losses.kto_margin(answers.detach(), liked, reference_point=z0)
        return Judged(weights * loss, margin)


def _completions(rows: Sequence[Row], logps: Tensor, collision: Tensor | None) -> _Completions:
    reference = logps.new_tensor(
        [[row.reference.chosen for row in rows], [row.reference.rejected for row in rows]]
    )
    both = logps.reshape(2, len(rows))
    collision = None if collision is None else collision.reshape(2, len(rows))
    return _Completions(both, both - reference, collision)


def _in_order(parts: Sequence[Judged], places: Sequence[int]) -> Judged:
    """Put the rows of all parts, one after the other, where ``places`` says that they stood."""
    import torch

    order = sorted(range(len(places)), key=places.__getitem__)
    return Judged(
        torch.cat([part.loss for part in parts])[order],
        torch.cat([part.margin for part in parts])[order],
    )
