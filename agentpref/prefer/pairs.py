"""From what happened, and what was said of it, to what DPO trains on.

Corrections and comparisons state preferences (``preferences.py``), thumbs on the same prompt imply
them (``thumbs.py``), those on the same two answers are settled against each other
(``opinions.py``), and each that carries becomes one pair. Every row of feedback and every
comparison ends in exactly one place: in the provenance of a pair, as a thumb, or counted in
``left_out`` by reason. The result does not depend on the order of the input.

Knows nothing of tokens, models or training; only :func:`read_pairs` knows the store.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentpref.errors import ConfigError
from agentpref.prefer.preferences import Preference, stated_preferences
from agentpref.prefer.split import is_held_out
from agentpref.prefer.thumbs import Thumbed, oppose, settled_thumbs
from agentpref.prefer.votes import STRENGTH, LeftRow, Opinion, settle
from agentpref.record.messages import canonical
from agentpref.record.stats import Scale
from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback, Message, Origin, Pair, Run, Thumb

LOWEST_JUDGE_NOISE = 0.05

NOISE: Mapping[Origin, float] = {"correction": 0.02, "comparison": 0.05, "thumbs": 0.05}
"""The share of flipped labels ε that is assumed of people's signals."""


@dataclass(frozen=True, slots=True)
class PairSet:
    """Everything that a namespace has to learn from, sorted by time.

    ``left_out`` counts the rows that made neither a pair nor a thumb, by
    :data:`~agentpref.prefer.votes.Reason`.
    """

    pairs: tuple[Pair, ...] = ()
    thumbs: tuple[Thumb, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)


def read_pairs(
    store: Store,
    namespace: str,
    *,
    held_out: float,
    judge_noise: float = LOWEST_JUDGE_NOISE,
    since: float | None = None,
) -> PairSet:
    """Build the pairs of one namespace from everything that its home has logged.

    With ``since`` (POSIX seconds), only those of prompts that something was said of then or later,
    just as they are among all pairs: older words on these prompts count as they do there.
    """
    with store.one_state():
        return build_pairs(
            store.judged_runs(namespace, since=since),
            store.feedback(namespace, since=since),
            store.comparisons(namespace, since=since),
            held_out=held_out,
            judge_noise=judge_noise,
            scales=store.scales(namespace),
        )


def build_pairs(
    runs: Iterable[Run],
    feedback: Iterable[Feedback],
    comparisons: Iterable[Comparison],
    *,
    held_out: float,
    judge_noise: float = LOWEST_JUDGE_NOISE,
    scales: Iterable[Scale] | None = None,
) -> PairSet:
    """Build the pairs and lone thumbs of one namespace.

    Args:
        runs: the runs of the namespace; those that nothing was said of are not kept in memory.
        feedback: scores and corrections of those runs.
        comparisons: verdicts between two of those runs.
        held_out: the share of prompts, from 0 to 1, whose pairs prove and never train.
        judge_noise: the measured disagreement ε of judges with gold labels, from .05 to .5.
        scales: what all scores of a key look like, where ``feedback`` is only some of them.

    Raises:
        ConfigError: for a ``judge_noise`` out of range.
    """
    if not LOWEST_JUDGE_NOISE <= judge_noise <= 0.5:
        raise ConfigError(f"judge_noise is {judge_noise!r}, but must be from .05 to .5")
    feedback, comparisons = list(feedback), list(comparisons)
    known = _judged_runs(runs, feedback, comparisons)
    stated, misread = stated_preferences(feedback, comparisons, known)
    answers, unsettled = settled_thumbs(feedback, known, scales)
    implied, lone, spare = oppose(answers)
    carried, lost = settle([*stated, *implied])
    pairs = [_pair(opinions, held_out, judge_noise) for opinions in carried]
    lone = [_speaker_first(answer) for answer in lone]
    thumbs = [_thumb(answer[0], held_out) for answer in lone]
    return PairSet(
        pairs=tuple(sorted(pairs, key=lambda pair: (pair.created_at, pair.pair_id))),
        thumbs=tuple(sorted(thumbs, key=lambda thumb: (thumb.created_at, thumb.run_id))),
        left_out=_count([*misread, *unsettled, *spare, *lost, *_repeated(lone)], pairs),
    )


def pair_id_of(prompt_id: str, chosen: Message, rejected: Message) -> str:
    """Address a preference by its content: 32 hex digits."""
    return _address(prompt_id.encode(), canonical(chosen), canonical(rejected))


def thumb_id_of(prompt_id: str, completion: Message, desirable: bool) -> str:
    """Address a lone judgement by its content: 32 hex digits."""
    return _address(prompt_id.encode(), canonical(completion), b"up" if desirable else b"down")


def _address(*parts: bytes) -> str:
    return hashlib.blake2b(b"\n".join(parts), digest_size=16).hexdigest()


def _judged_runs(
    runs: Iterable[Run], feedback: Iterable[Feedback], comparisons: Iterable[Comparison]
) -> dict[str, Run]:
    judged = {row.run_id for row in feedback}
    for row in comparisons:
        judged |= {row.run_a, row.run_b}
    return {run.run_id: run for run in runs if run.run_id in judged}


def _pair(opinions: Sequence[Opinion[Preference]], held_out: float, judge_noise: float) -> Pair:
    """Merge the opinions that agree on one preference; the strongest names its origin."""
    first = opinions[0]
    run, chosen, rejected, *_ = first.about
    wrote_chosen = _writer(run for o in opinions for run in o.about.chosen_runs)
    wrote_rejected = _writer(run for o in opinions for run in o.about.rejected_runs)
    origin = min((opinion.origin for opinion in opinions), key=STRENGTH.index)
    return Pair(
        pair_id=pair_id_of(run.prompt.id, chosen, rejected),
        namespace=run.namespace,
        created_at=first.said_at,
        prompt=run.prompt,
        chosen=chosen,
        rejected=rejected,
        origin=origin,
        tag=run.tag,
        noise=judge_noise if origin == "judge" else NOISE[origin],
        held_out=is_held_out(run.prompt.messages, held_out),
        provenance=tuple(dict.fromkeys(row for opinion in opinions for row in opinion.rows)),
        chosen_ids=None if wrote_chosen is None else wrote_chosen.token_ids,
        rejected_ids=None if wrote_rejected is None else wrote_rejected.token_ids,
        chosen_by=None if wrote_chosen is None else wrote_chosen.revision,
        rejected_by=None if wrote_rejected is None else wrote_rejected.revision,
    )


def _writer(runs: Iterable[Run]) -> Run | None:
    """Of the runs that wrote an answer, the one to take its tokens and its writer from."""
    return max(runs, key=_telling, default=None)


def _telling(run: Run) -> tuple[Any, ...]:
    """How well a run says who wrote its answer: with tokens, by a known revision, lately.

    Runs that this does not part say the same, so that nothing hangs on their ids.
    """
    known = (bool(run.token_ids), run.revision is not None)
    return (*known, run.created_at, run.token_ids or (), run.revision or "")


def _speaker_first(answer: Thumbed) -> Thumbed:
    """Put first, of the thumbs on one answer, the one that is to stand for them.

    It is the first whose run has its tokens, so that these come from a run in the provenance.
    """
    return sorted(answer, key=lambda opinion: not opinion.about.token_ids)


def _thumb(opinion: Opinion[Run], held_out: float) -> Thumb:
    run, desirable = opinion.about, opinion.side is True
    return Thumb(
        run_id=run.run_id,
        namespace=run.namespace,
        created_at=opinion.said_at,
        prompt=run.prompt,
        completion=run.output,
        desirable=desirable,
        tag=run.tag,
        held_out=is_held_out(run.prompt.messages, held_out),
        thumb_id=thumb_id_of(run.prompt.id, run.output, desirable),
        provenance=opinion.rows,
        token_ids=run.token_ids,
        written_by=run.revision,
    )


def _repeated(lone: Iterable[Thumbed]) -> list[LeftRow]:
    """Leave out all but the first row of each lone answer: one thumb stands for them all."""
    return [row for answer in lone for opinion in answer[1:] for row in opinion.leave("repeated")]


def _count(left: Iterable[LeftRow], pairs: Iterable[Pair]) -> dict[str, int]:
    """Count each row once that is in no pair: a thumb may lose one match and carry another."""
    used = {row for pair in pairs for row in pair.provenance}
    reasons = {row: reason for row, reason in left if row not in used}
    return dict(sorted(Counter(reasons.values()).items()))
