"""Generates pages of the documentation from the code: `make docs`.

- cli.md: the help of every command;
- schema.md: the reason for each migration, and the SQL of what it makes;
- the tables in updates.md: every setting with its default, its bounds and its description;
- the tables in models.md: what is trained of every shape of message under every family's template;
- the tables in guarantees.md: the names of the tests that are marked ``guarantee``.

A test compares the committed files with what this script generates. The output that guides show is
recorded by ``sessions.py``.
"""

from __future__ import annotations

import ast
import re
import sqlite3
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import is_dataclass
from inspect import getdoc
from pathlib import Path
from textwrap import dedent
from typing import Any

from agentpref import columns, config, settings
from agentpref.models.reasons import LEFT_OUT
from agentpref.record import migrations

DOCS = Path(__file__).parent
_SETTINGS = re.compile(r"(<!-- settings -->\n).*?(<!-- /settings -->)", re.DOTALL)
_FAMILIES = re.compile(r"(<!-- families -->\n).*?(<!-- /families -->)", re.DOTALL)
_GUARANTEES = re.compile(r"(<!-- guarantees: (\w+) -->\n).*?(<!-- /guarantees -->)", re.DOTALL)
_COLUMNS = re.compile(r"(<!-- columns: (\w+) -->\n).*?(<!-- /columns -->)", re.DOTALL)
_REASONS = re.compile(r"(<!-- reasons -->\n).*?(<!-- /reasons -->)", re.DOTALL)


_SPELLED = {
    "json": "JSON",
    "trl": "TRL",
    "vllm": "vLLM",
    "bases": "base's",
    "models": "model's",
    "guides": "guide's",
    "apps": "app's",
}
"""Words of tests' names that are written otherwise."""


def pages() -> dict[Path, str]:
    """The text that each generated file, or file with a generated part, should have."""
    updates = DOCS / "updates.md"
    guide = updates.read_text(encoding="utf-8")
    guarantees, shown = DOCS / "guarantees.md", _guarantees()
    promises = guarantees.read_text(encoding="utf-8")
    notebooks = DOCS / "notebooks.md"
    models = DOCS / "models.md"
    kept = _REASONS.sub(
        lambda m: m[1] + "\n".join(_reasons()) + m[2], models.read_text(encoding="utf-8")
    )
    return {
        DOCS / "cli.md": "\n".join(_commands()),
        DOCS / "schema.md": "\n".join(_schema()),
        guarantees: _GUARANTEES.sub(
            lambda m: (
                m[1]
                + "| guarantee | tried with | shown by |\n|---|---|---|\n"
                + "\n".join(shown.pop(m[2]))
                + "\n"
                + m[3]
            ),
            promises,
        ),
        models: _FAMILIES.sub(lambda m: m[1] + "\n".join(_families()) + m[2], kept),
        notebooks: _COLUMNS.sub(
            lambda m: m[1] + "\n".join(_columns(m[2])) + m[3], notebooks.read_text(encoding="utf-8")
        ),
        updates: _SETTINGS.sub(lambda m: m[1] + "\n".join(_settings()) + m[2], guide),
    }


def _commands() -> Iterator[str]:
    """The page of the command line: the help of each command, as it is printed."""
    yield "# The command line\n"
    yield "Written by `make docs` from the help of each command; do not edit. With `--json` a"
    yield "command prints one object on standard output, and nothing else there.\n"
    for words in _command_names():
        yield f"## {' '.join(('agentpref', *words))}\n"
        yield f"```text\n{_help(words)}```\n"


def _command_names() -> Iterator[tuple[str, ...]]:
    """Each command by the words after `agentpref`, in the order of the help, the root first."""
    import typer.main

    from agentpref_cli.main import app

    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield words
        for name, below in getattr(command, "commands", {}).items():
            yield from walk(below, (*words, name))

    yield from walk(typer.main.get_command(app), ())


def _help(words: tuple[str, ...]) -> str:
    from typer.testing import CliRunner

    from agentpref_cli.main import app

    runner = CliRunner(env={"COLUMNS": "100"})
    return runner.invoke(app, [*words, "--help"], prog_name="agentpref").output


def _schema() -> Iterator[str]:
    """The page of the database: of each migration its reason, and what it makes."""
    yield "# The database\n"
    yield "Written by `make docs` from the migrations; do not edit.\n"
    yield "A home folder holds one SQLite file, `agentpref.db`, in WAL mode. Read it with any tool;"
    yield "write to it through agentpref only.\n"
    yield _markdown(migrations).split("\n\n", 1)[1] + "\n"
    with closing(sqlite3.connect(":memory:")) as connection:
        for step in migrations.STEPS:
            before = _objects(connection)
            step.change(connection)
            made = [sql for name, sql in _objects(connection).items() if before.get(name) != sql]
            yield f"## {step.version}. {step.name.replace('_', ' ').capitalize()}\n"
            yield _markdown(step.change) + "\n"
            yield "```sql\n" + "\n\n".join(map(_indented, made)) + "\n```\n"


def _objects(connection: sqlite3.Connection) -> dict[str, str]:
    found = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"
        " AND name NOT LIKE 'sqlite_%' ORDER BY rowid"
    )
    return dict(found.fetchall())


def _indented(sql: str) -> str:
    """The statement with the indentation of a page, not of the code that it stands in."""
    first, *lines = sql.splitlines()
    return "\n".join((first, dedent("\n".join(lines)).replace("    ", "  "))).rstrip() + ";"


def _settings() -> Iterator[str]:
    """A table for each group of settings: names, defaults, what is allowed, and what they do."""
    for group, prefix in _groups():
        yield f"\n{_markdown(group)}\n"
        yield "| setting | default | must be | description |\n|---|---|---|---|"
        for name, field in group.__pydantic_fields__.items():
            if not is_dataclass(field.annotation):
                cells = (f"`{prefix}{name}`", _default(field.default), settings.allowed(field))
                yield f"| {' | '.join(cells)} | {field.description} |"
    yield "\n"


def _groups() -> Iterator[tuple[Any, str]]:
    """The groups of settings with the prefixes of their names, the settings of no group first."""
    yield config.UpdateConfig, ""
    for name, field in config.UpdateConfig.__pydantic_fields__.items():  # type: ignore[attr-defined]
        if is_dataclass(field.annotation):
            yield field.annotation, f"{name}."


def _guarantees() -> dict[str, list[str]]:
    """Of each section of the page, a row for each test that is marked ``guarantee(section)``.

    A second argument of the mark says what was tried; it may use constants of the test's module.
    """
    rows = defaultdict[str, list[str]](list)
    for file in sorted((DOCS.parent / "tests").rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        if "mark.guarantee(" not in text:
            continue
        tree = ast.parse(text)
        constants = dict(_constants(tree))
        for node in ast.walk(tree):
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.guarantee":
                    words = [eval(ast.unparse(given), {}, constants) for given in mark.args]
                    section, tried = (*words, "")[:2]
                    path = file.relative_to(DOCS.parent).as_posix()
                    cells = (_sentence(node.name), tried, f"[{file.name}](../{path})")
                    rows[section].append(f"| {' | '.join(cells)} |")
    return rows


def _constants(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """The constants of a module that are written out as numbers, texts or collections of them."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            with suppress(ValueError):
                yield statement.targets[0].id, ast.literal_eval(statement.value)


def _sentence(name: str) -> str:
    """The name of a test as it would be written."""
    words = name.removeprefix("test_").split("_")
    found = " ".join(_SPELLED.get(word, word) for word in words)
    return found[0].upper() + found[1:]


def _families() -> Iterator[str]:
    """A table of chat templates and shapes of messages, made by training's own tokenizer."""
    from tests.core.models.families import FAMILIES, SHAPES, outcome, reads_thinking

    yield f"| template | {' | '.join(SHAPES)} | text, `enable_thinking=false` |"
    yield "|---" * (len(SHAPES) + 2) + "|"
    for family in FAMILIES:
        found = [outcome(family, shape) for shape in SHAPES]
        off = outcome(family, "text", enable_thinking=False) if reads_thinking(family) else ""
        cells = [cell.removeprefix("template_").replace("_", " ") for cell in (*found, off)]
        yield f"| {family} | {' | '.join(cells)} |"
    yield ""


def _columns(kind: Any) -> Iterator[str]:
    """A table of the columns that a notebook gets of one kind of records."""
    yield "| column | type | content |\n|---|---|---|"
    for column in columns.COLUMNS[kind]:
        yield f"| `{column.name}` | {column.type} | {column.meaning} |"
    yield ""


def _reasons() -> Iterator[str]:
    """A table of the reasons why an example is left out."""
    yield "| reason | what it means |\n|---|---|"
    for reason, words in LEFT_OUT.items():
        yield f"| `{reason}` | {words} |"
    yield ""


def _markdown(documented: object) -> str:
    """A docstring, with code marked as Markdown has it."""
    return (getdoc(documented) or "").replace("``", "`")


def _default(value: object) -> str:
    return f"`{list(value) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))  # of the tests
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
        print(page)
