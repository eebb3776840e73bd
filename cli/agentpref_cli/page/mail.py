"""Updates as Markdown: the morning mail.

It reads well as it is, since most mails of cron are not rendered: lists and no tables. What people
and models wrote can make no link, no picture and no HTML of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agentpref_cli.commands.report import taught
from agentpref_cli.commands.update import account, headline, identity
from agentpref_cli.terminal import one_line

_CODE = re.compile(r"(`[^`]+`)")
_SPECIAL = re.compile(r"[\\*_\[\]<|`]|^[>#+-]")
_WORD = re.compile(r"(?<=\w)_(?=\w)")  # which Markdown leaves alone


def several(subject: str, values: Sequence[tuple[Mapping[str, Any], str]]) -> Iterator[str]:
    """The lines of a mail on some updates, each with whether its revision serves today."""
    yield plain(subject)
    namespaces = {value["namespace"] for value, _ in values}
    for value, serving in values:
        yield ""
        yield from _update(value, serving, named=len(namespaces) > 1)


def one(value: Mapping[str, Any], serving: str) -> Iterator[str]:
    """The lines of a mail on one update."""
    yield from _update(value, serving, named=False)


def _update(value: Mapping[str, Any], serving: str, *, named: bool) -> Iterator[str]:
    where = f"{value['namespace']}, " if named else ""
    yield f"## {plain(where + headline(value, serving))}"
    yield ""
    for line in identity(value, serving):
        yield f"- {plain(line)}"
    for tag, found in value["accuracy"].items():
        change = f"{found['before']:.2f} -> {found['after']:.2f}"
        yield f"- {plain(tag)}: {plain(change)} on {found['pairs']:.0f} held-out pairs"
    words = value.get("overview", {}).get("words", ())
    for line in (*taught(words), *account(value), *value.get("notes", ())):
        yield f"- {plain(line)}"
    failed = [check for check in value["checks"] if not check["passed"]]
    if failed:
        yield ""
        yield "Checks that did not pass:"
        yield ""
        for check in failed:
            yield f"- **{plain(check['name'])}**: {plain(check['message'])}"


def plain(text: str) -> str:
    r"""A text as one line of Markdown that shows as it is; commands in single backticks stay code.

    >>> plain("[run](http://x) `agentpref update` <b> a_b * .5 -> .8")
    '\\[run\\](http://x) `agentpref update` &lt;b> a_b \\* .5 -> .8'
    """
    text = one_line(text)
    if "``" in text:  # several make code of another kind: none of it is
        return _escape(text)
    return "".join(part if _CODE.fullmatch(part) else _escape(part) for part in _CODE.split(text))


def _escape(text: str) -> str:
    text = text.replace("&", "&amp;") if "&" in text and ";" in text else text
    text = _WORD.sub("\0", text)
    text = _SPECIAL.sub(lambda found: "&lt;" if found[0] == "<" else "\\" + found[0], text)
    return text.replace("\0", "_")
