"""The items of one JSON list as texts, in bounded memory.

Items are told apart by brackets, quotes and commas alone, without parsing them, so that one that is
no JSON is still an item, and those after it are found. Knows nothing of files or rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import TypeAlias

from agentpref.errors import ExchangeError

Text: TypeAlias = "bytes | ExchangeError"
"""What is to be parsed, or why there is nothing to parse."""

_SIGN = {False: re.compile(rb'["\[\]{},]'), True: re.compile(rb'["\\]')}
"""What matters outside a JSON string, and within one."""


def items(chunks: Iterator[bytes], limit: int) -> Iterator[Text]:
    """Yield the items of a list that comes in chunks, those that are blank left out.

    An item is cut off some way after ``limit`` bytes. A list that does not end, or that does not
    end the text, yields an error as its last item.
    """
    item, depth, quoted, at = bytearray(), 0, False, 0
    for chunk in chunks:
        start = 0
        while found := _SIGN[quoted].search(chunk, at):
            sign, at = found[0], found.end()
            if sign == b"\\":
                at += 1  # over the sign that is escaped, which may be in the next chunk
            elif sign == b'"':
                quoted = not quoted
            elif sign in b"[{":
                depth += 1
                start = at if depth == 1 else start
            else:
                if depth == 1:
                    item += chunk[start : found.start()]
                    yield from _unless_blank(item)
                    item, start = bytearray(), at
                depth -= sign != b","
            if depth == 0:
                yield from _rest(chain([chunk[at:]], chunks))
                return
        at = max(at - len(chunk), 0)
        if len(item) <= limit:
            item += chunk[start:]
    yield from _unless_blank(item)
    yield ExchangeError("the list does not end; the file seems to be cut off, so fetch it again")


def _unless_blank(item: bytearray) -> Iterator[bytes]:
    if item.strip():
        yield bytes(item)


def _rest(chunks: Iterator[bytes]) -> Iterator[ExchangeError]:
    if any(chunk.strip() for chunk in chunks):
        yield ExchangeError(
            "text follows the end of the list; keep to one list, or write one object on each line"
        )
