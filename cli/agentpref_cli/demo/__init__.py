"""`agentpref demo`: three updates on real preferences with the bundled model, step by step.

- ``users``: the questions, the answers that users like, and their feedback;
- ``app``: the agent that they talk to;
- ``story``: asks, updates, swaps, asks again, and prints what happened;
- ``arms``: compares with training that protects nothing of what was learned before.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from agentpref_cli import options
from agentpref_cli.terminal import print_result, progress


def demo(
    home: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep the demo's home here [default: a temporary folder].",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of everything random.")] = 0,
    as_json: options.AsJson = False,
) -> None:
    """Run three updates on real preferences.

    Needs no network, and up to three minutes on two cores.
    """
    _require("torch", "peft", "langchain")
    from agentpref.learn.process import settle

    settle()
    run(home=home, json=as_json, seed=seed)


def run(*, home: Path | None, json: bool, seed: int) -> None:
    """Run the demo in ``home``, or in a temporary folder, and print what happens."""
    from tempfile import TemporaryDirectory

    from agentpref_cli.demo import story

    with ExitStack() as stack:
        folder = home or Path(stack.enter_context(TemporaryDirectory()), "home")
        report = stack.enter_context(progress(json)) or (lambda stage, done, total: None)
        if not json:
            story.print_opening()
        told = story.tell(folder, seed, report, (lambda *_: None) if json else story.print_update)
    print_result(json, told.to_mapping(), lambda: story.print_end(told))


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    from agentpref.errors import MissingDependency

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"the demo needs {', '.join(missing)}; install with: pip install 'agentpref[demo]'"
        )
