"""Reward heads: kernel logistic regressions on features of prompts and answers.

P(a is better than b) = σ(r(x, a) − r(x, b)) (Bradley & Terry 1952). At each prompt x the reward is
linear in the features φ of an answer, and what is liked at a prompt is what was liked at prompts
like it:

    r(x, y) = Σ_i α_i · k(x, x_i) · ⟨φ(y), δ_i⟩,   k(x, x') = (c + exp(−|x − x'|² / w)) / (1 + c)

over all pairs i that were judged, with δ_i = φ(better) − φ(worse). A product of kernels is one
(Aronszajn 1950), so this is a Gaussian process of preferences (Chu & Ghahramani 2005), and the fit
is convex. A pair counts with its label's noise ε, as in conservative DPO: (1 − ε)·softplus(−m) +
ε·softplus(m) for a margin m. A lone thumb is a term of the same form with m = ±(r − b), where all
thumbs share the threshold b.

Each head is fitted on another bootstrap sample of the prompts, so that where they disagree says how
little is known. A fit takes seconds, so it is made anew from everything that is known each time: it
forgets nothing that is still there, and keeps nothing of what is gone.

Pure functions of arrays; numpy and scipy are imported when one is called.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import compress
from typing import TYPE_CHECKING, Any

from agentpref.learn.features import squared_distances
from agentpref.models.threads import single_blas_thread

if TYPE_CHECKING:
    from numpy.typing import NDArray

STRENGTHS = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
"""The weights λ of the penalty λ/2·‖r‖² among which cross-validation chooses."""

FOLDS = 4
SHARED = 0.5
"""c: how much of what is liked is liked at every prompt."""

_FEWEST = 20  # rows below which nothing is chosen
_STEPS = 300
_SAMPLED = 1000  # rows that tell how far prompts lie from one another
_AT_ONCE = 512
_SHORTEST, _LONGEST = 0.05, 20.0  # temperatures
_SAME = 1e-4  # a square distance below which two prompts are one
_RIDGE = 1e-6


@dataclass(frozen=True, slots=True)
class Judged:
    """What people said, as arrays over n rows.

    ``at`` ``[n, d]`` are the features of the prompts. ``said`` ``[n, D]`` are of a pair the better
    answer's features less the other one's, and of a lone thumb the answer's own; ``lone`` says
    which. ``sign`` is 1, and −1 for a thumb down. ``noise`` and ``weight`` are those of the
    examples, and ``prompts`` the ids of their prompts.
    """

    at: NDArray[Any]
    said: NDArray[Any]
    lone: NDArray[Any]
    sign: NDArray[Any]
    noise: NDArray[Any]
    weight: NDArray[Any]
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def only(self, rows: NDArray[Any]) -> Judged:
        """Some of it: the rows of a mask ``[n]``."""
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "prompts"}
        return Judged(**arrays, prompts=tuple(compress(self.prompts, rows)))


@dataclass(frozen=True, slots=True)
class Space:
    """How features are measured: each one's mean and scale, and the width w of the kernel."""

    at_mean: NDArray[Any]
    at_scale: NDArray[Any]
    said_mean: NDArray[Any]
    said_scale: NDArray[Any]
    width: float

    @classmethod
    def of(cls, judged: Judged) -> Space:
        """From what was judged: a feature that never changes counts nothing."""
        import numpy as np

        mean = judged.at.mean(0)
        alone = judged.said[judged.lone]
        said_mean = alone.mean(0) if len(alone) else np.zeros(judged.said.shape[1], np.float32)
        apart = judged.said - judged.lone[:, None] * said_mean
        scale = _inverse_size(apart) / math.sqrt(judged.said.shape[1])
        space = cls(mean, _inverse_size(judged.at - mean), said_mean, scale, 1.0)
        some = space.place(judged.at[:_SAMPLED])
        distances = squared_distances(some, some)[~np.eye(len(some), dtype=bool)]
        apart = distances[distances > _SAME]
        return replace(space, width=float(np.median(apart)) / 2 if len(apart) else 1.0)

    def place(self, at: NDArray[Any]) -> NDArray[Any]:
        """Prompts ``[n, d]`` as they are compared."""
        found: NDArray[Any] = (at - self.at_mean) * self.at_scale / math.sqrt(at.shape[1])
        return found

    def measure(self, said: NDArray[Any], lone: NDArray[Any] | bool = False) -> NDArray[Any]:
        """Answers or their differences ``[n, D]`` as they are multiplied; ``lone``: an answer."""
        import numpy as np

        mean = np.asarray(lone, dtype=np.float32).reshape(-1, 1) * self.said_mean
        found: NDArray[Any] = (said - mean) * self.said_scale
        return found

    def kernel(self, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        """k of placed prompts ``[n, d]`` and ``[m, d]``: ``[n, m]``."""
        import numpy as np

        near = np.exp(-squared_distances(one, other) / self.width)
        found: NDArray[Any] = (SHARED + near) / (1 + SHARED)
        return found


@dataclass(frozen=True, slots=True)
class Heads:
    """Fitted heads.

    ``at`` ``[n, d]`` and ``said`` ``[n, D]`` are what was judged, placed and measured in ``space``,
    ``alphas`` ``[K, n]`` what each head makes of it, and ``thresholds`` ``[K]`` the thumbs'.
    Rewards divided by ``temperature`` are log-odds. ``length`` is how far such a reward rises with
    log(1 + tokens), all else as it comes with it. ``strength`` is the λ that was chosen.
    """

    space: Space
    at: NDArray[Any]
    said: NDArray[Any]
    alphas: NDArray[Any]
    thresholds: NDArray[Any]
    temperature: float
    length: float
    strength: float

    def rewards(
        self, at: NDArray[Any], answers: NDArray[Any], *, length_controlled: bool = False
    ) -> NDArray[Any]:
        """The rewards of a prompt's answers by each head, ``[n, K]`` in log-odds.

        Args:
            at: the features of the prompt, ``[d]``.
            answers: those of its answers, ``[n, D]``.
            length_controlled: leave out how rewards go with length.
        """
        near = self.space.kernel(self.space.place(at[None]), self.at)[0]
        taste = (self.alphas * near) @ self.said  # [K, D]: the linear head at this prompt
        found: NDArray[Any] = self.space.measure(answers, lone=True) @ taste.T / self.temperature
        if length_controlled:
            found = found - self.length * answers[:, -1:]
        return found

    def margins(self, at: NDArray[Any], said: NDArray[Any]) -> NDArray[Any]:
        """The margins of pairs by each head, ``[m, K]`` in log-odds.

        Args:
            at: the features of the prompts, ``[m, d]``.
            said: the better answers' features less the others', ``[m, D]``.
        """
        import numpy as np

        places, measured = self.space.place(at), self.space.measure(said)
        found = np.zeros((len(at), len(self.alphas)))
        for start in range(0, len(at), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            kernel = self.space.kernel(places[some], self.at) * (measured[some] @ self.said.T)
            found[some] = kernel @ self.alphas.T
        scaled: NDArray[Any] = found / self.temperature
        return scaled

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """All of it as named arrays, to keep."""
        import numpy as np

        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "space"}
        space = {f"space.{f.name}": getattr(self.space, f.name) for f in fields(self.space)}
        return {name: np.asarray(value, dtype=np.float32) for name, value in (own | space).items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Heads:
        """Undo :meth:`to_arrays`."""

        def of(kind: type[Any], prefix: str) -> dict[str, Any]:
            found = {f.name: arrays[prefix + f.name] for f in fields(kind) if f.name != "space"}
            return {name: value if value.ndim else float(value) for name, value in found.items()}

        return cls(space=Space(**of(Space, "space.")), **of(cls, ""))


@single_blas_thread()
def fit(judged: Judged, *, heads: int = 5, seed: int = 0, strength: float | None = None) -> Heads:
    """Fit heads on what people said.

    Args:
        judged: one row at least.
        heads: how many, 2 or more.
        seed: of the bootstrap samples.
        strength: λ; by default the one of :data:`STRENGTHS` that cross-validation chooses.

    Raises:
        MissingDependency: scipy is not installed.
    """
    import numpy as np

    from agentpref.prove.bootstrap import scipy

    space = Space.of(judged)
    at, said = space.place(judged.at), space.measure(judged.said, judged.lone)
    kernel = (space.kernel(at, at) * (said @ said.T)).astype(np.float64)
    # Of K = L·Lᵀ each row of L is a vector whose products are the kernel's: what is fitted is a
    # linear model on these, r = L·u with ‖r‖² = u·u, and α solves Lᵀ·α = u.
    rows = _factor(kernel)
    problem = _Problem(rows.astype(np.float32), judged)
    among = STRENGTHS if strength is None else (strength,)
    strength, margins = _choose(problem, judged.prompts, among)
    alphas, thresholds = [], []
    for head in range(heads):
        u, threshold = problem.minimum(
            strength, judged.weight * _bootstrap(judged.prompts, head, seed)
        )
        alphas.append(scipy("linalg").solve_triangular(rows, u, trans="T", lower=True))
        thresholds.append(threshold)
    found = Heads(
        space, at, said, np.stack(alphas), np.array(thresholds),
        _temperature(problem, margins), 0.0, strength,
    )  # fmt: skip
    pairs = ~judged.lone
    lengths = judged.said[pairs, -1]
    square = float(lengths @ lengths)
    if not square:
        return found
    apart = found.margins(judged.at[pairs], judged.said[pairs]).mean(1)
    return replace(found, length=float(lengths @ apart) / square)


def _factor(kernel: NDArray[Any]) -> NDArray[Any]:
    """L of K = L·Lᵀ, with as little added to the diagonal as rounding makes necessary."""
    import numpy as np

    ridge = _RIDGE * max(float(np.trace(kernel)) / len(kernel), 1e-9) * np.eye(len(kernel))
    try:
        rows: NDArray[Any] = np.linalg.cholesky(kernel + ridge)
    except np.linalg.LinAlgError:
        # Its eigenvectors do not fail, and what is negative is rounding.
        values, vectors = np.linalg.eigh(kernel)
        rows = np.linalg.cholesky((vectors * np.maximum(values, 0)) @ vectors.T + ridge)
    return rows


@dataclass(frozen=True)
class _Problem:
    """A linear logistic problem: rows ``[n, n]``, and what was said of each."""

    rows: NDArray[Any]
    judged: Judged

    def minimum(self, strength: float, weight: NDArray[Any]) -> tuple[NDArray[Any], float]:
        """The weights and the threshold of the smallest loss, by L-BFGS; ``weight`` may be 0."""
        import numpy as np

        from agentpref.prove.bootstrap import scipy

        total, judged = max(float(weight.sum()), 1e-9), self.judged

        def value(theta: NDArray[Any]) -> tuple[float, NDArray[Any]]:
            u, b = theta[:-1], theta[-1]
            margins = self.margins(u, b)
            slope = judged.noise - 1 / (1 + np.exp(np.clip(margins, -500, 500)))
            slope = weight * judged.sign * slope / total
            gradient = (slope.astype(np.float32) @ self.rows).astype(np.float64)
            of_b = -float(slope[judged.lone].sum())
            loss = float((weight * self.losses(margins)).sum()) / total
            return loss + strength / 2 * float(u @ u), np.append(gradient + strength * u, of_b)

        start = np.zeros(self.rows.shape[1] + 1)
        found = scipy("optimize").minimize(
            value, start, jac=True, method="L-BFGS-B", options={"maxiter": _STEPS}
        )
        return found.x[:-1], float(found.x[-1])

    def margins(self, u: NDArray[Any], b: float) -> NDArray[Any]:
        """How surely each row is as it was said."""
        import numpy as np

        rewards = (self.rows @ u.astype(np.float32)).astype(np.float64)
        found: NDArray[Any] = self.judged.sign * (rewards - b * self.judged.lone)
        return found

    def losses(self, margins: NDArray[Any]) -> NDArray[Any]:
        """(1 − ε)·softplus(−m) + ε·softplus(m) of each row."""
        import numpy as np

        found: NDArray[Any] = np.logaddexp(0, -margins) + self.judged.noise * margins
        return found

    def mean_loss(self, margins: NDArray[Any]) -> float:
        """Over all rows, by their weight."""
        weight = self.judged.weight
        return float((weight * self.losses(margins)).sum() / max(float(weight.sum()), 1e-9))


def _choose(
    problem: _Problem, prompts: Sequence[str], among: Sequence[float]
) -> tuple[float, NDArray[Any]]:
    """The strength that predicts best what a fold's model has not seen, and the margins then."""
    import numpy as np

    folds = np.array([int(_drawn("fold", prompt) * FOLDS) for prompt in prompts])
    best, margins = (math.inf, among[0]), np.zeros(len(folds))
    if len(folds) < _FEWEST or len({*folds.tolist()}) < 2:
        return best[1], margins
    for strength in among:
        found = np.zeros(len(folds))
        for fold in {*folds.tolist()}:
            solved = problem.minimum(strength, problem.judged.weight * (folds != fold))
            found = np.where(folds == fold, problem.margins(*solved), found)
        loss = problem.mean_loss(found)
        if loss < best[0]:
            best, margins = (loss, strength), found
    return best[1], margins


def _temperature(problem: _Problem, margins: NDArray[Any]) -> float:
    """What to divide margins by, so that they are log-odds (Guo et al. 2017).

    ``margins`` are of models that had not seen the row; all 0 where there are none.
    """
    from agentpref.prove.bootstrap import scipy

    if not margins.any():
        return 1.0
    found = scipy("optimize").minimize_scalar(
        lambda log: problem.mean_loss(margins / math.exp(log)),
        bounds=(math.log(_SHORTEST), math.log(_LONGEST)),
        method="bounded",
    )
    return math.exp(float(found.x))


def _inverse_size(values: NDArray[Any]) -> NDArray[Any]:
    """1 / root mean square of each column; 0 where that is nothing."""
    import numpy as np

    size = np.sqrt(np.mean(np.square(values, dtype=np.float64), axis=0))
    return np.where(size > 1e-6, 1 / np.maximum(size, 1e-6), 0.0).astype(np.float32)


def _bootstrap(prompts: Sequence[str], head: int, seed: int) -> NDArray[Any]:
    """How often each row is in a head's sample: Poisson with mean 1, the same for a prompt's rows.

    A prompt's number does not change when others come.
    """
    import numpy as np

    from agentpref.prove.bootstrap import scipy

    drawn = np.array([_drawn(f"head {seed} {head}", prompt) for prompt in prompts])
    counts: NDArray[Any] = scipy("stats").poisson.ppf(drawn, 1.0)
    return counts if counts.any() else np.ones(len(prompts))


def _drawn(what: str, prompt: str) -> float:
    """A number from 0 to 1 that is as good as random, and the same each time."""
    digest = hashlib.blake2b(f"{what}\n{prompt}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**64
