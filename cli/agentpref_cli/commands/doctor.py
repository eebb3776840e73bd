"""`doctor`: looks at the installation, the home and the model, and says what cannot be used."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from agentpref_cli import options
from agentpref_cli.terminal import moment, print_result, show_checks

if TYPE_CHECKING:
    from agentpref.home import Home
    from agentpref.serve.registry import Registry

_EXTRA = re.compile(r"(?!agentpref\b)([\w.-]+).*\bextra == ['\"](?!all|bench|dev)(\w+)['\"]")


class Finding(NamedTuple):
    """What was looked at, whether it can be used, and what was found."""

    name: str
    passed: bool
    message: str


def doctor(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Base model to look for; one on a hub is fetched.")
    ] = "tiny",
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Check the installation, the home and the model.

    Exits 1 if one of them cannot be used.
    """
    from agentpref.home import Home

    place = Home(Home.resolve(home))
    findings = [
        *_installation(),
        _torch(),
        _home(place, named=home is not None),
        *_waiting(place),
        *_serving(place),
        _model(model),
    ]
    healthy = all(finding.passed for finding in findings)
    rows = [finding._asdict() for finding in findings]
    print_result(as_json, {"healthy": healthy, "checks": rows}, lambda: show_checks(rows))
    raise typer.Exit(0 if healthy else 1)


def _installation() -> Iterator[Finding]:
    """The versions of agentpref, and of the packages of each extra."""
    import platform
    import sqlite3
    from importlib.metadata import requires

    from agentpref import __version__

    python, sqlite = platform.python_version(), sqlite3.sqlite_version
    yield Finding("agentpref", True, f"{__version__} on Python {python}, SQLite {sqlite}")
    extras: dict[str, dict[str, str | None]] = defaultdict(dict)
    for needed in filter(None, map(_EXTRA.fullmatch, requires("agentpref") or ())):
        extras[needed[2]][needed[1]] = _version(needed[1])
    for extra, found in extras.items():
        message = ", ".join(f"{name} {found[name]}" for name in found)
        if missing := [name for name in found if found[name] is None]:
            message = (
                f"not installed ({', '.join(missing)}); to use it: pip install 'agentpref[{extra}]'"
            )
        yield Finding(extra, True, message)


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> Finding:
    """Import torch if it is installed, so that a broken one fails here and not in an update."""
    cores = f"{os.cpu_count()} cores"
    if _version("torch") is None:
        return Finding("threads", True, f"{cores}; torch is not installed")
    try:
        torch = import_module("torch")
    except (ImportError, OSError) as error:
        return Finding("threads", False, f"torch cannot be imported: {error}; install it again")
    device = "a GPU" if torch.cuda.is_available() else "no GPU"
    return Finding("threads", True, f"{torch.get_num_threads()} for torch, on {cores}; {device}")


def _home(home: Home, *, named: bool) -> Finding:
    """Open the home, which migrates it. A missing home is a failure only if it was named."""
    from agentpref.errors import HomeError, NotAHome
    from agentpref.record.store import Store

    try:
        with options.reading(home.path) as connection:
            counts = Store(connection).stats()
    except HomeError as error:
        missing = isinstance(error, NotAHome) and not named and not home.path.exists()
        return Finding("home", missing, str(error))
    counted = f"{counts['runs']} runs, {counts['feedback']} feedback"
    return Finding("home", True, f"{home.path}: {counted}")


def _waiting(home: Home) -> Iterator[Finding]:
    """What the database could not take yet, what it refused, and interrupted updates."""
    from agentpref.learn.checkpoint import waiting
    from agentpref.record.integrity import examine_spill

    if home.spill.exists():
        message = f"{examine_spill(home).waiting} entries wait in {home.spill}"
        yield Finding("spill", True, f"{message}; the next log or update stores them")
    if home.refused.exists():
        with home.refused.open("rb") as file:
            refused = sum(1 for _ in file)
        message = f"{refused} entries name runs that are not in this home; look at {home.refused}"
        yield Finding("refused", False, f"{message}, then remove it")
    for found in waiting(home.training):
        step, planned = found.state.step, found.state.planned
        message = f"an update of {found.about.get('namespace')!r} was interrupted at step {step}"
        yield Finding("training", True, f"{message} of {planned}; `agentpref update` resumes it")


def _serving(home: Home) -> Iterator[Finding]:
    """The revisions that serve, those that must not, and what crashed processes left behind."""
    from agentpref.errors import HomeError
    from agentpref.serve import folders
    from agentpref.serve.pins import find_pins
    from agentpref.serve.registry import Registry, namespaces_with_revisions

    if not home.database.is_file():
        return
    try:
        for namespace in namespaces_with_revisions(home):
            yield from _revisions(Registry(home, namespace=namespace))
    except HomeError:
        return  # the finding about the home says so
    if home.adapters.is_dir() and (left := folders.leftovers(home.adapters)):
        message = f"{len(left)} half-made or half-removed folders in {home.adapters}"
        yield Finding("leftovers", True, f"{message}; the next update or pruning removes them")
    if dead := [pin for pin in find_pins(home.pins) if not pin.alive]:
        places = ", ".join(sorted({pin.place or "an unnamed place" for pin in dead}))
        message = f"{len(dead)} revisions were loaded by processes that ended, at {places}"
        yield Finding("pins", True, f"{message}; a router there or a pruning removes the pins")


def _revisions(registry: Registry) -> Iterator[Finding]:
    """Check the files of what serves in one namespace; list what is in quarantine."""
    from agentpref.errors import RevisionError
    from agentpref.serve.validate import check_published

    state, where = registry.state(), repr(registry.namespace)
    for role, name in (("live", state.live), ("canary", state.canary)):
        if name is None:
            continue
        try:
            revision = registry.get(name)
            registry.require_fit(revision)
            check_published(revision)
        except RevisionError as error:
            yield Finding(role, False, f"{where}: {error}")
        else:
            yield Finding(role, True, f"{where}: {name} is whole")
    for revision in registry.list():
        if revision.quarantined_at is not None and revision.pruned_at is None:
            since = f"{revision.revision_id} since {moment(revision.quarantined_at)}"
            yield Finding("quarantine", True, f"{where}: {since}: {revision.quarantine_reason}")


def _model(name: str) -> Finding:
    from agentpref.errors import AgentprefError
    from agentpref.models.base import find_base

    try:
        return Finding("model", True, f"{name} is {find_base(name)}")
    except AgentprefError as error:
        return Finding("model", False, str(error))
