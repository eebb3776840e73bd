"""`doctor`: what is installed here, and whether the home and the model can be used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from agentpref_cli import options
from agentpref_cli.opening import reading
from agentpref_cli.terminal import answer, moment, show_checks

if TYPE_CHECKING:
    from agentpref.serve.registry import Registry

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "train": (
        *("torch", "transformers", "peft", "accelerate", "safetensors", "scipy", "numpy"),
        *("jinja2", "psutil"),
    ),
    "vllm": ("httpx", "httpx-sse", "tenacity", "transformers", "jinja2", "numpy", "safetensors"),
    "quantized": ("bitsandbytes",),
    "langchain": ("langchain-core",),
    "parquet": ("pyarrow",),
    "demo": ("langchain",),
}
"""The packages that each extra brings."""


class Check(NamedTuple):
    """One thing looked at: whether it is as it should be, and what was found."""

    name: str
    holds: bool
    words: str


def doctor(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Base model to look for; one on a hub is fetched.")
    ] = "tiny",
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Look at the installation, the home and the model.

    Exits 1 where one of them cannot be used.
    """
    checks = [
        *_installation(),
        _torch(),
        _home(home),
        *_spill(home),
        *_training(home),
        *_serving(home),
        _model(model),
    ]
    healthy = all(check.holds for check in checks)
    rows = [check._asdict() for check in checks]
    answer(as_json, {"healthy": healthy, "checks": rows}, lambda: show_checks(rows))
    raise typer.Exit(0 if healthy else 1)


def _installation() -> Iterator[Check]:
    import platform
    import sqlite3

    from agentpref import __version__

    words = f"{__version__} on Python {platform.python_version()}"
    yield Check("agentpref", True, f"{words}, SQLite {sqlite3.sqlite_version}")
    for extra, packages in EXTRAS.items():
        found = {name: _version(name) for name in packages}
        if all(found.values()):
            yield Check(extra, True, ", ".join(f"{name} {found[name]}" for name in packages))
        else:
            missing = ", ".join(name for name in packages if not found[name])
            cure = f"pip install 'agentpref[{extra}]'"
            yield Check(extra, True, f"not installed ({missing}); if wanted: {cure}")


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> Check:
    """Import torch, where it is installed: a broken one is to be found here, not at night."""
    if _version("torch") is None:
        return Check("threads", True, f"{os.cpu_count()} cores; torch is not installed")
    try:
        torch = import_module("torch")
    except (ImportError, OSError) as error:
        return Check("threads", False, f"torch cannot be imported: {error}; install it again")
    device = "a GPU" if torch.cuda.is_available() else "no GPU"
    return Check(
        "threads", True, f"{torch.get_num_threads()} for torch, on {os.cpu_count()} cores; {device}"
    )


def _home(folder: Path | None) -> Check:
    """Count what is in the home, which opens and migrates it; no home yet is no fault."""
    from agentpref.errors import HomeError, NotAHome
    from agentpref.home import Home
    from agentpref.record.store import Store

    where = Home.resolve(folder)
    try:
        with reading(where) as connection:
            counts = Store(connection).stats()
    except NotAHome as error:
        return Check("home", folder is None and not where.exists(), str(error))
    except HomeError as error:
        return Check("home", False, str(error))
    return Check("home", True, f"{where}: {counts['runs']} runs, {counts['feedback']} feedback")


def _spill(folder: Path | None) -> Iterator[Check]:
    """Count what the database could not take yet, and what it has refused."""
    from agentpref.home import Home
    from agentpref.record.integrity import examine_spill

    home = Home(Home.resolve(folder))
    if home.spill.exists():
        waiting = examine_spill(home).waiting
        words = f"{waiting} entries wait in {home.spill}; a log or an update brings them home"
        yield Check("spill", True, words)
    if home.refused.exists():
        with home.refused.open("rb") as file:
            refused = sum(1 for _ in file)
        words = f"{refused} entries name what this home has not; look at {home.refused}, remove it"
        yield Check("refused", False, words)


def _training(folder: Path | None) -> Iterator[Check]:
    """Name the updates that were interrupted and can be gone on with."""
    from agentpref.home import Home
    from agentpref.learn.state import waiting

    for found in waiting(Home(Home.resolve(folder)).training):
        words = f"an update of {found.about.get('namespace')!r} was interrupted at step "
        words += f"{found.snapshot.step} of {found.snapshot.planned}; `agentpref update` resumes it"
        yield Check("training", True, words)


def _serving(folder: Path | None) -> Iterator[Check]:
    """Look at what serves, at what must not, and at what crashes left of serving and pruning."""
    from agentpref.errors import HomeError
    from agentpref.home import Home
    from agentpref.serve import folders
    from agentpref.serve.pins import find_pins
    from agentpref.serve.registry import Registry, namespaces_with_revisions

    home = Home(Home.resolve(folder))
    if not home.database.is_file():
        return
    try:
        for namespace in namespaces_with_revisions(home):
            yield from _served(Registry(home, namespace=namespace))
    except HomeError:
        return  # which is said of the home
    if home.adapters.is_dir() and (left := folders.leavings(home.adapters)):
        words = f"{len(left)} half-made or half-removed folders in {home.adapters}"
        yield Check("leavings", True, f"{words}; the next publishing or pruning removes them")
    if dead := [pin for pin in find_pins(home.pins) if not pin.alive]:
        places = ", ".join(sorted({pin.place or "nowhere" for pin in dead}))
        words = f"{len(dead)} revisions were loaded by processes that ended, at {places}"
        yield Check("holds", True, f"{words}; a router there, or a pruning, tidies up")


def _served(registry: Registry) -> Iterator[Check]:
    """Say of one namespace whether what serves is whole and may serve, and what is locked away."""
    from agentpref.errors import RevisionError
    from agentpref.serve.validate import check_published

    state, where = registry.state(), repr(registry.namespace)
    for role, name in (("live", state.live), ("canary", state.canary)):
        if name is None:
            continue
        try:
            revision = registry.get(name)
            registry.require_available(revision)
            registry.require_untainted(revision)
            check_published(revision)
        except RevisionError as error:
            yield Check(role, False, f"{where}: {error}")
        else:
            yield Check(role, True, f"{where}: {name} is whole")
    apart = [r for r in registry.list() if r.quarantined_at is not None and r.pruned_at is None]
    for revision in apart:
        words = f"{where}: {revision.revision_id} since {moment(revision.quarantined_at)}"
        yield Check("quarantine", True, f"{words}: {revision.quarantine_reason}")


def _model(name: str) -> Check:
    from agentpref.errors import AgentprefError
    from agentpref.models.base import find_base

    try:
        return Check("model", True, f"{name} is {find_base(name)}")
    except AgentprefError as error:
        return Check("model", False, str(error))
