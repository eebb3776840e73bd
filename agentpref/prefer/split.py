"""Which prompts prove adapters and which ones train them.

The side is a function of the prompt alone, so that it is settled before anything else sees the
prompt, is the same in every process and for ever, and moves no row when rows are added. System
messages do not count: they often carry a date or a user's name, and the same question under
another system prompt must not stand on both sides. Knows nothing of pairs, logs or labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import orjson

from agentpref.types import Message


def split_point(messages: Sequence[Message]) -> float:
    """Map a prompt to a point in [0, 1), uniformly and for ever."""
    asked = [[m["role"], m.get("content")] for m in messages if m["role"] != "system"]
    digest = hashlib.blake2b(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS), digest_size=8)
    return int.from_bytes(digest.digest(), "big") / 2**64


def is_held_out(messages: Sequence[Message], share: float) -> bool:
    """Say whether a prompt belongs to the held-out side when ``share`` of all prompts does."""
    return split_point(messages) < share
