"""Builds training examples from what was logged and what was said of it.

``signals.py`` reads feedback and comparisons as votes, ``votes.py`` settles them, and each question
that has a winner becomes one example: two completions for a preference, one for a lone thumb. Every
row of feedback and every comparison ends in exactly one place: in the provenance of an example, or
counted in ``left_out`` by reason. The result does not depend on the order of the input.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from agentpref.prefer.retractions import withdraw
from agentpref.prefer.signals import (
    JudgedAnswer,
    Preference,
    match_thumbs,
    settled_thumbs,
    stated_preferences,
)
from agentpref.prefer.votes import STRENGTH, LeftOut, Reason, Vote, settle
from agentpref.record.messages import canonical
from agentpref.record.standards import Standards
from agentpref.record.store import Store
from agentpref.types import (
    INCOMPLETE,
    UNKNOWN_BEFORE,
    Comparison,
    Completion,
    Example,
    Feedback,
    Message,
    Origin,
    Run,
)

_ONLY_PEOPLE = Standards()


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """Everything that a namespace has to learn from: pairs, then lone thumbs, each sorted by time.

    ``left_out`` counts the rows that made no example, by
    :data:`~agentpref.prefer.votes.Reason`.
    """

    examples: tuple[Example, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def pairs(self) -> tuple[Example, ...]:
        """The examples with completions to compare."""
        return tuple(example for example in self.examples if not example.lone)

    @property
    def thumbs(self) -> tuple[Example, ...]:
        """The examples with a single completion."""
        return tuple(example for example in self.examples if example.lone)


def read_examples(
    store: Store,
    namespace: str,
    *,
    held_out: float,
    since: float | None = None,
) -> ExampleSet:
    """Build the examples of one namespace from everything that its home has logged.

    With ``since`` (POSIX seconds), only those of prompts that were judged then or later; older
    judgements of these prompts count as well.
    """
    with store.one_state():
        return build_examples(
            store.judged_runs(namespace, since=since),
            store.feedback(namespace, since=since),
            store.comparisons(namespace, since=since),
            held_out=held_out,
            standards=store.standards(namespace),
        )


def build_examples(
    runs: Iterable[Run],
    feedback: Iterable[Feedback],
    comparisons: Iterable[Comparison],
    *,
    held_out: float,
    standards: Standards = _ONLY_PEOPLE,
) -> ExampleSet:
    """Build the examples of one namespace.

    Args:
        runs: the runs of the namespace; those that were not judged are not kept in memory.
        feedback: scores and corrections of those runs.
        comparisons: verdicts between two of those runs.
        held_out: the share of prompts, from 0 to 1, that prove adapters and never train them.
        standards: the keys beside ``thumbs`` whose scores are preferences, and the scale of each
            source, for feedback without its own; and which models are trusted as judges, where.
    """
    examples, reasons = sort_out(
        runs, feedback, comparisons, held_out=held_out, standards=standards
    )
    return ExampleSet((*examples,), dict(sorted(Counter(reasons.values()).items())))


def sort_out(
    runs: Iterable[Run],
    feedback: Iterable[Feedback],
    comparisons: Iterable[Comparison],
    *,
    held_out: float,
    standards: Standards = _ONLY_PEOPLE,
) -> tuple[list[Example], dict[str, Reason]]:
    """Build examples as :func:`build_examples` does, and say why each other row made none.

    Returns the examples, and the reasons by the ids of feedback and comparisons.
    """
    feedback, comparisons, withdrawn = withdraw([*feedback], [*comparisons])
    judged = {row.run_id for row in feedback}
    judged.update(run_id for row in comparisons for run_id in (row.run_a, row.run_b))
    known = {run.run_id: as_asked(run) for run in runs if run.run_id in judged}
    feedback, comparisons, broken_off = _of_whole_runs(feedback, comparisons, known)
    stated, misread = stated_preferences(feedback, comparisons, known, standards)
    answers, unsettled = settled_thumbs(feedback, known, standards)
    implied, lone, spare = match_thumbs(answers)
    won, lost = settle([*stated, *implied])
    pairs = [_pair(votes, held_out) for votes in won]
    thumbs, repeated = _thumbs(lone, held_out)
    # Each row counts once, and none of a pair: a thumb may lose one match and win another.
    used = {row for pair in pairs for row in pair.provenance}
    left = [*withdrawn, *broken_off, *misread, *unsettled, *spare, *lost, *repeated]
    examples = sorted([*pairs, *thumbs], key=lambda one: (one.lone, one.created_at, one.example_id))
    return examples, {row: reason for row, reason in left if row not in used}


def _of_whole_runs(
    feedback: Sequence[Feedback], comparisons: Sequence[Comparison], known: Mapping[str, Run]
) -> tuple[list[Feedback], list[Comparison], list[LeftOut]]:
    """Separate what is said of runs that are known in part.

    Nobody could judge an answer that broke off; and where the beginning of a conversation is not
    known, training would be on another prompt than the model was given.
    """
    why: dict[str, Reason] = {}
    for name, run in known.items():
        if run.metadata.get("finish_reason") == INCOMPLETE:
            why[name] = "incomplete_answer"
        elif run.metadata.get(UNKNOWN_BEFORE) is not None:
            why[name] = "incomplete_prompt"
    left: list[LeftOut] = []
    whole, compared = [], []
    for row in feedback:
        if (reason := why.get(row.run_id)) is not None:
            left.append((row.feedback_id, reason))
        else:
            whole.append(row)
    for each in comparisons:
        if (reason := why.get(each.run_a) or why.get(each.run_b)) is not None:
            left.append((each.comparison_id, reason))
        else:
            compared.append(each)
    return whole, compared, left


def as_asked(run: Run) -> Run:
    """A run whose prompt has the arguments of the chat template that the server was given.

    Two runs that differ in them have different prompts: one was asked to think, say, and one not.
    Clients of OpenAI's library send them in ``extra_body``.
    """
    extra = run.params.get("extra_body")
    params = {**extra, **run.params} if isinstance(extra, Mapping) else run.params
    arguments = params.get("chat_template_kwargs")
    if not isinstance(arguments, Mapping) or not arguments:
        return run
    parts = (run.prompt.id.encode(), canonical(arguments))
    asked = hashlib.blake2b(b"\n".join(parts), digest_size=16).hexdigest()
    return replace(run, prompt=replace(run.prompt, id=asked, chat_template_kwargs=arguments))


def example_id_of(prompt_id: str, completions: Sequence[Completion]) -> str:
    """The content address of an example, 32 hex digits.

    It covers the prompt, the completions in their order, and their labels. Pairs and thumbs keep
    the ids of version 0.1, which left a pair's labels out and wrote a thumb's as a word.
    """
    labels = [completion.label for completion in completions]
    parts = [prompt_id.encode(), *(canonical(c.message) for c in completions)]
    if labels in ([1], [0]):
        parts.append(b"up" if labels[0] else b"down")
    elif labels != [1, 0]:
        parts.append(orjson.dumps(labels))
    return hashlib.blake2b(b"\n".join(parts), digest_size=16).hexdigest()


def split_point(messages: Sequence[Message]) -> float:
    """Map a prompt to a point in [0, 1), uniformly.

    The point depends on the prompt alone, so it is the same in every process and never changes when
    rows are added. System and developer messages do not count beside others: they often carry a
    date or a user's name, and the same question must not be both trained and held out.
    """
    asked = [m for m in messages if m["role"] not in ("system", "developer")] or messages
    turns = [[m["role"], m.get("content")] for m in asked]
    digest = hashlib.blake2b(orjson.dumps(turns, option=orjson.OPT_SORT_KEYS), digest_size=8)
    return int.from_bytes(digest.digest(), "big") / 2**64


def unlabelled(run: Run, origin: Origin) -> Example:
    """A logged answer as an example that prefers nothing, by its prompt and its words."""
    output = Completion(run.output, None, run.token_ids, run.logprobs, author=run.revision)
    return Example(
        example_id=example_id_of(run.prompt.id, (output,)),
        namespace=run.namespace,
        created_at=run.created_at,
        prompt=run.prompt,
        completions=(output,),
        origin=origin,
        tag=run.tag,
        provenance=(run.run_id,),
        trace_id=run.trace_id,
        run_at=run.created_at,
    )


def is_held_out(messages: Sequence[Message], share: float) -> bool:
    """Whether a prompt is held out when ``share`` of all prompts is."""
    return split_point(messages) < share


def _example(
    run: Run, completions: tuple[Completion, ...], held_out: float, **rest: Any
) -> Example:
    return Example(
        example_id=example_id_of(run.prompt.id, completions),
        namespace=run.namespace,
        prompt=run.prompt,
        completions=completions,
        tag=run.tag,
        held_out=is_held_out(run.prompt.messages, held_out),
        trace_id=run.trace_id,
        run_at=run.created_at,
        **rest,
    )


def _pair(votes: Sequence[Vote[Preference]], held_out: float) -> Example:
    """Make one example of the votes that agree on a preference; the strongest names its origin."""
    preference = votes[0].subject
    origin = min((vote.origin for vote in votes), key=STRENGTH.index)
    completions = (
        _completion(preference.chosen, 1.0, [r for v in votes for r in v.subject.chosen_runs]),
        _completion(preference.rejected, 0.0, [r for v in votes for r in v.subject.rejected_runs]),
    )
    return _example(
        preference.run,
        completions,
        held_out,
        created_at=votes[0].created_at,
        origin=origin,
        noise=min(vote.noise for vote in votes if vote.origin == origin),
        provenance=tuple(dict.fromkeys(row for vote in votes for row in vote.rows)),
    )


def _thumbs(
    answers: Iterable[JudgedAnswer], held_out: float
) -> tuple[list[Example], list[LeftOut]]:
    """Make one example of each lone answer, and leave out its other votes as repeated.

    The vote that stands for the others is the first whose run has its tokens, so that these come
    from a run in the provenance.
    """
    examples: list[Example] = []
    repeated: list[LeftOut] = []
    for answer in answers:
        vote, *others = sorted(answer, key=lambda vote: not vote.subject.token_ids)
        repeated += [row for other in others for row in other.left_out("repeated")]
        run = vote.subject
        completion = _completion(run.output, float(vote.side is True), [run])
        of_vote = {"created_at": vote.created_at, "origin": "thumb", "provenance": vote.rows}
        of_vote["noise"] = vote.noise
        examples.append(_example(run, (completion,), held_out, **of_vote))
    return examples, repeated


def _completion(message: Message, label: float, runs: Sequence[Run]) -> Completion:
    """An answer with the tokens and the author of the run that knows most about them.

    Preferred are runs with logged tokens, then with a known revision, then the newest. No run wrote
    a correction.
    """
    if not runs:
        return Completion(message, label)

    def knowledge(run: Run) -> tuple[Any, ...]:
        tokens, revision = run.token_ids or (), run.revision
        return bool(tokens), revision is not None, run.created_at, tokens, revision or ""

    run = max(runs, key=knowledge)
    return Completion(message, label, run.token_ids, run.logprobs, author=run.revision)
