"""Distribution shift: are tonight's prompts like those that live has learned?

A prompt is the mean of the base's embeddings of its tokens: a bag of words, by meaning. Two sets of
prompts are told apart by their maximum mean discrepancy with a Gaussian kernel, and how likely one
as large is by chance, by shuffling who belongs to which (Gretton et al. 2012). A large set tells
the smallest difference, so a share says what it amounts to: how many of tonight's prompts are
farther from the nearest known one than all but one in twenty of the known ones are from theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from agentpref.learn.features import squared_distances

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentpref.learn.encode import EncodedExample
    from agentpref.learn.learner import Learner

FEWEST, MOST = 20, 300
"""With fewer prompts on a side nothing is said; of more, those with the lowest ids: hashes."""

SHUFFLES = 1000
SURE, MUCH = 0.01, 0.25
"""An alarm is so sure, over all tags together, and so many of the new prompts are unlike others."""

SHOWN = 3
_USUAL, _FEW = 0.95, 10
ALL = "all"


class Point(NamedTuple):
    """A prompt: its tag, its id, where it lies ``[d]``, and what to call it."""

    tag: str
    prompt: str
    vector: NDArray[Any]
    name: str = ""


@dataclass(frozen=True, slots=True)
class Shift:
    """How far new prompts of one tag, or of all, are from known ones.

    ``p`` is how likely a discrepancy like this is by chance, and ``unlike`` the share of the new
    prompts that are like no known one (.05 is usual). ``farthest`` names some of those.
    """

    tag: str
    new: int
    old: int
    p: float
    unlike: float
    farthest: tuple[str, ...] = ()

    @property
    def alarm(self) -> bool:
        """Whether it is sure and large; ``p`` was corrected for the number of tags."""
        return self.p <= SURE and self.unlike >= MUCH

    @property
    def note(self) -> str:
        """What a report says of it."""
        whose = "the new prompts" if self.tag == ALL else f"the new prompts of {self.tag!r}"
        return (
            f"shift: {self.unlike:.0%} of {whose} are like none that live has learned (5% is "
            f"usual; p {self.p:.2g}, {self.new} against {self.old}), so what was proven says less "
            f"of them; for example run {', '.join(self.farthest)}"
        )

    def to_mapping(self) -> dict[str, Any]:
        """The numbers for reports."""
        return {**asdict(self), "farthest": [*self.farthest], "alarm": self.alarm}


def shifts(new: Sequence[Point], old: Sequence[Point], *, seed: int) -> list[Shift]:
    """Compare prompts of each tag that has enough on both sides, and all together."""
    tags = [ALL, *sorted({point.tag for point in new} & {point.tag for point in old})]
    sides = [(tag, _of(new, tag), _of(old, tag)) for tag in tags]
    enough = [each for each in sides if min(len(each[1]), len(each[2])) >= FEWEST]
    if len(enough) == 2 and len(enough[0][1]) == len(enough[1][1]):
        enough = enough[:1]  # one tag is all there is
    found = [_compared(*each, seed=seed) for each in enough]
    tests = len(found)
    return [Shift(s.tag, s.new, s.old, min(1.0, tests * s.p), s.unlike, s.farthest) for s in found]


def _of(points: Sequence[Point], tag: str) -> list[Point]:
    """One point of each prompt of a tag."""
    own = {p.prompt: p for p in points if tag in (ALL, p.tag)}
    return [own[name] for name in sorted(own)[:MOST]]


def _compared(tag: str, new: Sequence[Point], old: Sequence[Point], *, seed: int) -> Shift:
    import numpy as np

    vectors = np.stack([point.vector for point in (*new, *old)]).astype(np.float64)
    squares = squared_distances(vectors, vectors)
    count = len(new)
    apart = squares[count:, count:] + np.diag(np.full(len(old), np.inf))
    far = np.quantile(apart.min(1), _USUAL)
    distance = squares[:count, count:].min(1)
    order = np.argsort(-distance, kind="stable")[:SHOWN]
    return Shift(
        tag,
        count,
        len(old),
        _chance(squares, count, seed),
        float((distance > far).mean()),
        tuple(new[int(n)].name or new[int(n)].prompt for n in order),
    )


def _chance(squares: NDArray[Any], count: int, seed: int) -> float:
    """The p-value of the discrepancy of the first ``count`` rows from the others."""
    import numpy as np

    from agentpref.prove.bootstrap import scipy

    middle = float(np.median(squares[np.triu_indices(len(squares), 1)]))
    kernel = np.exp(-squares / max(middle, 1e-12))
    np.fill_diagonal(kernel, 0.0)
    rest = len(squares) - count
    source = np.random.default_rng(seed)
    # Row by row, how much each side weighs; the first is as it is, and the others are shuffled.
    sides = np.zeros((SHUFFLES + 1, len(squares)))
    sides[:, :count] = 1.0
    for row in sides[1:]:
        source.shuffle(row)
    within = ((sides @ kernel) * sides).sum(1) / (count * (count - 1))
    others = 1 - sides
    among = ((others @ kernel) * others).sum(1) / (rest * (rest - 1))
    between = ((sides @ kernel) * others).sum(1) / (count * rest)
    found = within + among - 2 * between
    larger = int((found >= found[0] - 1e-12).sum())
    if larger > _FEW:
        return larger / len(found)
    # Beyond what shuffles show, the tail of a gamma distribution with their moments (section 3.2).
    stats, shuffled = scipy("stats"), found[1:]
    skew = max(float(stats.skew(shuffled)), 1e-3)
    return float(stats.pearson3.sf(found[0], skew, shuffled.mean(), max(shuffled.std(), 1e-30)))


def points(
    learner: Learner, rows: Sequence[EncodedExample], names: Mapping[str, str]
) -> list[Point]:
    """Where the prompts of some rows lie, under their names by prompt id; by that without one."""
    import torch

    table: Any = learner.base.model.get_input_embeddings()
    found = []
    with torch.no_grad():
        for row in {row.example.prompt.id: row for row in rows}.values():
            ids = torch.tensor(row.prompt, device=table.weight.device)
            vector = table(ids).float().mean(0).cpu().numpy()
            prompt = row.example.prompt.id
            found.append(Point(row.example.tag, prompt, vector, names.get(prompt, "")))
    return found
