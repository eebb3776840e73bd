"""`adapters`: which revisions there are, which one serves, and changing that by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.terminal import BAD, GOOD, WARN, answer, facts, moment, say, table

if TYPE_CHECKING:
    from agentpref.serve.backend import Revision
    from agentpref.serve.registry import Registry, ServingState

app = typer.Typer(help="See the revisions, and change which one serves.", no_args_is_help=True)

RevisionId = Annotated[str, typer.Argument(metavar="REVISION", help="E.g. rev-000042-<sha12>.")]
Promoted = Annotated[
    str, typer.Argument(metavar="REVISION", help="E.g. rev-000042-<sha12>, or base.")
]


@app.command("list")
def list_(
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """List the revisions, the newest last, and say which serve and which are tainted.

    A tainted one saw in training what a user has had forgotten; it cannot be promoted.
    """
    registry = _registry(home, namespace)
    state, revisions = registry.state(), registry.list()
    answer(
        as_json,
        {"serving": _state(state), "revisions": [_revision(r, state) for r in revisions]},
        lambda: _show_list(revisions, state),
    )


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
    answer(as_json, value, lambda: _show_one(value))


@app.command()
def promote(
    revision: Promoted,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Make a revision the live one, or the bare base model."""
    state = _registry(home, namespace).promote(revision)
    answer(as_json, _state(state), lambda: _say_state(state))


@app.command()
def rollback(
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Undo the last promotion: the last untainted revision before it serves again."""
    state = _registry(home, namespace).rollback()
    answer(as_json, _state(state), lambda: _say_state(state))


def _registry(home: Path | None, namespace: str) -> Registry:
    from agentpref.serve.registry import Registry

    return Registry(home, namespace=namespace)


def _state(state: ServingState) -> dict[str, Any]:
    """A serving state for JSON, with the base model's own name where no revision serves."""
    from agentpref.types import BASE

    return state._asdict() | {"live": state.live or BASE}


def _revision(revision: Revision, state: ServingState) -> dict[str, Any]:
    return {
        "revision": revision.revision_id,
        "serves": _role(revision, state),
        "parent": revision.parent,
        "created_at": revision.created_at,
        "tainted_at": revision.tainted_at,
        "path": str(revision.path),
    }


def _role(revision: Revision, state: ServingState) -> str | None:
    if revision.revision_id == state.live:
        return "live"
    return "canary" if revision.revision_id == state.canary else None


def _show_list(revisions: Sequence[Revision], state: ServingState) -> None:
    from agentpref.types import BASE

    base = (BASE, "live" if state.live is None else None, "-", "-", "-")
    rows = [
        (r.revision_id, _role(r, state), r.parent or BASE, moment(r.created_at), _tainted(r))
        for r in revisions
    ]
    columns = ("revision", "serves", "parent", "created", "tainted")
    styles = {"live": GOOD, "canary": WARN, "yes": BAD}
    table(columns, [base, *rows], styles=styles)


def _tainted(revision: Revision) -> str | None:
    return None if revision.tainted_at is None else "yes"


def _show_one(value: Mapping[str, Any]) -> None:
    """Print where a revision comes from; its settings, which are nested, are for ``--json``."""
    manifest = value["manifest"]
    shown = {key: value[key] for key in ("revision", "serves", "parent", "path")}
    shown["created"] = moment(value["created_at"])
    if value["tainted_at"] is not None:
        shown["tainted"] = moment(value["tainted_at"])
    shown["base model"] = manifest["base"].get("name")
    figures = {k: v for k, v in manifest["training"].items() if not isinstance(v, Mapping)}
    facts(shown | figures)


def _say_state(state: ServingState) -> None:
    say(f"live: {_state(state)['live']} (generation {state.generation})", GOOD)
