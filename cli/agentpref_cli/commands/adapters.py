"""`adapters`: lists the revisions, shows which one serves, and changes that by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.terminal import (
    BAD,
    DIM,
    GOOD,
    WARN,
    confirm,
    facts,
    moment,
    print_result,
    progress,
    say,
    table,
)

if TYPE_CHECKING:
    from agentpref.serve.backend import Revision
    from agentpref.serve.pruning import Pruned
    from agentpref.serve.registry import Finding, Registry, ServingState

app = typer.Typer(help="See the revisions, and change which one serves.", no_args_is_help=True)

RevisionId = Annotated[str, typer.Argument(metavar="REVISION", help="E.g. rev-000042-<sha12>.")]
Promoted = Annotated[
    str, typer.Argument(metavar="REVISION", help="E.g. rev-000042-<sha12>, or base.")
]

Expected = Annotated[
    int | None,
    typer.Option(
        "--expected-generation",
        min=0,
        metavar="N",
        help="Refuse if what is served has changed since it had this generation.",
        show_default=False,
    ),
]


@app.command("list", short_help="List the revisions, and which of them serve.")
def list_(
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """List the revisions, the newest last, with those that serve and those that must not.

    A revision of kind prompt has instructions beside its weights: see `agentpref update --arm`.
    A tainted revision was trained on what was forgotten since, one in quarantine was found broken,
    and the files of a pruned one were removed. None of them can be promoted. One that was taken
    back (rolled back, or replaced by an older one) can be, by hand; no update does.

    Where people judged what serves, the last lines compare their thumbs with those before it: see
    `agentpref watch`.
    """
    from agentpref.serve.decisions import taken_back

    registry = _registry(home, namespace)
    state, revisions = registry.state(), registry.list()
    with options.reading(home) as connection:
        back = {one.revision for one in taken_back(connection, namespace)}
    rows = [_revision(one, state) | {"taken_back": one.revision_id in back} for one in revisions]
    serving = _state(state)
    held = registry.held()
    hold = None if held is None else held._asdict()
    thumbs = registry.check_thumbs(act=False)
    value = {"serving": serving, "hold": hold, "revisions": rows}
    value["thumbs"] = [one.to_mapping() for one in thumbs]
    print_result(as_json, value, lambda: _show_list(serving, rows, hold, thumbs))


@app.command()
def show(
    revision: RevisionId,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Show one revision and its manifest."""
    registry = _registry(home, namespace)
    found = registry.get(revision)
    value = _revision(found, registry.state()) | {"manifest": found.manifest}
    print_result(as_json, value, lambda: _show_one(value))


@app.command()
def promote(
    revision: Promoted,
    expected: Expected = None,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Make a revision the live one, or the bare base model."""
    registry = _registry(home, namespace)
    _print_state(as_json, registry.promote(revision, expected_generation=expected))


@app.command(short_help="Undo the last promotion.")
def rollback(
    expected: Expected = None,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Undo the last promotion: the last revision before it that may serve becomes live.

    A revision whose files are damaged is put into quarantine and passed over.
    """
    registry = _registry(home, namespace)
    before = {one.revision_id for one in registry.list() if one.quarantined_at is not None}
    state = registry.rollback(expected_generation=expected)
    for one in registry.list():
        if one.quarantined_at is not None and one.revision_id not in before and not as_json:
            say(f"passed over, and in quarantine now: {one.quarantine_reason}", WARN)
    _print_state(as_json, state)


@app.command(short_help="Let a revision serve a share of the threads.")
def canary(
    revision: Annotated[
        str | None, typer.Argument(metavar="REVISION", help="The one to try.", show_default=False)
    ] = None,
    weight: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of the threads, e.g. 0.1.", show_default=False),
    ] = None,
    end: Annotated[bool, typer.Option("--end", help="End the trial.")] = False,
    expected: Expected = None,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Let a revision serve a share of the threads, or end that with --end."""
    if end == (revision is not None) or end == (weight is not None):
        raise typer.BadParameter(
            "name a revision and its share of the threads, or --end",
            param_hint="REVISION, --weight",
        )
    registry = _registry(home, namespace)
    new = registry.canary(revision, weight or 0.0, expected_generation=expected)
    _print_state(as_json, new)


@app.command()
def hold(
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why.", show_default=False)] = "",
    end: Annotated[bool, typer.Option("--end", help="End the hold.")] = False,
    expected: Expected = None,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Promote nothing, and begin no canary, until --end.

    Updates go on training, proving and publishing. `rollback` and `canary --end` work.
    """
    if end and reason:
        raise typer.BadParameter("--end takes no reason", param_hint="--reason")
    registry = _registry(home, namespace)
    change = registry.lift if end else partial(registry.hold, reason)
    state = change(expected_generation=expected)
    held = registry.held()
    value = _state(state) | {"hold": None if held is None else held._asdict()}
    print_result(as_json, value, lambda: _show_hold(value["hold"]))


@app.command()
def quarantine(
    revision: RevisionId,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="What is wrong with it.")],
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Keep a revision from being promoted until it is released.

    Does not stop it from serving; also run `adapters rollback`.
    """
    registry = _registry(home, namespace)
    value = _revision(registry.quarantine(revision, reason), registry.state())
    print_result(as_json, value, lambda: _say_quarantine(value))


@app.command()
def release(
    revision: RevisionId,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Check a revision's files again, and end its quarantine."""
    registry = _registry(home, namespace)
    value = _revision(registry.release(revision), registry.state())
    print_result(as_json, value, lambda: say(f"{revision} may serve again", GOOD))


@app.command()
def prune(
    keep: Annotated[int, typer.Option(min=1, metavar="N", help="How many of the newest stay.")] = 5,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Remove nothing; say what would be removed.")
    ] = False,
    yes: options.Yes = False,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Remove the files of revisions that nothing needs.

    These stay: the live one and the canary, what a rollback goes to, the last untainted one of the
    live line, the newest, and those that a process or an engine has loaded, or may have.
    """
    registry = _registry(home, namespace)
    if not dry_run:
        confirm(f"Remove what nothing needs from {registry.home.adapters} for good?", yes)
    done = registry.prune(keep, ask=_is_loaded, dry_run=dry_run)
    value = {"removed": done.removed, "kept": done.kept, "bytes": done.bytes, "dry_run": dry_run}
    print_result(as_json, value, lambda: _show_pruned(done, dry_run))


@app.command(short_help="Copy a revision to a folder for peft and vLLM.")
def export(
    revision: RevisionId,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder that is missing or empty.")
    ],
    merged: Annotated[
        bool,
        typer.Option("--merged", help="Write a whole model, with the revision merged into it."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --merged: where the base is now [default: where it was trained].",
            show_default=False,
        ),
    ] = None,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Copy a revision to a folder that plain peft and plain vLLM load.

    With --merged, the folder holds a whole model for tools that load no adapters, such as plain
    transformers or llama.cpp's converter to GGUF. This reads the base, and needs its memory.
    """
    registry = _registry(home, namespace)
    if not merged:
        if model is not None:
            raise typer.BadParameter("is read with --merged only", param_hint="--model")
        place = registry.export(revision, folder)
        value = {"revision": revision, "path": str(place)}

        def show() -> None:
            say(f"{revision} is in {place}", GOOD)
            _say_instructions(registry.get(revision))

        return print_result(as_json, value, show)
    from agentpref.serve.merged import export_merged

    with progress(as_json) as report:
        done = export_merged(registry, revision, folder, model=model, progress=report)
    whole = {"revision": revision, **done._asdict(), "path": str(done.path), "merged": True}
    text = f"{revision}, merged into its base ({done.dtype}, {done.bytes / 1e6:,.1f} MB), is in "

    def show_merged() -> None:
        say(f"{text}{done.path}", GOOD)
        _say_instructions(registry.get(revision))

    return print_result(as_json, whole, show_merged)


def _say_instructions(revision: Revision) -> None:
    """Say what no file of weights holds: an export serves as the revision did with these only."""
    if revision.instructions:
        say("it was proven with these instructions, to be put into the system prompt:", WARN)
        say(revision.instructions)


def _is_loaded(place: str, revision_id: str) -> bool | None:
    """Ask the engine at a URL; ``None`` if it is not at one, or its client is not installed."""
    if not place.startswith(("http://", "https://")):
        return None
    try:
        from agentpref_adapters.vllm import has_loaded

        return has_loaded(place, revision_id)
    except ImportError:
        return None


def _registry(home: Path | None, namespace: str) -> Registry:
    from agentpref.serve.registry import Registry

    with options.reading(home, namespace):
        return Registry(home, namespace=namespace)


def _state(state: ServingState) -> dict[str, Any]:
    """A serving state for JSON, where ``live`` is ``"base"`` while no revision is."""
    from agentpref.types import BASE

    return state._asdict() | {"live": state.live or BASE}


def _revision(revision: Revision, state: ServingState) -> dict[str, Any]:
    times = ("created_at", "tainted_at", "quarantined_at", "quarantine_reason", "pruned_at")
    return {
        "revision": revision.revision_id,
        "kind": "prompt" if revision.instructions else "adapter",
        "serves": {state.canary: "canary", state.live: "live"}.get(revision.revision_id),
        "parent": revision.parent,
        **{name: getattr(revision, name) for name in times},
        "path": str(revision.path),
    }


def _show_hold(hold: Mapping[str, Any] | None) -> None:
    if hold is None:
        return say("not held: what passes the gate is promoted", GOOD)
    reason = f": {hold['reason']}" if hold["reason"] else ""
    end = "nothing is promoted until `agentpref adapters hold --end`"
    return say(f"held since {moment(hold['at'])}{reason}; {end}", WARN)


def _show_list(
    serving: Mapping[str, Any],
    revisions: Sequence[Mapping[str, Any]],
    hold: Mapping[str, Any] | None,
    thumbs: Sequence[Finding],
) -> None:
    from agentpref.types import BASE

    role = "live" if serving["live"] == BASE else None
    rows: list[tuple[object, ...]] = [(BASE, "-", role, "-", "-", "-")]
    for value in revisions:
        # Why it must not serve, in one word: the reason that lasts longest.
        flags = ("pruned", "tainted", "quarantined")
        status = next((flag for flag in flags if value[f"{flag}_at"] is not None), None)
        if status is None and value["taken_back"]:
            status = "taken back"
        created, parent = moment(value["created_at"]), value["parent"] or BASE
        kind = value["kind"]
        rows.append((value["revision"], kind, value["serves"], parent, created, status))
    styles = {"live": GOOD, "canary": WARN, "taken back": WARN}
    styles |= {"tainted": BAD, "quarantined": BAD, "pruned": DIM}
    table(("revision", "kind", "serves", "parent", "created", "status"), rows, styles=styles)
    if hold is not None:
        _show_hold(hold)
    for one in thumbs:
        if one.now.votes:
            say(one.message, {"worse": BAD, "better": GOOD, "open": ""}[one.verdict])


def _show_one(value: Mapping[str, Any]) -> None:
    """Print where a revision comes from; ``--json`` has its settings too, which are nested."""
    manifest = value["manifest"]
    shown = {key: value[key] for key in ("revision", "serves", "parent", "path")}
    shown["created"] = moment(value["created_at"])
    for flag in ("tainted", "quarantined", "pruned"):
        if value[f"{flag}_at"] is not None:
            shown[flag] = moment(value[f"{flag}_at"])
    if value["quarantine_reason"] is not None:
        shown["reason"] = value["quarantine_reason"]
    shown["base model"] = manifest["base"].get("name")
    if manifest.get("instructions"):
        shown["instructions"] = manifest["instructions"]
    figures = {k: v for k, v in manifest["training"].items() if not isinstance(v, Mapping)}
    facts(shown | figures)


def _print_state(as_json: bool, state: ServingState) -> None:
    value = _state(state)

    def show() -> None:
        say(f"live: {value['live']} (generation {state.generation})", GOOD)
        if state.canary is not None:
            say(f"canary: {state.canary}, for {100 * state.weight:.4g}% of the threads", WARN)

    print_result(as_json, value, show)


def _say_quarantine(value: Mapping[str, Any]) -> None:
    say(f"{value['revision']} is in quarantine: {value['quarantine_reason']}", WARN)
    if value["serves"] is not None:
        end = {"live": "rollback", "canary": "canary --end"}[value["serves"]]
        say(f"it is still {value['serves']}; end that with `agentpref adapters {end}`", WARN)


def _show_pruned(done: Pruned, dry_run: bool) -> None:
    rows = [
        *((name, "would be removed" if dry_run else "removed", None) for name in done.removed),
        *((name, "kept", why) for name, why in done.kept.items()),
    ]
    table(("revision", "pruning", "why"), rows, styles={"removed": WARN, "would be removed": WARN})
    say(f"{'would free' if dry_run else 'freed'} {done.bytes / 1e6:,.1f} MB")
