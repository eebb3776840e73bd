"""Whether a rendered conversation holds what was said, all of it and nothing else.

A chat template may drop what its model was never trained on: a tool call, a part of a message, a
role. What it leaves would then be trained as if it had been said. So every piece of a message's
words must be found in the rendering: the texts, the reasoning, the names and arguments of calls.
Messages must stand there one after the other, and each place counts for one piece, so that of two
equal calls none can be lost. A piece that is a word must stand there as a word.

Templates trim and join, so white space around a piece does not count. A piece may stand there as it
is, or as JSON or Python writes it. Templates move system messages and tools to where they like.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from agentpref.models.turns import Turn

Span: TypeAlias = "tuple[int, int]"

_FOUND, _SPECIAL = "\0", "\1"
_THOUGHT = re.compile(r"(</?think>)")
_MOVED = frozenset({"system", "developer"})


class Piece(NamedTuple):
    """Some words of a message, and the reason that leaves a row out if they are lost.

    ``words`` are strings that white space may separate. ``message`` is the number of the message in
    its conversation; the answer's is -1.
    """

    words: tuple[str, ...]
    reason: str
    message: int

    @property
    def size(self) -> int:
        """How many letters must be found."""
        return sum(len(word.strip()) for word in self.words)


def lost_of_prompt(
    rendered: str, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]
) -> Piece | None:
    """The first piece of a prompt that its rendering does not hold.

    The reasoning of earlier turns is not asked for: templates drop it, in serving too.
    """
    for tool in tools:
        function = tool.get("function")
        name = (function if isinstance(function, Mapping) else tool).get("name")
        piece = Piece((str(name or ""),), "template_drops_tools", 0)
        if _find(rendered, piece, 0) is None:
            return piece
    at = 0
    for number, turn in enumerate(turns):
        texts = (turn.without_thought(),) if turn.role == "assistant" else turn.texts
        pieces = [Piece(texts, "template_drops_text", number), *_calls(turn, number)]
        spans = _place(rendered, pieces, 0 if turn.role in _MOVED else at)
        if isinstance(spans, Piece):
            return spans
        if turn.role not in _MOVED:
            at = max([at, *(end for _, end in spans)])
    return None


def pieces_of_answer(turn: Turn) -> list[Piece]:
    """What the rendering of a completion must hold."""
    return [
        Piece((turn.reasoning,), "template_drops_reasoning", -1),
        Piece(tuple(_THOUGHT.split(turn.text)), "template_drops_text", -1),
        *_calls(turn, -1),
    ]


def lost_of_answer(rendered: str, turn: Turn) -> Piece | str:
    """The first piece of a completion that its rendering does not hold, or what else is there.

    In the latter, a zero character stands for each piece.
    """
    pieces = pieces_of_answer(turn)
    start = 0
    if not (turn.calls or turn.reasoning):  # what stands before the text may spell the same words
        start = max([0, *(rendered.rfind(form[0]) for form in _forms(pieces[1]) if form)])
        start = start if isinstance(_place(rendered, pieces, start), list) else 0
    spans = _place(rendered, pieces, start)
    if isinstance(spans, Piece):
        return spans
    parts, at = [], 0
    for begin, end in sorted(spans):
        parts += [rendered[at:begin], _FOUND]
        at = end
    return "".join([*parts, rendered[at:]])


def _calls(turn: Turn, number: int) -> Iterator[Piece]:
    for call in turn.calls:
        function = call.get("function", call)
        for word in (function.get("name"), *_leaves(function.get("arguments"))):
            yield Piece((str(word),), "template_drops_tool_calls", number)


def _leaves(value: Any) -> Iterator[str]:
    """The keys and values of arguments as text; constants are written in too many ways."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        yield str(value)


def _place(text: str, pieces: Sequence[Piece], start: int) -> list[Span] | Piece:
    """Where the pieces of a message stand from ``start`` on; else one that has no place.

    They are looked for in their order, and if that fails in any order: some templates write a call
    before the text beside it, or sort arguments.
    """
    pieces = [piece for piece in pieces if piece.size]
    spans: list[Span] = []
    for piece in pieces:
        span = _find(text, piece, spans[-1][1] if spans else start)
        if span is None:
            break
        spans.append(span)
    else:
        return spans
    spans = []
    # The longest first, lest a short one take its place within a longer one.
    for piece in sorted(pieces, key=lambda piece: -piece.size):
        span = _find(text, piece, start)
        while span is not None and _overlaps(span, spans):
            span = _find(text, piece, span[0] + 1)
        if span is None:
            return piece
        insort(spans, span)
    return spans


def _overlaps(span: Span, spans: Sequence[Span]) -> bool:
    after = bisect_left(spans, span)
    before = after > 0 and spans[after - 1][1] > span[0]
    return before or (after < len(spans) and spans[after][0] < span[1])


def _find(text: str, piece: Piece, start: int) -> Span | None:
    """Where a piece stands from ``start`` on, in the first form that is there."""
    found = (_find_words(text, form, start) for form in _forms(piece))
    return next((span for span in found if span is not None), None)


def _forms(piece: Piece) -> Iterator[list[str]]:
    """The words of a piece as they are, and as JSON and Python write them."""
    words = [word for word in piece.words if word.strip()]
    trimmed = [word.strip() for word in words]
    yield trimmed
    for written in (trimmed, words, ["\n".join(trimmed)], ["\n".join(words)]):
        yield [json.dumps(word, ensure_ascii=False)[1:-1] for word in written]
        yield [json.dumps(word)[1:-1] for word in written]
        yield [repr(word)[1:-1] for word in written]


def _find_words(text: str, words: Sequence[str], start: int) -> Span | None:
    """Where words stand one after the other, and not within a longer word."""
    if not words:
        return start, start
    while (start := text.find(words[0], start)) >= 0:
        end = start + len(words[0])
        for word in words[1:]:
            while end < len(text) and text[end].isspace():
                end += 1
            if not text.startswith(word, end):
                break
            end += len(word)
        else:
            if not (_joins(text, start) or _joins(text, end)):
                return start, end
        start += 1
    return None


def _joins(text: str, at: int) -> bool:
    """Whether the characters before and at a place belong to one word."""
    return 0 < at < len(text) and all(_is_word(letter) for letter in text[at - 1 : at + 1])


def _is_word(letter: str) -> bool:
    return letter == "_" or (letter.isascii() and letter.isalnum())


def is_bare(left: str, special: Sequence[str]) -> bool:
    """Whether nothing but the pieces was said, in what :func:`lost_of_answer` left.

    Special tokens may surround the pieces, and words may come before, up to such a token: they name
    a channel, as in ``<|channel|>final<|message|>``.

    >>> is_bare("<|channel|>final<|message|>\0<|end|>", ["<|channel|>", "<|message|>", "<|end|>"])
    True
    >>> is_bare("<think></think>\0<|im_end|>", ["<|im_end|>"])
    False
    """
    for token in special:
        left = left.replace(token, _SPECIAL)
    parts = squeezed(left).split(_SPECIAL)
    first = next((number for number, part in enumerate(parts) if _FOUND in part), 0)
    return all(set(part) <= {_FOUND} for part in parts[first:])


def squeezed(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())
