"""`adopt`: prove an adapter that was trained elsewhere, and show the gate's verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentpref_cli import notify as notices
from agentpref_cli import options
from agentpref_cli.commands.update import (
    NICE,
    VERDICTS,
    show_end,
)
from agentpref_cli.terminal import progress


def adopt(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Where peft saved the adapter; it is only read."),
    ],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="`tiny`, a folder of safetensors, or a hub's name.")
    ],
    home: options.Home = None,
    namespace: options.Namespace = "default",
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Settings, as TOML."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="One setting, e.g. gate.kl_budget=0.3; repeatable."
        ),
    ] = None,
    unseen: Annotated[
        bool,
        typer.Option(
            "--unseen",
            help="It was trained on nothing of this home, so the training side proves, too.",
        ),
    ] = False,
    max_minutes: Annotated[
        float | None,
        typer.Option(metavar="M", help="Time for all of it; what does not fit proves nothing."),
    ] = None,
    no_promote: Annotated[
        bool, typer.Option("--no-promote", help="Leave what serves as it is; only publish.")
    ] = False,
    canary: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Let what passes serve a share of the threads, e.g. 0.1, instead of promoting it.",
            show_default=False,
        ),
    ] = None,
    nice: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=19,
            help="How far to lower the priority: others get the cores first; 0 does not.",
        ),
    ] = NICE,
    notify: notices.Notify = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Prove a LoRA adapter that was trained elsewhere, and serve it if it is better.

    DIR holds adapter_config.json and adapter_model.safetensors, as peft and TRL save them. Nothing
    is trained: the gate that decides on an update's candidate decides on this one, by the held-out
    examples of the home. If it passes it is a revision like any other, and made live.

    Exits as `agentpref update` does: 0 if it passed (and was promoted, if that was wanted), 3 if
    there is nothing to prove it by, 4 if it was refused, 5 if there is too little evidence, 6 if no
    example can be evaluated, 2 on bad usage, 1 on a failure (a broken adapter, say), 75 while an
    update or a removal runs, 130 or 143 on a signal.
    """
    from agentpref.adoption import adopt as adopt_here
    from agentpref.config import UpdateConfig
    from agentpref.home import Home
    from agentpref.learn import process

    settings = options.read_settings(config, set_ or ())
    if max_minutes is not None:
        settings["max_minutes"] = max_minutes
    checked = UpdateConfig.from_mapping(settings)
    process.give_way(nice)
    with notices.Notifier(notify, Home.resolve(home), namespace) as notifier:
        with progress(quiet) as show_progress:
            done = adopt_here(
                home,
                folder,
                model=model,
                config=checked,
                namespace=namespace,
                progress=process.settling(show_progress),
                promote=not no_promote,
                canary=canary,
                unseen=unseen,
            )
        value, serving = show_end(done, home, as_json)
    notifier.report(value, serving)
    raise typer.Exit(VERDICTS[done.verdict][0])
