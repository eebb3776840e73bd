"""`serve`: an inference engine in a process of its own, which serves what is live."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from agentpref_cli import options

if TYPE_CHECKING:
    from agentpref.home import Home
    from agentpref.serve.backend import ServingBackend
    from agentpref_adapters._server_process import ServerEvent, ServerProcess
    from agentpref_adapters._vllm_process import VllmSettings

SIGNALLED = 128


class Engine(str, Enum):
    """The engines there are."""

    vllm = "vllm"


class Prepared(NamedTuple):
    """An engine that is not started yet, and what makes a backend of it once it is."""

    server: ServerProcess
    backend: Callable[[], ServingBackend]


def serve(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="`tiny`, a folder of safetensors, or a hub's name.")
    ],
    engine: Annotated[Engine, typer.Option(help="What generates.")] = Engine.vllm,
    home: options.Home = None,
    namespace: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Whose live revision; may be repeated [default: default].",
            show_default=False,
        ),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="The interpreter that has the engine [default: found by itself]."
        ),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 takes a free one.")] = 8000,
    max_loras: Annotated[
        int, typer.Option(metavar="N", help="Revisions that are loaded at a time.")
    ] = 4,
    max_lora_rank: Annotated[
        int, typer.Option(metavar="R", help="The largest rank; memory is set aside for it.")
    ] = 16,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="What the base is held in.")] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of prompt and answer together, at most.")
    ] = None,
    start_minutes: Annotated[
        float, typer.Option(metavar="M", help="How long the engine may take to start.")
    ] = 10.0,
    allow_remote: Annotated[
        bool,
        typer.Option(
            "--allow-remote",
            help="Let --host be one that others reach. Whoever does can load and remove revisions "
            "and stop the engine: only for a network where nobody but an allowlisting proxy is.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- OPTION", help="More of the engine's own options, after `--`."),
    ] = None,
) -> None:
    """Run an engine that serves what is live, and follow each swap.

    It listens on this machine alone. A promotion by another process is loaded, probed and followed
    within two seconds, without dropping a request; what fails leaves the old revision serving. An
    engine that dies is started again, and gets what serves loaded again.

    Ctrl-C and SIGTERM end it and the engine; exits 130 and 143 then, 1 where the engine does not
    start or keeps dying, 2 on bad usage.
    """
    from agentpref.home import Home
    from agentpref.learn.interrupts import Interrupts
    from agentpref_adapters._vllm_process import VllmSettings
    from agentpref_cli.serving import Speaker, run

    settings = VllmSettings(
        model,
        python=python,
        host=host,
        port=port,
        max_loras=max_loras,
        max_lora_rank=max_lora_rank,
        dtype=dtype,
        max_model_len=max_model_len,
        extra=tuple(more or ()),
        allow_remote=allow_remote,
    )
    found = Home.open(home)
    speaker = Speaker(as_json)
    server, backend = _vllm(settings, found, start_minutes, speaker.hear)
    interrupts = Interrupts()
    with interrupts.listening():
        try:
            run(server, backend, found, namespace or ["default"], speaker)
        except KeyboardInterrupt:
            speaker("ended", f"ended; {server.name} is stopped, and what is live is unchanged")
            raise typer.Exit(SIGNALLED + (interrupts.signum or 0)) from None


def _vllm(
    settings: VllmSettings, home: Home, minutes: float, tell: Callable[[ServerEvent], None]
) -> Prepared:
    from agentpref.errors import MissingDependency
    from agentpref_adapters._server_process import Patience
    from agentpref_adapters._vllm_process import vllm_server

    try:
        from agentpref_adapters.vllm import VllmBackend
    except ImportError as error:
        raise MissingDependency(
            f"serving through vLLM needs {error.name}; install it with: "
            f"pip install 'agentpref[vllm]'"
        ) from error
    patience = Patience(start=60 * minutes)
    server = vllm_server(settings, logs=home.path / "logs", patience=patience, tell=tell)
    return Prepared(
        server,
        lambda: VllmBackend(server.url, base=settings.base, max_loras=settings.max_loras),
    )
