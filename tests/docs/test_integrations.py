"""The README's table of integrations: few lines, and each is one that a guide's test runs."""

from __future__ import annotations

import re

from sessions import ROOT

GUIDE = re.compile(r"\]\((docs/[\w-]+\.md)(#[\w-]+)?\)")


def rows():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Plug it in", 1)[1].split("\n## ", 1)[0]
    for line in section.splitlines():
        if line.startswith("|") and not line.startswith(("|---", "| what you run")):
            app, lines, guide = (cell.strip() for cell in line.strip("|").split(" | "))
            yield app, re.findall(r"`([^`]+)`", lines), GUIDE.search(guide)


def test_an_integration_takes_at_most_five_lines_and_they_stand_in_its_guide():
    found = list(rows())
    assert len(found) >= 12
    for app, lines, guide in found:
        assert len(lines) <= 5, app
        page = (ROOT / guide[1]).read_text(encoding="utf-8")
        for line in lines:
            if line.startswith(("from ", "log.", "cl.", "app", "feedback", "client", "callback")):
                assert line in page, f"{app}: {line}"


def test_the_anchors_of_the_table_exist():
    for app, _, guide in rows():
        if guide[2] is None:
            continue
        page = (ROOT / guide[1]).read_text(encoding="utf-8")
        titles = re.findall(r"^#+ (.*)$", page, flags=re.M)
        slugs = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
        assert guide[2][1:] in slugs, f"{app}: {guide[2]}"
