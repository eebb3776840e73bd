"""Whether a rendered conversation holds what was said, all of it and nothing else.

A chat template may drop what its model was never trained on: a tool call, a part of a message, a
role. What it leaves would then be trained as if it had been said. So every piece of a message's
words must be found in the rendering: the texts, the reasoning, the names and arguments of calls.
Each place counts for one piece, so that of two equal calls none can be lost, and a piece that is a
word must stand there as a word.

Templates trim and join, so white space around a piece does not count. A piece may stand there as it
is, or as JSON writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from agentpref.models.turns import Turn

_FOUND, _SPECIAL = "\0", "\1"
_THOUGHT = re.compile(r"(</?think>)")


class Piece(NamedTuple):
    """Some words of a message, and the reason that leaves a row out if they are lost.

    ``words`` are strings that white space may separate. ``message`` is the number of the message in
    its conversation; the answer's is -1.
    """

    words: tuple[str, ...]
    reason: str
    message: int


def pieces_of_prompt(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Piece]:
    """What the rendering of a prompt must hold.

    The reasoning of earlier turns is not asked for: templates drop it, in serving too.
    """
    pieces: list[Piece] = []
    for tool in tools:
        function = tool.get("function")
        name = (function if isinstance(function, Mapping) else tool).get("name")
        pieces.append(Piece((str(name or ""),), "template_drops_tools", 0))
    for number, turn in enumerate(turns):
        texts = (turn.without_thought(),) if turn.role == "assistant" else turn.texts
        pieces += [Piece(texts, "template_drops_text", number), *_calls(turn, number)]
    return pieces


def pieces_of_answer(turn: Turn) -> list[Piece]:
    """What the rendering of a completion must hold."""
    return [
        Piece(tuple(_THOUGHT.split(turn.text)), "template_drops_text", -1),
        Piece((turn.reasoning,), "template_drops_reasoning", -1),
        *_calls(turn, -1),
    ]


def _calls(turn: Turn, number: int) -> Iterator[Piece]:
    for call in turn.calls:
        function = call.get("function", call) if isinstance(call, Mapping) else {"name": call}
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


def lost(rendered: str, pieces: Iterable[Piece]) -> Piece | str:
    """The first piece that is not in the rendering; or what else is there.

    In the latter, a zero character stands for each piece.

    >>> lost("<user> two words ", [Piece(("two", "words"), "template_drops_text", 0)])
    '<user> \\x00 '
    """
    # The longest first, lest a short one take its place within a longer one.
    for piece in sorted(pieces, key=lambda piece: -sum(map(len, piece.words))):
        found = next((span for form in _forms(piece) if (span := _find(rendered, form))), None)
        if found is None:
            return piece
        start, end = found
        if start < end:
            rendered = f"{rendered[:start]}{_FOUND}{rendered[end:]}"
    return rendered


def _forms(piece: Piece) -> Iterator[list[str]]:
    """The words of a piece as they are and as JSON writes them."""
    words = [word for word in piece.words if word.strip()]
    trimmed = [word.strip() for word in words]
    yield trimmed
    for ascii_only in (False, True):
        for written in (trimmed, words):
            yield [json.dumps(word, ensure_ascii=ascii_only)[1:-1] for word in written]


def _find(text: str, words: Sequence[str]) -> tuple[int, int] | None:
    """Where the words stand, one after the other; not within a longer word."""
    start = 0 if words else len(text)
    while words and (start := text.find(words[0], start)) >= 0:
        end = start + len(words[0])
        for word in words[1:]:
            begin = end + len(text[end:]) - len(text[end:].lstrip())
            if not text.startswith(word, begin):
                break
            end = begin + len(word)
        else:
            if not (_joins(text, start) or _joins(text, end)):
                return start, end
        start += 1
    return None if words else (start, start)


def _joins(text: str, at: int) -> bool:
    """Whether the characters before and at a place belong to one word."""
    return 0 < at < len(text) and all(_is_word(letter) for letter in text[at - 1 : at + 1])


def _is_word(letter: str) -> bool:
    return letter == "_" or (letter.isascii() and letter.isalnum())


def is_bare(left: str, special: Sequence[str]) -> bool:
    """Whether nothing but the pieces was said, in what :func:`lost` left of a completion.

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
