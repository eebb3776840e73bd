"""Options that several commands share, and how commands read what the user wrote in them.

Each shared option is declared once. Ages (`90d`) and dates become seconds, `--set KEY=VALUE` and
TOML files become nested settings, and `--home` becomes an open connection.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref.errors import ConfigError

if TYPE_CHECKING:
    import sqlite3

Home = Annotated[
    Path | None,
    typer.Option(
        "--home",
        metavar="FOLDER",
        help="Home folder [default: $AGENTPREF_HOME, or .agentpref].",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Namespace = Annotated[str, typer.Option(metavar="NAME", help="Which of the home's namespaces.")]
HeldOut = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        metavar="SHARE",
        help="Share of the prompts that is held out [default: that of the last update].",
        show_default=False,
    ),
]

SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
"""The length of each unit that an age may have."""

_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])", re.ASCII)


@contextmanager
def reading(folder: Path | None) -> Iterator[sqlite3.Connection]:
    """Open an existing home for reading, and close it afterwards.

    Raises:
        HomeError: there is no home at the folder, or it cannot be read.
    """
    from agentpref.home import Home
    from agentpref.record.database import connect, translated

    home = Home.open(folder)
    with translated(home), closing(connect(home, readonly=True)) as connection:
        yield connection


def held_out_share(
    home: Path | None, connection: sqlite3.Connection, namespace: str, given: float | None
) -> float:
    """The share of prompts to hold out: the given one, the last update's, or the default."""
    from agentpref.errors import UpdateError
    from agentpref.record.updates import Updates
    from agentpref.types import HELD_OUT

    if given is not None:
        return given
    try:
        config = Updates(connection).report(namespace).get("config")
    except UpdateError:
        return HELD_OUT  # no update yet
    if config is None:  # reports of 0.1.0 have no config, the manifests of revisions have
        from agentpref.serve.registry import Registry

        revisions = Registry(home, namespace=namespace).list()
        config = revisions[-1].manifest["training"].get("config", {}) if revisions else {}
    return float(config.get("held_out", HELD_OUT))


def parse_age(text: str) -> float | None:
    """Read an age as seconds: ``90m`` is 5400.0. None if the text is not an age."""
    found = _AGE.fullmatch(text.strip())
    seconds = float(found[1]) * SECONDS[found[2]] if found else math.inf
    return seconds if math.isfinite(seconds) else None


def parse_since(text: str, now: float) -> float:
    """Read a date, a date with a time, or an age before ``now``, as POSIX seconds.

    A date without a zone is local time.

    Raises:
        ValueError: the text is none of these.
    """
    from datetime import datetime

    age = parse_age(text)
    if age is not None:
        return now - age
    return datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text.strip())).timestamp()


def read_settings(file: Path | None, assignments: Sequence[str]) -> dict[str, Any]:
    """Read the settings of a TOML file, overlaid with each ``KEY=VALUE`` in turn.

    Values are written as in TOML: ``0.2``, ``3``, ``true``, ``"ipo"``, ``[0.8, 1.25]``.

    Raises:
        ConfigError: the file or an assignment cannot be read; the message names it.
    """
    settings: dict[str, Any] = {} if file is None else _read_toml(file)
    for assignment in assignments:
        settings = _overlay(settings, _parse_assignment(assignment))
    return settings


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}; give a TOML file in UTF-8") from error
    return _parse_toml(text, f"{file} is not TOML")


def _parse_assignment(assignment: str) -> dict[str, Any]:
    complaint = (
        f"--set {assignment!r} is not KEY=VALUE with VALUE as in TOML, e.g. loss.beta=0.2 or "
        "loss.kind='\"ipo\"'"
    )
    if "=" not in assignment or "\n" in assignment:
        raise ConfigError(complaint)
    return _parse_toml(assignment, complaint)


def _parse_toml(text: str, complaint: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{complaint} ({error})") from error


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested settings; those of ``above`` win."""
    merged = dict(below)
    for key, value in above.items():
        beneath = merged.get(key)
        both = isinstance(beneath, Mapping) and isinstance(value, Mapping)
        merged[key] = _overlay(beneath, value) if both else value  # type: ignore[arg-type]
    return merged
