"""Tests whether one rate of likes is below another, valid however often anybody looks.

Each test gives an e-value: what a bet of 1 that the rate is lower has become. If it is not lower,
the bet grows in no way on average, so its chance of ever reaching 1/α is at most α (Ville): one may
look after every vote, and stop when one likes. Each vote counts as a coin of its own.

There are two tests, for the two ways to come by votes:

- *in time*: those of the predecessor, which are all there, and those of what serves now, which come
  in. It holds for every rate that the predecessor may have had: the least favourable one counts.
  Users whose mood changes look to it like a revision that is worse.
- *together*: those of two revisions that serve at the same time. It compares votes in small blocks
  of neighbours, and holds whatever becomes of the rate that both share from one block to the next.

Swap likes for dislikes (:meth:`Rate.disliked`) to test whether a rate is above another. The
functions are pure, and need nothing but ``math``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import exp, expm1, log, log1p, sqrt
from typing import NamedTuple

DROPS = ((0.1, 0.05), (0.25, 0.1), (0.5, 0.7), (1.0, 0.1), (2.0, 0.05))
"""How much lower the rate may be, in log-odds, and the share of the bet on it.

From .80, these are drops to .78, .76, .71, .60 and .35: one of ten points is found soonest.
"""

_ABOVE = (1.0, 2.0, 4.0)
"""How far above an assumed rate the predecessor's may be, in its standard errors."""

BLOCK = 5
"""How many votes of either revision a block has at least; shorter ones waste what is left over."""

_KEPT = 0.1
"""The share that does not bet on the new votes. Where they are many, and their rate is known better
than the predecessor's, the proof is that of the predecessor's votes, against rates next to theirs.
"""

_VARIANCE = 0.2  # of one vote, where one in four is a dislike
_HALVINGS = 40
_LARGEST = 700.0


class Rate(NamedTuple):
    """How many votes are likes, of how many."""

    likes: int
    votes: int

    def disliked(self) -> Rate:
        """The votes that are dislikes."""
        return Rate(self.votes - self.likes, self.votes)


def e_value(log_e: float) -> float:
    """An e-value by its logarithm, cut where a float would overflow."""
    return exp(min(log_e, _LARGEST))


def lower_in_time(before: Rate, now: Rate, *, margin: float = 0.0) -> float:
    """Test whether a rate is more than a margin below that of the predecessor.

    For every q, the likes of the predecessor bet that its rate is above q, and the new votes that
    theirs is below q - margin. At the predecessor's own rate the product of both bets is an
    e-process, unless the new rate is lower. So the smallest product over all q counts. Each bet is
    a mixture of e^(θ·likes) / (1 - q + q·e^θ)^votes, whose logarithm is convex in q, and so is that
    of the product: its smallest value is found by halving.

    Args:
        before: the predecessor's votes, all of them given before the first of ``now``.
        now: the votes since.
        margin: how much lower is not lower yet, from 0 to below 1.

    Returns:
        The logarithm of the e-value; 0 and less are no evidence.
    """
    if not before.votes or not now.votes:
        return 0.0
    error = sqrt(_VARIANCE * before.votes)
    above = [_Bet(log(1 / len(_ABOVE)), c / error, before) for c in _ABOVE]
    below = [_Bet(log((1 - _KEPT) * weight), -drop, now) for drop, weight in DROPS]
    below.append(_Bet(log(_KEPT), 0.0, now))
    low, high = margin, 1.0
    for _ in range(_HALVINGS):
        q = (low + high) / 2
        if _mixed(above, q)[1] + _mixed(below, q - margin)[1] > 0:
            high = q
        else:
            low = q
    q = (low + high) / 2
    return _mixed(above, q)[0] + _mixed(below, q - margin)[0]


class _Bet(NamedTuple):
    """A bet on votes: its share, as a logarithm, its tilt θ of the log-odds, and the votes."""

    share: float
    tilt: float
    rate: Rate

    def log_wealth(self, q: float) -> tuple[float, float]:
        """What it has become against a rate q, as a logarithm, and the slope of that in q."""
        step = expm1(self.tilt)
        likes, votes = self.rate
        value = self.share + self.tilt * likes - votes * log1p(q * step)
        return value, -votes * step / (1 + q * step)


def _mixed(bets: Iterable[_Bet], q: float) -> tuple[float, float]:
    """The logarithm of the sum of some bets, and its slope in q."""
    found = [bet.log_wealth(q) for bet in bets]
    top = max(value for value, _ in found)
    parts = [exp(value - top) for value, _ in found]
    total = sum(parts)
    slope = sum(part * slope for part, (_, slope) in zip(parts, found, strict=True)) / total
    return top + log(total), slope


def lower_together(votes: Iterable[tuple[bool, bool]], *, margin: float = 0.0) -> Iterator[float]:
    """Test whether the rate of a new revision is more than a margin below the old one's meanwhile.

    The votes are cut into blocks, each with :data:`BLOCK` votes of both at least. In a block of n₀
    old and n₁ new votes, every old like wins A·(1 - q) and every old dislike loses A·q; the new
    ones bet the other way round, B against q - margin, with n₀·A = n₁·B. By the inequality of the
    means the product is then 1 at most on average, whatever rate both share in the block, and also
    if the new one's is higher (Turner, Ly and Grünwald, 2106.02693). A and B are the best bets on
    each of :data:`DROPS`, by the old votes of earlier blocks.

    Args:
        votes: whether each vote is of the new revision, and whether it is a like, by time.
        margin: how much lower is not lower yet, from 0 to below 1.

    Yields:
        The logarithm of the e-value after each vote.
    """
    wealth = [log(weight) for _, weight in DROPS]
    old = Rate(1, 2)  # one like and one dislike that nobody gave
    block = [Rate(0, 0), Rate(0, 0)]
    log_e = 0.0
    for is_new, liked in votes:
        likes, count = block[is_new]
        block[is_new] = Rate(likes + liked, count + 1)
        if min(block[0].votes, block[1].votes) >= BLOCK:
            p = old.likes / old.votes
            for i, (drop, _) in enumerate(DROPS):
                wealth[i] += _won(block[0], block[1], p, p / (p + (1 - p) * exp(drop)), margin)
            old = Rate(old.likes + block[0].likes, old.votes + block[0].votes)
            block = [Rate(0, 0), Rate(0, 0)]
            top = max(wealth)
            log_e = top + log(sum(exp(each - top) for each in wealth))
        yield log_e


def _won(old: Rate, new: Rate, p_old: float, p_new: float, margin: float) -> float:
    """What a block multiplies the bet on two rates by, as a logarithm."""
    if p_old - p_new <= margin:
        return 0.0
    low, high = p_new + margin, p_old
    if margin:
        for _ in range(_HALVINGS):
            q = (low + high) / 2
            a, b = _stakes(p_old, p_new, q, margin)
            low, high = (q, high) if old.votes * a > new.votes * b else (low, q)
        q = (low + high) / 2
    else:
        q = (old.votes * p_old + new.votes * p_new) / (old.votes + new.votes)
    r = q - margin
    return (
        old.likes * log(p_old / q)
        + (old.votes - old.likes) * log((1 - p_old) / (1 - q))
        + new.likes * log(p_new / r)
        + (new.votes - new.likes) * log((1 - p_new) / (1 - r))
    )


def _stakes(p_old: float, p_new: float, q: float, margin: float) -> tuple[float, float]:
    r = q - margin
    return (p_old - q) / (q * (1 - q)), (r - p_new) / (r * (1 - r))
