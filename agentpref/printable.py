"""Text that a terminal shows as it is, whatever people wrote, and commands to be typed there.

A logged text may hold control characters that move the cursor or retitle the window (C0, and C1
such as U+009B), and format characters that reorder what is seen (bidi) or cannot be seen. Nothing
that goes to a terminal or a pipe holds them raw.
"""

from __future__ import annotations

import shlex


def escaped(text: str, keep: str = "") -> str:
    r"""Write each character that is not printable as JSON does (``\u009b``); leave ``keep`` as is.

    JSON text on one line stays JSON, and reads back as the same value.

    >>> escaped('{"name": "\u202eana"}') == '{"name": "' + "\\" + 'u202eana"}'
    True
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)


def in_namespace(command: str, namespace: str) -> str:
    """Complete a command of ours for a namespace; the default one needs no mention.

    >>> in_namespace("agentpref adapters rollback", "my shop")
    "agentpref adapters rollback --namespace 'my shop'"
    """
    return command if namespace == "default" else f"{command} --namespace {shlex.quote(namespace)}"


def _escape(character: str) -> str:
    code = ord(character)
    if code < 1 << 16:
        return f"\\u{code:04x}"
    return f"\\u{0xD7C0 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
