"""From pairs and thumbs to rows of token ids: the prompt once, then two completions.

What a row's tokens are is settled in ``tokens.py``; here pairs and thumbs become rows, and every
one that does not, or not as it was logged, is counted by reason. A thumb has one answer, and its
row's second completion is another thumb's answer, from which KTO estimates its reference point.
Knows nothing of templates, models and padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from agentpref.learn.cache import sequence_key
from agentpref.models.template import render
from agentpref.models.tokenizer import Answer, Ids, Question, Tokeniser, Tokens
from agentpref.types import Pair, Prompt, Thumb

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Encoded",
    "EncodedPair",
    "EncodedThumb",
    "Encoding",
    "Ids",
    "encode_pairs",
    "encode_prompt",
    "encode_thumbs",
    "sequence_key",
]


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A pair and the token ids of its prompt and of its two completions."""

    pair: Pair
    prompt: Ids
    chosen: Ids
    rejected: Ids

    @property
    def example(self) -> Pair:
        """What was encoded."""
        return self.pair

    @property
    def completions(self) -> tuple[Ids, Ids]:
        """The chosen answer, then the rejected one."""
        return self.chosen, self.rejected

    @property
    def masks(self) -> tuple[None, None]:
        """All tokens of both completions count."""
        return None, None

    @property
    def width(self) -> int:
        """Tokens that the pair costs when prompt and completions stand in one row."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True)
class EncodedThumb:
    """A thumb and the token ids of its prompt, of its answer, and of another thumb's answer.

    ``mismatched`` answers another prompt: KTO estimates KL(π_θ ‖ π_0) from such pairings
    (2402.01306, section 4.1).
    """

    thumb: Thumb
    prompt: Ids
    completion: Ids
    mismatched: Ids

    @property
    def example(self) -> Thumb:
        """What was encoded."""
        return self.thumb

    @property
    def completions(self) -> tuple[Ids, Ids]:
        """The thumb's own answer, then the other one."""
        return self.completion, self.mismatched

    @property
    def masks(self) -> tuple[None, None]:
        """All tokens of both completions count."""
        return None, None

    @property
    def width(self) -> int:
        """Tokens that the thumb costs when prompt and completions stand in one row."""
        return len(self.prompt) + len(self.completion) + len(self.mismatched)


Encoded: TypeAlias = "EncodedPair | EncodedThumb"

R = TypeVar("R", EncodedPair, EncodedThumb)


@dataclass(frozen=True, slots=True)
class Encoding(Generic[R]):
    """Rows to train on, and what became of the others, by reason.

    ``left_out`` counts what made no row: ``template_refuses`` (the chat template raises),
    ``template_rewrites_prompt`` (it renders the prompt differently once an answer follows, so that
    no token can be called the answer's), ``template_marks_elsewhere`` (its ``{% generation %}``
    blocks leave out some of the answer), ``special_token_inside`` (the answer's text spells a
    special token, which would be trained as one), ``empty_completion``, ``too_long`` (the longest
    completion and the last turn of the prompt exceed the limit: completions are never cut),
    ``same_tokens`` (of a pair) and ``no_mismatch`` (of a thumb).

    ``shortened`` counts rows whose prompt lost its oldest turns: ``prompt_shortened``.
    ``retokenised`` counts rows that have logged tokens which could not be used, so that those of
    the text were taken: ``foreign_token_ids`` (not in the vocabulary), ``ids_disagree`` (they
    decode to another text).
    """

    rows: list[R] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    shortened: Counter[str] = field(default_factory=Counter)
    retokenised: Counter[str] = field(default_factory=Counter)

    def add(self, row: R, tokens: Tokens) -> None:
        """Take a row in, with what was done to its tokens."""
        self.rows.append(row)
        self.shortened.update(["prompt_shortened"] if tokens.shortened else [])
        self.retokenised.update(tokens.retokenised)


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The token ids that a model is given when it is to answer.

    Raises:
        jinja2.TemplateError: the chat template refuses the prompt.
    """
    return tuple(tokenizer(render(tokenizer, prompt), add_special_tokens=False)["input_ids"])


def encode_pairs(
    pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Encoding[EncodedPair]:
    """Encode pairs, in order; prompt and longer completion are at most ``max_length`` tokens."""
    pairs = list(pairs)
    questions = [
        Question(
            pair.prompt,
            (Answer(pair.chosen, pair.chosen_ids), Answer(pair.rejected, pair.rejected_ids)),
        )
        for pair in pairs
    ]
    encoding: Encoding[EncodedPair] = Encoding()
    for pair, tokens in zip(pairs, Tokeniser(tokenizer, max_length)(questions), strict=True):
        if isinstance(tokens, str):
            encoding.left_out[tokens] += 1
        elif tokens.answers[0] == tokens.answers[1]:
            encoding.left_out["same_tokens"] += 1
        else:
            chosen, rejected = tokens.answers
            encoding.add(EncodedPair(pair, tokens.prompt, chosen, rejected), tokens)
    return encoding


def encode_thumbs(
    thumbs: Iterable[Thumb], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Encoding[EncodedThumb]:
    """Encode thumbs, in order; prompt and longer completion are at most ``max_length`` tokens.

    The mismatched answer is the next one in the circle of the thumbs' ids that answers another
    prompt, in other tokens, and fits. Ids are hashes, so that this order is random and yet fixed: a
    thumb more changes the mismatch of its neighbour alone, and cached log-probs of the others hold.
    Where there is none, as for a single thumb, the reference point cannot be estimated, and the
    thumb is left out as ``no_mismatch``.
    """
    thumbs = list(thumbs)
    questions = [Question(t.prompt, (Answer(t.completion, t.token_ids),)) for t in thumbs]
    encoding: Encoding[EncodedThumb] = Encoding()
    found: list[tuple[Thumb, Tokens]] = []
    for thumb, tokens in zip(thumbs, Tokeniser(tokenizer, max_length)(questions), strict=True):
        if isinstance(tokens, str):
            encoding.left_out[tokens] += 1
        else:
            found.append((thumb, tokens))
    for (thumb, tokens), other in zip(found, _mismatches(found, max_length), strict=True):
        if other is None:
            encoding.left_out["no_mismatch"] += 1
        else:
            (own,) = tokens.answers
            encoding.add(EncodedThumb(thumb, tokens.prompt, own, other), tokens)
    return encoding


def _mismatches(found: Sequence[tuple[Thumb, Tokens]], max_length: int) -> Iterator[Ids | None]:
    """Of each thumb, another one's answer, or ``None``."""
    circle = sorted(range(len(found)), key=lambda number: found[number][0].thumb_id)
    place = {number: at for at, number in enumerate(circle)}
    for number, (_, own) in enumerate(found):
        after = range(place[number] + 1, place[number] + len(circle))
        others = (found[circle[at % len(circle)]][1] for at in after)
        yield next((o.answers[0] for o in others if _mismatch(own, o, max_length)), None)


def _mismatch(own: Tokens, other: Tokens, max_length: int) -> bool:
    (answer,) = other.answers
    apart = other.prompt != own.prompt and answer != own.answers[0]
    return apart and len(own.prompt) + len(answer) <= max_length
