"""`pip install '.[all]'` is enough for every guide, every example and the demo, but for chat apps.

Their frameworks are large, and an app brings its own: they have an extra each.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from sessions import ROOT, fences

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = {
    "agentpref",
    "cat",
    "cd",
    "cp",
    "echo",
    "gzip",
    "head",
    "ls",
    "mkdir",
    "mv",
    "printf",
    "rm",
}
NEEDED = re.compile(r"([\w.-]+)(?:\[([\w,-]+)\])?")


def packages(requirements: Iterable[str]) -> Iterator[str]:
    """The packages that requirements name, through the extras of our own."""
    for text in requirements:
        needed = NEEDED.match(text)
        assert needed is not None
        if needed[1] == "agentpref":
            for extra in needed[2].split(","):
                yield from packages(EXTRAS[extra])
        else:
            yield needed[1].lower().replace("_", "-")


def imported(program: str) -> set[str]:
    """The packages outside of Python and agentpref that a program imports."""
    names = set()
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    roots = {name.split(".")[0] for name in names}
    return {n for n in roots - sys.stdlib_module_names if not n.startswith("agentpref")}


APPS = {"chainlit", "gradio", "streamlit"}
"""The extras of chat frameworks, which `all` leaves out."""
INSTALLED = {*packages(PROJECT["dependencies"]), *packages(EXTRAS["all"])}
DISTRIBUTIONS = {
    name: {one.lower().replace("_", "-") for one in found}
    for name, found in packages_distributions().items()
}


def missing(names: Iterable[str], *, also: Iterable[str] = ()) -> list[str]:
    installed = {*INSTALLED, *(name for extra in also for name in packages(EXTRAS[extra]))}
    return sorted(name for name in names if not DISTRIBUTIONS.get(name, {name}) & installed)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_all_is_enough_for_a_guide(guide: Path) -> None:
    shown = fences(guide.read_text(encoding="utf-8"))
    programs = [fence.text for fence in shown if fence.language == "python"]
    commands = [
        line.split()[1]
        for fence in shown
        if fence.language == "console"
        for line in fence.text.splitlines()
        if line.startswith("$ ")
    ]
    apps = APPS if guide.name == "chat-apps.md" else ()
    assert missing({name for each in programs for name in imported(each)}, also=apps) == []
    assert {name for name in commands if name not in SHELL and name not in INSTALLED} == set()


def test_all_is_enough_for_the_examples_the_demo_and_the_data_frames() -> None:
    files = [
        *(ROOT / "examples").glob("*.py"),
        *(ROOT / "cli").rglob("*.py"),
        *(ROOT / "agentpref").rglob("*.py"),
    ]
    found = {name for file in files for name in imported(file.read_text(encoding="utf-8"))}
    assert {"langchain", "pandas", "pyarrow"} <= found
    elsewhere = {"bitsandbytes", "tomli"}  # for GPUs, and for Python 3.10
    elsewhere |= {"open_webui"}  # inside of which its function runs
    come_along = {"huggingface_hub", "markupsafe", "pydantic_core"}  # transformers, Jinja, pydantic
    assert missing(found - elsewhere - come_along, also=APPS) == []


def test_versions_of_what_all_installs_are_set() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {NEEDED.match(line)[1].lower() for line in lines if line and line[0] != "#"}
    assert INSTALLED - pinned == {"tomli"}, "which Python 3.11 does not need"
