"""`demo`: three nights of learning on the bundled model; `agentpref_cli.demo` tells the story."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentpref_cli import options


def demo(
    home: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep the demo's home here [default: a temporary folder].",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Another seed is another run of the story.")
    ] = 0,
    as_json: options.AsJson = False,
) -> None:
    """Watch three nights of learning on real preferences.

    Needs no network, and up to three minutes on two cores.
    """
    _require("torch", "peft", "langchain")
    from agentpref.learn.process import settle
    from agentpref_cli.demo import run

    settle()
    run(home=home, json=as_json, seed=seed)


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    from agentpref.errors import MissingDependency

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"the demo needs {', '.join(missing)}; install with: pip install 'agentpref[demo]'"
        )
