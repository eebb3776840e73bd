"""Decoding token ids to text piece by piece, while a model generates.

A token may be part of a character, and a stop string may be spread over several tokens. So a piece
of text is returned once no later token can change it. Callers push no special tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF_A_CHARACTER = "\ufffd"


class TextStream:
    """The text of one answer while it grows.

    Args:
        decode: token ids to text. It is called on short windows, so that a long answer costs no
            more per token than a short one.
        stop: strings that end the answer; the text ends before the first that occurs.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._text = ""
        self._sent = 0
        # Tokens before `_read` are in the text. Those from `_context` on are decoded again with
        # later ones, since a token's text may depend on the token before it.
        self._context = 0
        self._read = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """The text returned so far; all of it after :meth:`finish`."""
        return self._text[: self._sent]

    def push(self, *tokens: int) -> str:
        """Add tokens; return the text that is now final, which may be empty."""
        self._ids.extend(tokens)
        fresh = self._fresh()
        if not fresh.endswith(_HALF_A_CHARACTER):
            self._take(fresh)
        return self._send(len(self._text) - self._withheld())

    def finish(self) -> str:
        """End the answer; return the text that was still withheld."""
        self._take(self._fresh())
        return self._send(len(self._text))

    def _fresh(self) -> str:
        before = self._decode(self._ids[self._context : self._read])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _take(self, fresh: str) -> None:
        if not fresh or self.stopped:
            return
        self._context, self._read = self._read, len(self._ids)
        searched = max(0, len(self._text) - max(map(len, self._stop), default=0) + 1)
        self._text += fresh
        found = [self._text.find(stop, searched) for stop in self._stop]
        cuts = [position for position in found if position >= 0]
        if cuts:
            self._text, self.stopped = self._text[: min(cuts)], True

    def _withheld(self) -> int:
        """Length of the longest end of the text that could be the start of a stop string."""
        if self.stopped:
            return 0
        longest = max(map(len, self._stop), default=1) - 1
        tails = (self._text[-length:] for length in range(min(longest, len(self._text)), 0, -1))
        return next((len(t) for t in tails if any(s.startswith(t) for s in self._stop)), 0)

    def _send(self, until: int) -> str:
        piece = self._text[self._sent : until]
        self._sent = max(self._sent, until)
        return piece
