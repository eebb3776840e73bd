"""Writes the parts of the documentation that the code knows better: `make docs`.

cli.md is the help of every command, schema.md what the migrations say and make, and the table in
updates.md the settings with their defaults. A test compares the committed files with what is
written here. What guides show as output is recorded by ``sessions.py``, not here.
"""

from __future__ import annotations

import ast
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import fields, is_dataclass
from inspect import getdoc, getsource
from pathlib import Path
from textwrap import dedent
from typing import Any

from agentpref import config
from agentpref.record import migrations

DOCS = Path(__file__).parent
_SETTINGS = re.compile(r"(<!-- settings -->\n).*?(<!-- /settings -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """The text that each generated file, or file with a generated part, should have."""
    updates = DOCS / "updates.md"
    guide = updates.read_text(encoding="utf-8")
    return {
        DOCS / "cli.md": "\n".join(_commands()),
        DOCS / "schema.md": "\n".join(_schema()),
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
    """A table for each group of settings: names, defaults, and what is allowed."""
    allowed = _allowed()
    for kind, prefix in _groups(config.UpdateConfig, ""):
        yield f"\n{_markdown(kind)}\n"
        yield "| setting | default | must be |\n|---|---|---|"
        for field in fields(kind):
            name = prefix + field.name
            if not _is_group(field):
                yield f"| `{name}` | {_default(field.default)} | {allowed.get(name, '')} |"
    yield "\n"


def _groups(kind: Any, prefix: str) -> Iterator[tuple[Any, str]]:
    yield kind, prefix
    for field in fields(kind):
        if _is_group(field):
            yield from _groups(field.default_factory, f"{prefix}{field.name}.")


def _is_group(field: Any) -> bool:
    return is_dataclass(field.default_factory)


def _markdown(documented: object) -> str:
    """A docstring, with code marked as Markdown has it."""
    return (getdoc(documented) or "").replace("``", "`")


def _default(value: object) -> str:
    return "chosen" if value is None else f"`{list(value) if isinstance(value, tuple) else value}`"


def _allowed() -> Mapping[str, str]:
    """What the checks of config.py say that each setting must be."""
    tree = ast.parse(getsource(config))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    checks = [c.args for c in calls if isinstance(c.func, ast.Name) and c.func.id == "_require"]
    return {_text(name): _text(words) for _, name, _, words in checks}


def _text(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else ""


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
        print(page)
