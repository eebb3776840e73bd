"""Time-ordered unique ids, made without any state.

An id is a UUID version 7 (RFC 9562) whose twelve ``rand_a`` bits carry the fraction of the
millisecond (method 3), so that ids made one after another sort in that order. The other 62 bits
come from the operating system at every call: a forked child never repeats its parent's ids, as a
generator with state of its own would. Knows nothing of what is being named.
"""

from __future__ import annotations

import os
import time

_VERSION_7 = 0x7 << 76
_VARIANT = 0b10 << 62
_RANDOM_BITS = (1 << 62) - 1


def new_id() -> str:
    """Return a new id, such as ``0198c2a4-7d1e-7b3f-9c55-0a1b2c3d4e5f``."""
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    fraction = rest * 4096 // 1_000_000
    random = int.from_bytes(os.urandom(8), "big") & _RANDOM_BITS
    digits = f"{milliseconds << 80 | _VERSION_7 | fraction << 64 | _VARIANT | random:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
