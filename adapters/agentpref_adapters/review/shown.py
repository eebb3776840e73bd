"""Shows what was logged: Markdown as cleaned HTML, everything else as text.

Whatever an answer has in it, nothing of it runs, and nothing is fetched: HTML in it is text, images
are their descriptions, and of the rest only a few tags are left (nh3).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from typing import Any

from agentpref.prefer.judges.asking import said
from agentpref.types import Message

LONGEST = 20_000
"""Characters of a text that are shown; the rest is counted."""

_TAGS = {
    "p", "br", "hr", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li", "h1", "h2",
    "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td", "a",
}  # fmt: skip
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that turn the direction of what follows them."""


def html_of(message: Message) -> str:
    """An answer as HTML that is safe to show: its text as Markdown, and its tool calls."""
    parts = [_markdown(_text(message.get("content")))]
    parts += [_call(call) for call in message.get("tool_calls") or ()]
    return "\n".join(part for part in parts if part) or "<p><em>(nothing)</em></p>"


def plain_of(message: Message) -> str:
    """An answer or a turn as text without control characters."""
    return without_controls(said(message))


def without_controls(text: str) -> str:
    """A text without control characters, and without those that turn its direction."""
    return _CONTROL.sub("", text)


def turn_of(message: Message) -> tuple[str, str]:
    """Who speaks in a turn of a prompt, and what, as HTML."""
    return str(message.get("role")), html_of(message)


def difference(one: Message, other: Message) -> str:
    """What is in one answer and not in the other, word by word, as HTML; empty if too long."""
    texts = [without_controls(said(message)) for message in (one, other)]
    if max(map(len, texts)) > LONGEST:
        return ""
    words = [re.findall(r"\s+|[^\s]+", text) for text in texts]
    found = []
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(
        None, words[0], words[1], autojunk=False
    ).get_opcodes():
        before, after = "".join(words[0][a0:a1]), "".join(words[1][b0:b1])
        if kind == "equal":
            found.append(escape(before))
            continue
        found += [f"<del>{escape(before)}</del>"] * bool(before)
        found += [f"<ins>{escape(after)}</ins>"] * bool(after)
    return "".join(found)


def _text(content: Any) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "\n\n".join(
            str(part.get("text") or f"[{part.get('type', 'something')}]")
            if isinstance(part, Mapping)
            else str(part)
            for part in content
        )
    return "" if content is None else str(content)


def _markdown(text: str) -> str:
    import nh3

    shown = without_controls(text)
    if not shown.strip():
        return ""
    more = len(text) - LONGEST
    made = nh3.clean(
        _renderer().render(shown[:LONGEST]),
        tags=_TAGS,
        attributes={"a": {"href"}, "th": {"align"}, "td": {"align"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )
    return made + (f"<p><em>… {more:,} characters more</em></p>" if more > 0 else "")


@cache
def _renderer() -> Any:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")


def _call(call: Any) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    given = function if isinstance(function, Mapping) else {}
    arguments = given.get("arguments", "")
    try:
        arguments = json.dumps(json.loads(arguments), indent=2, ensure_ascii=False)
    except (TypeError, ValueError):
        arguments = str(arguments)
    name = escape(without_controls(str(given.get("name", "?"))))
    shown = escape(without_controls(arguments)[:LONGEST])
    return f"<p>calls <code>{name}</code></p><pre><code>{shown}</code></pre>"
