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
        readable=False,  # not checked by Typer, whose message says neither why nor what to do
        help="Home folder [default: $AGENTPREF_HOME, or .agentpref].",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; needed where no terminal is.")]
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

_TOML_WORDS = ("true", "false", "inf", "nan")
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])", re.ASCII)


@contextmanager
def reading(folder: Path | None, namespace: str | None = None) -> Iterator[sqlite3.Connection]:
    """Open an existing home for reading, and close it afterwards.

    Raises:
        HomeError: there is no home at the folder, or it cannot be read.
        UnknownNamespace: other namespaces are in the home, and ``namespace`` is not.
    """
    from agentpref.home import Home
    from agentpref.record.database import connect, translated
    from agentpref.record.store import Store

    home = Home.open(folder)
    with translated(home), closing(connect(home, readonly=True)) as connection:
        if namespace is not None:
            Store(connection).require_namespace(namespace)
        yield connection


def held_out_share(connection: sqlite3.Connection, namespace: str, given: float | None) -> float:
    """The share of prompts to hold out: the given one, the last update's, or the default."""
    from agentpref.reading import last_held_out

    return last_held_out(connection, namespace) if given is None else given


def parse_age(text: str, option: str) -> float:
    """Read an age as seconds: ``90m`` is 5400.0.

    Raises:
        BadParameter: the text is not an age; the message names the option.
    """
    found = _AGE.fullmatch(text.strip())
    seconds = float(found[1]) * SECONDS[found[2]] if found else math.inf
    if math.isinf(seconds):
        raise typer.BadParameter(
            f"{text!r} is no age; give a number and one of s, m, h, d, w, such as 90d",
            param_hint=option,
        )
    return seconds


def parse_since(text: str, now: float, option: str) -> float:
    """Read a date, a date with a time, or an age before ``now``, as POSIX seconds.

    A date without a zone is local time.

    Raises:
        BadParameter: the text is none of these; the message names the option.
    """
    from datetime import datetime

    try:
        if _AGE.fullmatch(text.strip()):
            return now - parse_age(text, option)
        return datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text.strip())).timestamp()
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is no time; give an age such as 1d or 12h, or a date such as 2026-11-19",
            param_hint=option,
        ) from error


def read_object(text: str, *, option: str) -> dict[str, Any]:
    """Read a JSON object; ``BadParameter`` for anything else."""
    import orjson

    try:
        value = orjson.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}", param_hint=option) from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{text!r} is no JSON object", param_hint=option)
    return value


def read_settings(file: Path | None, assignments: Sequence[str]) -> dict[str, Any]:
    """Read the settings of a TOML file, overlaid with each ``KEY=VALUE`` in turn.

    Values are TOML (``0.2``, ``3``, ``true``, ``[0.8, 1.25]``) or one word (``ipo``).

    Raises:
        ConfigError: the file or an assignment cannot be read; the message names it.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        settings = {} if file is None else tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # errors of TOML and of UTF-8 are ValueErrors
        raise ConfigError(f"cannot read {file}: {error}; give a TOML file in UTF-8") from error
    try:
        for assignment in assignments:
            if "=" not in assignment or "\n" in assignment:
                raise ValueError("it needs a = and must be one line")
            name, _, value = assignment.partition("=")
            if re.fullmatch(r"[A-Za-z_]\w*", value.strip()) and value.strip() not in _TOML_WORDS:
                assignment = f"{name} = '{value.strip()}'"  # a bare word is text
            _overlay(settings, tomllib.loads(assignment))
    except ValueError as error:
        raise ConfigError(
            f"--set {assignment!r} is not KEY=VALUE with VALUE as in TOML, e.g. loss.beta=0.2 or "
            f"loss.kind=ipo ({error})"
        ) from error
    return settings


def _overlay(settings: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Change nested settings to those of ``above``."""
    for key, value in above.items():
        below = settings.get(key)
        if isinstance(below, dict) and isinstance(value, Mapping):
            _overlay(below, value)
        else:
            settings[key] = value


def parse_rewards(given: Sequence[str] | None) -> dict[str, float]:
    """The weights of ``--reward KEY[=WEIGHT]``, by key; 1 where none is given.

    Raises:
        typer.BadParameter: a weight is no number, or a key is given twice.
    """
    found: dict[str, float] = {}
    for text in given or ():
        key, sign, weight = text.partition("=")
        try:
            value = float(weight) if sign else 1.0
        except ValueError:
            value = math.nan
        if not key or not math.isfinite(value):
            raise typer.BadParameter(
                f"{text!r} is no KEY=WEIGHT with a number, such as resolved=2",
                param_hint="--reward",
            )
        if key in found:
            raise typer.BadParameter(f"{key!r} is given twice", param_hint="--reward")
        found[key] = value
    return found
