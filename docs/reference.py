"""Generates pages of the documentation from the code: `make docs`.

- cli.md: the help of every command;
- schema.md: the reason for each migration, and the SQL of what it makes;
- the tables in updates.md: every setting with its default, its bounds and its description;
- the tables in models.md: what is trained of every shape of message under every family's template.

A test compares the committed files with what this script generates. The output that guides show is
recorded by ``sessions.py``.
"""

from __future__ import annotations

import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import is_dataclass
from inspect import getdoc
from pathlib import Path
from textwrap import dedent
from typing import Any

from agentpref import config
from agentpref.models.reasons import LEFT_OUT
from agentpref.record import migrations

DOCS = Path(__file__).parent
_SETTINGS = re.compile(r"(<!-- settings -->\n).*?(<!-- /settings -->)", re.DOTALL)
_FAMILIES = re.compile(r"(<!-- families -->\n).*?(<!-- /families -->)", re.DOTALL)
_REASONS = re.compile(r"(<!-- reasons -->\n).*?(<!-- /reasons -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """The text that each generated file, or file with a generated part, should have."""
    updates = DOCS / "updates.md"
    guide = updates.read_text(encoding="utf-8")
    models = DOCS / "models.md"
    kept = _REASONS.sub(
        lambda m: m[1] + "\n".join(_reasons()) + m[2], models.read_text(encoding="utf-8")
    )
    return {
        DOCS / "cli.md": "\n".join(_commands()),
        DOCS / "schema.md": "\n".join(_schema()),
        models: _FAMILIES.sub(lambda m: m[1] + "\n".join(_families()) + m[2], kept),
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
                cells = (f"`{prefix}{name}`", _default(field.default), config.allowed(field))
                yield f"| {' | '.join(cells)} | {field.description} |"
    yield "\n"


def _groups() -> Iterator[tuple[Any, str]]:
    """The groups of settings with the prefixes of their names, the settings of no group first."""
    yield config.UpdateConfig, ""
    for name, field in config.UpdateConfig.__pydantic_fields__.items():  # type: ignore[attr-defined]
        if is_dataclass(field.annotation):
            yield field.annotation, f"{name}."


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
