"""`doctor` finds what cannot be used, and `verify` what is not as it was recorded."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.machine import Finding, checked, locks, night, owners
from agentpref_cli.terminal import (
    BAD,
    GOOD,
    WARN,
    moment,
    print_result,
    progress,
    say,
    show_checks,
    table,
)

if TYPE_CHECKING:
    from agentpref.home import Home
    from agentpref.record.integrity import Findings, Problem
    from agentpref.serve.registry import Registry

_EXTRA = re.compile(r"(?!agentpref\b)([\w.-]+).*\bextra == ['\"](?!all|bench|dev)([\w-]+)['\"]")


def doctor(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Base model to look for; one on a hub is fetched.")
    ] = "tiny",
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Check the installation, the home and the model.

    Looks at packages, owners and modes, locks, what waits, what serves, and at the room that a
    night needs on the disk and in memory. Exits 1 if one of them cannot be used.
    """
    from agentpref.home import Home

    place = Home(Home.resolve(home))
    base: list[Path] = []
    findings = [
        *_installation(),
        _torch(),
        *checked("home", lambda: _home(place, named=home is not None)),
        *checked("owner", lambda: owners(place)),
        *checked("readers", lambda: _readers(place)),
        *checked("locks", lambda: locks(place)),
        *checked("waiting", lambda: _waiting(place)),
        *checked("serving", lambda: _serving(place)),
        *checked("model", lambda: _model(model, base)),
        *checked("memory", lambda: _night(place, base)),
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
        missing = ", ".join(name for name in found if found[name] is None)
        cure = f"not installed ({missing}); to use it: pip install 'agentpref[{extra}]'"
        versions = ", ".join(f"{name} {version}" for name, version in found.items())
        yield Finding(extra, True, cure if missing else versions)


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> Finding:
    """Import torch if it is installed, so that a broken one fails here and not in an update."""
    from agentpref.models.threads import fitting_threads, usable_cores

    cores = f"{os.cpu_count()} cores"
    if (usable := usable_cores()) != os.cpu_count():
        cores += f", of which this process may use {usable}"
    if _version("torch") is None:
        return Finding("threads", True, f"{cores}; torch is not installed")
    try:
        torch = import_module("torch")
    except (ImportError, OSError) as error:
        return Finding("threads", False, f"torch cannot be imported: {error}; install it again")
    device = "a GPU" if torch.cuda.is_available() else "no GPU"
    return Finding("threads", True, f"{fitting_threads()} for torch, on {cores}; {device}")


def _home(home: Home, *, named: bool) -> Iterator[Finding]:
    """Open the home, which migrates it. A missing home is a failure only if it was named."""
    from agentpref.errors import NotAHome
    from agentpref.record.keys import keys_problem
    from agentpref.record.store import Store

    try:
        with options.reading(home.path) as connection:
            counts = Store(connection).stats()
            lost = keys_problem(connection)
    except NotAHome as error:
        missing = not named and not home.path.exists()
        yield Finding("home", missing, str(error))
        return
    message = f"{home.path}: {counts['runs']} runs, {counts['feedback']} feedback"
    problem = "" if lost is None else f"; {home.user_keys.name}: {lost}"
    yield Finding("home", lost is None, message + problem)


def _readers(home: Home) -> Iterator[Finding]:
    """Files with people's words that every user of this machine can use, and the cure."""
    import shlex

    from agentpref.home import open_to_others

    if found := open_to_others(home):
        cure = f"chmod o= {' '.join(shlex.quote(str(path)) for path in found)}"
        message = f"every user of this machine can use {len(found)} of the home's files"
        yield Finding("readers", False, f"{message}; take them from others: {cure}")


def _waiting(home: Home) -> Iterator[Finding]:
    """What the database could not take yet, what it refused, and interrupted updates."""
    from agentpref.errors import NotKept
    from agentpref.home import reading
    from agentpref.learn.checkpoint import damaged, waiting
    from agentpref.record.integrity import examine_spill

    try:
        if home.spill.exists():
            spilled = examine_spill(home)
            message = f"{spilled.waiting} entries wait in {home.spill}"
            if spilled.problems:
                message += f"; {len(spilled.problems)} lines of it are not what was written"
            message += "; the next log or update stores what is whole"
            yield Finding("spill", not spilled.problems, message)
    except NotKept as error:
        yield Finding("spill", False, str(error))
    try:
        if home.refused.exists():
            with reading(home.refused) as file:
                refused = sum(1 for _ in file)
            message = f"{refused} entries name runs that are not in this home, or are not whole"
            yield Finding("refused", False, f"{message}; look at {home.refused}, then remove it")
    except NotKept as error:
        yield Finding("refused", False, str(error))
    for path, why in damaged(home.training).items():
        message = f"the interrupted update in {path} cannot be resumed: {why}"
        yield Finding("training", False, f"{message}; `agentpref update` starts it over")
    for found in waiting(home.training):
        step, planned = found.state.step, found.state.planned
        message = f"an update of {found.about.get('namespace')!r} was interrupted at step {step}"
        message += f" of {planned}; `agentpref update` resumes it if what it began with is the same"
        yield Finding("training", True, message)


def _serving(home: Home) -> Iterator[Finding]:
    """The revisions that serve, those that must not, and what crashed processes left behind."""
    from agentpref.errors import HomeError, NotKept
    from agentpref.record.updates import Updates
    from agentpref.serve import folders
    from agentpref.serve.pins import find_pins
    from agentpref.serve.registry import Registry
    from agentpref.serve.status import namespaces_with_revisions

    if not home.database.is_file():
        return
    try:
        for namespace in namespaces_with_revisions(home):
            yield from _revisions(Registry(home, namespace=namespace))
    except (HomeError, NotKept):
        return  # the finding about the home says so
    with options.reading(home.path) as connection:
        updates = Updates(connection)
        orphans = updates.orphans()
        for namespace in namespaces_with_revisions(home):
            yield from _shift(namespace, updates.last_shift(namespace))
    if orphans:
        message = f"{', '.join(orphans)}: the update that made it is not in the ledger"
        cure = "so `forget` takes it for trained on all that was said before it"
        yield Finding("ledger", True, f"{message}, {cure}")
    try:
        if home.adapters.is_dir() and (left := folders.leftovers(home.adapters)):
            message = f"{len(left)} half-made or half-removed folders in {home.adapters}"
            yield Finding("leftovers", True, f"{message}; the next update or pruning removes them")
    except NotKept as error:
        yield Finding("leftovers", False, str(error))
    try:
        if dead := [pin for pin in find_pins(home.pins) if not pin.alive]:
            places = ", ".join(sorted({pin.place or "an unnamed place" for pin in dead}))
            message = f"{len(dead)} revisions were loaded by processes that ended, at {places}"
            yield Finding("pins", True, f"{message}; a router there or a pruning removes the pins")
    except NotKept as error:
        yield Finding("pins", False, str(error))


def _shift(namespace: str, last: tuple[str, list[dict[str, Any]]] | None) -> Iterator[Finding]:
    """Whether the prompts of the last update were like those that were learned before."""
    if last is None:
        return
    update_id, found = last
    for one in (one for one in found if one["alarm"]):
        yield Finding(
            "shift",
            True,
            f"an alarm: {one['unlike']:.0%} of the new prompts of update {update_id} in "
            f"{namespace!r} (tag: {one['tag']}) are like none learned before: collect judgements "
            f"of such, and look at `agentpref show {one['farthest'][0]}`",
        )


def _revisions(registry: Registry) -> Iterator[Finding]:
    """Check the files of what serves in one namespace; list what is in quarantine."""
    from agentpref.errors import NotKept, RevisionError
    from agentpref.serve.validate import check_published

    state, where = registry.state(), repr(registry.namespace)
    for role, name in (("live", state.live), ("canary", state.canary)):
        if name is None:
            continue
        try:
            revision = registry.get(name)
            registry.require_fit(revision)
            check_published(revision)
        except (RevisionError, NotKept) as error:
            yield Finding(role, False, f"{where}: {error}")
        else:
            yield Finding(role, True, f"{where}: {name} is whole")
    for revision in registry.list():
        if revision.quarantined_at is not None and revision.pruned_at is None:
            since = f"{revision.revision_id} since {moment(revision.quarantined_at)}"
            yield Finding("quarantine", True, f"{where}: {since}: {revision.quarantine_reason}")


def _model(name: str, found: list[Path]) -> Iterator[Finding]:
    """Find the model, and note where it is."""
    from agentpref.models.base import find_base

    found.append(find_base(name))
    yield Finding("model", True, f"{name} is {found[0]}")


def _night(home: Home, base: Sequence[Path]) -> Iterator[Finding]:
    """Whether there is room for an update with the default settings, once model and torch work."""
    from agentpref.config import UpdateConfig
    from agentpref.models.base import choose_precision
    from agentpref.models.base_files import measure_base

    if not base or _version("torch") is None:
        return
    config, gpu = UpdateConfig(), import_module("torch").cuda.is_available()
    held, size = choose_precision(config.precision, gpu=gpu), measure_base(base[0])
    yield from night(home, size, config.lora.rank, 4 if held == "float32" else 2, gpu=gpu)


def verify(
    home: options.Home = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Check a random part, in seconds.")
    ] = False,
    rows: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rows of each table to sample.")
    ] = 1000,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Check all messages, rows and adapters.

    Hashes every message, row and adapter again, compares every table with its sum and its indices,
    tests the columns of every run and judgement, follows every reference, and reads the spill.
    Exits 1 if anything differs from what was recorded, and says what it did not check. Repairs
    nothing. A sample checks the adapters that serve, and prints how many rows of each table it
    checked.
    """
    from agentpref.record.integrity import Problem, examine
    from agentpref.record.keys import keys_problem

    with options.reading(home) as connection, progress(quiet) as report:
        found = examine(connection, sample=rows if sample else None, progress=report)
        lost = keys_problem(connection)
    keys = [] if lost is None else [Problem("user.keys", "", lost)]
    changed, adapters = _check_revisions(home, serving_only=sample)
    problems = [*found.problems, *keys, *changed]
    not_checked = [*_NOT_CHECKED, *(_NOT_SAMPLED if sample else ())]
    value = {
        "problems": [problem._asdict() for problem in problems],
        "looked_at": {name: looked._asdict() for name, looked in found.looked_at.items()},
        "waiting": found.waiting,
        "torn": found.torn,
        "adapters": adapters,
        "seals": found.seals,
        "not_checked": not_checked,
    }

    def show() -> None:
        _show(found, problems, sample, adapters)
        say(f"not checked: {'; '.join(not_checked)}")

    print_result(as_json, value, show)
    raise typer.Exit(1 if problems else 0)


_NOT_CHECKED = (
    "rows that somebody changed and sealed again (compare `seals` of --json with a note that is "
    "kept elsewhere)",
    "runs without a judgement that were deleted while they were the last",
    "what was in an agentpref.db-wal, spill.jsonl or refused.jsonl that was removed or cut",
    "scores that are gone from the cache (they are computed anew)",
    "interrupted training, the base model",
)
_NOT_SAMPLED = (
    "pages, indices and definitions",
    "rows that are gone at the end of a table",
    "tables without a line above",
    "the other rows",
)


def _check_revisions(folder: Path | None, *, serving_only: bool) -> tuple[list[Problem], int]:
    """Find revisions whose files are not what was published or named; count those checked."""
    from agentpref.errors import NotKept, RevisionError
    from agentpref.home import Home
    from agentpref.record.integrity import Problem
    from agentpref.serve.registry import Registry
    from agentpref.serve.status import namespaces_with_revisions
    from agentpref.serve.validate import check_published

    home, problems, checked = Home.open(folder), list[Problem](), 0
    for name in namespaces_with_revisions(home):
        registry = Registry(home, namespace=name)
        state = registry.state()
        for revision in registry.list():
            is_skipped = serving_only and revision.revision_id not in (state.live, state.canary)
            if is_skipped or revision.pruned_at is not None:
                continue
            checked += 1
            try:
                check_published(revision)
            except (RevisionError, NotKept) as error:
                problems.append(Problem("revision", revision.revision_id, str(error)))
    return problems, checked


def _show(found: Findings, problems: list[Problem], sampled: bool, adapters: int) -> None:
    if sampled:
        looked_at = [(name, *looked) for name, looked in found.looked_at.items()]
        table(("table", "checked", "of about"), looked_at)
    if found.waiting:
        say(f"waiting in the spill until the next log writes to this home: {found.waiting}", WARN)
    if found.torn:
        what = "cut off in the spill, by a crash before being acknowledged or by hand"
        say(f"{what}: {found.torn}", WARN)
    if problems:
        table(("table", "key", "what"), problems)
        say(f"problems: {len(problems)}; restore these rows from a backup", BAD)
    else:
        whole = "" if sampled else "every page and index, "
        counts = (f"{looked.rows:,} {name}" for name, looked in found.looked_at.items())
        rows = "the sampled part" if sampled else f"all rows ({', '.join(counts)})"
        say(f"as recorded: {whole}{rows}, the files of {adapters} adapters, the spill", GOOD)
