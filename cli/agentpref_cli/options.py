"""The options that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[
    Path | None,
    typer.Option(
        "--home",
        metavar="FOLDER",
        help="Home folder [default: $AGENTPREF_HOME, or .agentpref].",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Namespace = Annotated[str, typer.Option(metavar="NAME", help="Which of the home's namespaces.")]
HeldOut = Annotated[
    float,
    typer.Option(
        min=0, max=1, metavar="SHARE", help="Share of the prompts that prove and never train."
    ),
]
