"""Encodes examples as rows of token ids: the prompt once, then its completions.

A lone example is given one more completion, an answer to another prompt, from which KTO estimates
its reference point. Examples that cannot be encoded, or not as they were logged, are counted by
reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from agentpref.models.instructions import instructed_example
from agentpref.models.reasons import Objection
from agentpref.models.template import ChatTemplate
from agentpref.models.tokenizer import ExampleTokenizer, Ids, Mask, TokenizedExample
from agentpref.types import Completion, Example, Prompt


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An example, and the token ids of its prompt and completions.

    ``completions`` are the example's own, in its order. Where the example is lone, its mismatched
    completion follows: another example's answer, to another prompt (KTO: 2402.01306, section 4.1).
    ``masks`` says of each completion which of its tokens count (``None``: all). ``told`` has the
    prompt as it is asked with some instructions, by these (``agentpref.models.instructions``), and
    ``advised`` is the prompt of a remark as live is told it.
    """

    example: Example
    prompt: Ids
    completions: tuple[Ids, ...]
    masks: tuple[Mask | None, ...]
    told: Mapping[str, Ids] = field(default_factory=dict)
    advised: Ids | None = None

    def asked_with(self, instructions: str) -> EncodedExample:
        """The row as it is asked with instructions that it was encoded for; itself without any."""
        return replace(self, prompt=self.told[instructions], told={}) if instructions else self

    @property
    def own(self) -> tuple[Ids, ...]:
        """The completions of the example itself."""
        return self.completions[: len(self.example.completions)]

    @property
    def width(self) -> int:
        """Tokens of the row when prompt and completions share one sequence."""
        return len(self.prompt) + sum(map(len, self.completions))

    def freeze(self) -> dict[str, Any]:
        """The row as JSON values: its token ids, and all that a loss may read of the example.

        Texts and provenance stay out.
        """
        example, kept_out = self.example, {"prompt", "completions", "provenance", "advice"}
        names = [part.name for part in fields(example) if part.name not in kept_out]
        return {
            "ids": [self.prompt, *self.completions],
            **({} if self.advised is None else {"advised": self.advised}),
            "masks": self.masks,
            "example": {name: getattr(example, name) for name in names},
            "completions": [asdict(replace(c, message={})) for c in example.completions],
        }

    @classmethod
    def thaw(cls, values: Mapping[str, Any]) -> EncodedExample:
        """A row that trains and scores as the frozen one; its texts are empty."""
        completions = tuple(
            Completion(**{name: _tuples(value) for name, value in completion.items()})
            for completion in values["completions"]
        )
        facts = {name: _tuples(value) for name, value in values["example"].items()}
        example = Example(prompt=Prompt("", ()), completions=completions, **facts)
        prompt, *ids = map(tuple, values["ids"])
        masks = tuple(map(_tuples, values["masks"]))
        return cls(example, prompt, tuple(ids), masks, advised=_tuples(values.get("advised")))


def _tuples(value: Any) -> Any:
    """JSON's list as the tuple that it was."""
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Encoding:
    """Rows to train on, and counts by reason of what was not encoded as it was logged.

    ``objections`` say of each example that made no row, by id, why not; see
    :data:`agentpref.models.reasons.LEFT_OUT`.

    ``shortened`` counts rows whose prompt lost its oldest turns: ``prompt_shortened``.
    ``retokenized`` counts rows whose logged tokens were not used: ``foreign_token_ids`` (not in the
    vocabulary), ``ids_disagree`` (they decode to another text).
    """

    rows: list[EncodedExample] = field(default_factory=list)
    objections: dict[str, Objection] = field(default_factory=dict)
    shortened: Counter[str] = field(default_factory=Counter)
    retokenized: Counter[str] = field(default_factory=Counter)

    @property
    def left_out(self) -> Counter[str]:
        """How many examples made no row, by reason."""
        return Counter(objection.reason for objection in self.objections.values())


def encode(
    examples: Iterable[Example],
    template: ChatTemplate,
    *,
    max_length: int,
    embedded: int | None = None,
    instructions: Iterable[str] = (),
) -> Encoding:
    """Encode examples in order; a prompt and its longest completion fit into ``max_length`` tokens.

    The mismatched completion of a lone example is that of the next one, in the circle of the lone
    examples' ids, that answers another prompt in other tokens, and fits. Ids are hashes, so this
    order is random and yet fixed: one more example changes the mismatch of its neighbour alone, and
    cached log-probs of the others stay valid. Where all others give the same answer, that is it:
    likes and dislikes of one answer are then judged against how far it has moved on average. Where
    there is no other prompt, as for a single thumb, the reference point cannot be estimated, and
    the example is left out as ``no_mismatch``.

    ``embedded`` is how many tokens have an embedding (``None``: all that the tokenizer knows).
    ``instructions`` are those with which some policy is asked: each prompt is encoded with each of
    them, too, and must fit as well.
    """
    known = len(template.tokenizer) if embedded is None else embedded
    examples = list(examples)
    encoding = Encoding()
    found: list[tuple[Example, TokenizedExample]] = []
    tokenizer = ExampleTokenizer(template, max_length)
    tokenized = tokenizer(examples)
    for example, tokens in zip(examples, tokenized, strict=True):
        if isinstance(tokens, Objection):
            encoding.objections[example.example_id] = tokens
        elif max(map(max, (tokens.prompt, *tokens.completions))) >= known:
            encoding.objections[example.example_id] = Objection("no_embedding")
        elif not example.ordinary and any(
            c.label is None or not math.isfinite(c.label) for c in example.completions
        ):
            encoding.objections[example.example_id] = Objection("no_label", -1)
        elif len(set(tokens.completions)) < len(tokens.completions):
            encoding.objections[example.example_id] = Objection("same_tokens", -1)
        else:
            found.append((example, tokens))
    told: list[dict[str, Ids]] = [{} for _ in found]
    texts, left_out = tuple(instructions), set[int]()
    for text in (*texts, ""):  # at last, remarks as live is told them, after its instructions
        some = [n for n, (example, _) in enumerate(found) if text or example.advice]
        asked = [
            instructed_example(found[number][0], text)
            if text
            else _advised(found[number][0], texts[:1])
            for number in some
        ]
        for number, tokens in zip(some, tokenizer(asked), strict=True):
            if isinstance(tokens, Objection):
                encoding.objections[found[number][0].example_id] = tokens
                left_out.add(number)
            else:
                told[number][text] = tokens.prompt
    whole = [number for number in range(len(found)) if number not in left_out]
    found, told = [found[number] for number in whole], [told[number] for number in whole]
    lone = [(example.example_id, tokens) for example, tokens in found if example.lone]
    mismatched = _mismatched(lone, max_length)
    for (example, tokens), also in zip(found, told, strict=True):
        completions, masks = tokens.completions, tokens.masks
        if example.lone:
            other = next(mismatched)
            if other is None:
                encoding.objections[example.example_id] = Objection("no_mismatch")
                continue
            completions, masks = (*completions, other), (*masks, None)
        advised = also.pop("", None)
        row = EncodedExample(example, tokens.prompt, completions, masks, also, advised)
        encoding.rows.append(row)
        encoding.shortened.update(["prompt_shortened"] if tokens.shortened else [])
        encoding.retokenized.update(tokens.retokenized)
    return encoding


def _advised(example: Example, instructions: Iterable[str]) -> Example:
    """A remark as live is told it: after its own instructions, if it has any."""
    for text in (*instructions, example.advice):
        example = instructed_example(example, text)
    return example


def _mismatched(
    lone: Sequence[tuple[str, TokenizedExample]], max_length: int
) -> Iterator[Ids | None]:
    """For each lone example, another one's completion, or ``None``."""
    circle = sorted(range(len(lone)), key=lambda number: lone[number][0])
    place = {number: at for at, number in enumerate(circle)}
    for number, (_, own) in enumerate(lone):
        after = range(place[number] + 1, place[number] + len(circle))
        others = (lone[circle[at % len(circle)]][1] for at in after)
        same: Ids | None = None
        for other in others:
            (completion,) = other.completions
            if other.prompt == own.prompt or len(own.prompt) + len(completion) > max_length:
                continue
            if completion != own.completions[0]:
                yield completion
                break
            same = completion
        else:
            yield same
