"""Logged conversations as what is learned from: examples, rows, and arrays for a critic."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from agentpref.offline.critics import Decisions
from agentpref.prefer.examples import is_held_out, unlabelled
from agentpref.prefer.ordinary import is_whole
from agentpref.traces import Step, Trace
from agentpref.types import Completion, Example

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentpref.learn.encode import EncodedExample
    from agentpref.learn.features import Features
    from agentpref.models.tokenizer import Ids


@dataclass(frozen=True, slots=True)
class Conversations:
    """The conversations that were scored, and an example of each decision in them, by its run.

    ``left_out`` counts conversations and decisions that teach nothing, by reason.
    """

    traces: tuple[Trace, ...] = ()
    examples: Mapping[str, Example] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """What identifies these decisions and what they led to."""
        names = sorted(example.example_id for example in self.examples.values())
        return hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()

    def side(self, *, held_out: bool) -> tuple[Trace, ...]:
        """The conversations that train, or those that are held out."""
        return tuple(
            t for t in self.traces if self.examples[t.steps[0].run.run_id].held_out is held_out
        )


def scored(traces: Sequence[Trace], share: float, gamma: float) -> Conversations:
    """Choose the conversations of which somebody said what they were worth.

    Args:
        traces: the conversations of a namespace.
        share: the share of them that is held out, by the names of their threads.
        gamma: the discount, which what a decision led to is counted with.
    """
    left = Counter[str]()
    kept: list[Trace] = []
    worth: dict[str, list[float]] = defaultdict(list)
    sides: dict[str, bool] = {}
    for trace in traces:
        if not any(step.scored for step in trace.steps):
            left["conversation_without_reward"] += 1
            continue
        held = is_held_out([{"role": "thread", "content": trace.id}], share)
        for step, value in zip(trace.steps, _to_go(trace.steps, gamma), strict=True):
            worth[step.run.run_id].append(value)
            sides[step.run.run_id] = held  # forks are of one thread, and so of one side
        kept.append(trace)
    examples = {}
    for step in (step for trace in kept for step in trace.steps):
        run = step.run
        if run.run_id not in examples:
            values = worth[run.run_id]
            name = f"decision {run.run_id} {sum(values) / len(values)!r}"
            example = unlabelled(run, "decision")
            (answer,) = example.completions
            examples[run.run_id] = replace(
                example,
                completions=(replace(answer, label=0.0),),  # until a method has valued it
                example_id=hashlib.blake2b(name.encode(), digest_size=16).hexdigest(),
                held_out=sides[run.run_id],
            )
    return Conversations(tuple(kept), examples, dict(left))


def _to_go(steps: Sequence[Step], gamma: float) -> list[float]:
    found, rest = [0.0] * len(steps), 0.0
    for number in range(len(steps) - 1, -1, -1):
        rest = found[number] = steps[number].reward + gamma * rest
    return found


@dataclass(frozen=True, slots=True)
class Layout:
    """Decisions as arrays, and what each of their numbers stands for.

    ``runs`` names the run of each decision, ``rows`` a row of each state, and ``tokens`` the
    tokens of each answer. ``unfinished`` counts decisions before one that cannot be read.
    """

    data: Decisions
    runs: tuple[str, ...]
    rows: tuple[EncodedExample, ...]
    tokens: tuple[Ids, ...]
    unfinished: int = 0

    def with_answers(
        self, drawn: Sequence[Sequence[Ids]], features: Sequence[NDArray[Any]]
    ) -> Layout:
        """The same with more answers to each state: their tokens, and their features ``[k, D]``.

        An answer that is there already is not there twice.
        """
        import numpy as np

        known = {(int(s), ids): n for n, (s, ids) in
                 enumerate(zip(self.data.of, self.tokens, strict=True))}  # fmt: skip
        tokens, of, more = list(self.tokens), list(self.data.of), []
        for state, (answers, own) in enumerate(zip(drawn, features, strict=True)):
            for ids, vector in zip(answers, own, strict=True):
                if (state, ids) not in known:
                    known[state, ids] = len(tokens)
                    tokens.append(ids)
                    of.append(state)
                    more.append(vector)
        data = self.data
        if more:
            data = replace(
                data,
                answer=np.concatenate([data.answer, np.stack(more)]),
                of=np.array(of),
                likely=np.full(len(of), np.nan),
            )
        return replace(self, data=data, tokens=tuple(tokens))


def lay_out(
    traces: Sequence[Trace],
    rows: Mapping[str, EncodedExample],
    features: Mapping[str, Features],
    gamma: float,
) -> Layout:
    """The decisions of some conversations, one after the other.

    Args:
        traces: the conversations.
        rows: the row of each run that could be encoded.
        features: what the base makes of it.
        gamma: the discount of later decisions.
    """
    import numpy as np

    shared = Counter(step.run.run_id for trace in traces for step in trace.steps)
    states: dict[str, int] = {}
    answers: dict[tuple[int, Ids], int] = {}
    turn, answer, of = list[Any](), list[Any](), list[int]()
    of_state, runs, tokens = list[Any](), list[str](), list[Any]()
    state, taken, reward, after, weight, number, thread = (list[Any]() for _ in range(7))
    unfinished, path = 0, -1
    threads: dict[str, int] = {}
    for trace in traces:
        steps = trace.steps
        # What led to a step that cannot be read led to nothing that is known, and so on backwards.
        gaps = [place for place, step in enumerate(steps) if step.run.run_id not in rows]
        begin = gaps[-1] + 1 if gaps else 0
        unfinished += begin - len(gaps)
        if begin < len(steps):
            path += 1
        for place in range(begin, len(steps)):
            step, last = steps[place], place == len(steps) - 1
            name = step.run.run_id
            row, own = rows[name], features[name]
            if row.example.prompt.id not in states:
                states[row.example.prompt.id] = len(turn)
                turn.append(own.turn)
                of_state.append(row)
            at = states[row.example.prompt.id]
            key = (at, row.own[0])
            if key not in answers:
                answers[key] = len(answer)
                answer.append(own.answers[0])
                tokens.append(row.own[0])
                of.append(at)
            state.append(at)
            taken.append(answers[key])
            reward.append(step.reward)
            after.append(-1 if last else len(runs) + 1)
            weight.append(1 / shared[name])
            number.append(path)
            thread.append(threads.setdefault(trace.id, len(threads)))
            runs.append(name)
    width = (len(turn[0]), len(answer[0])) if turn else (0, 0)
    data = Decisions(
        turn=np.array(turn).reshape(len(turn), width[0]),
        answer=np.array(answer).reshape(len(answer), width[1]),
        of=np.array(of, int),
        likely=np.full(len(of), np.nan),
        state=np.array(state, int),
        taken=np.array(taken, int),
        reward=np.array(reward, float),
        after=np.array(after, int),
        weight=np.array(weight, float),
        trace=np.array(number, int),
        thread=np.array(thread, int),
        gamma=gamma,
    )
    return Layout(data, tuple(runs), tuple(of_state), tuple(tokens), unfinished)


def teachable(example: Example, run: Any, held_out_prompts: frozenset[str]) -> str:
    """Why a decision is valued and not imitated; empty if it may be.

    An answer that broke off is none to imitate, and neither is one to a prompt on which people's
    judgements are held out.
    """
    if not is_whole(run):
        return "incomplete_answer"
    if example.prompt.id in held_out_prompts:
        return "held_out_elsewhere"
    return ""


def imitating(example: Example, text: str, ids: Ids) -> Example:
    """The example with another answer than the logged one, which live would give."""
    answer = Completion({"role": "assistant", "content": text}, token_ids=ids)
    return replace(example, completions=(answer,))
