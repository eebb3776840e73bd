"""`serve`: runs a vLLM server beside a home, serves its live revision and follows every swap."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.terminal import GOOD, WARN, say

if TYPE_CHECKING:
    from agentpref.home import Home
    from agentpref.serve.backend import ServingBackend
    from agentpref.serve.registry import ServingState
    from agentpref.serve.router import Router
    from agentpref_adapters._vllm_process import VllmProcess

    Backend = Callable[[], ServingBackend]

SIGNALLED = 128
FOLLOW_SECONDS = 1.0
LOOK_SECONDS = 0.2
STYLES = {"ready": GOOD, "serving": GOOD, "warning": WARN}


class Engine(str, Enum):
    """The engines that `serve` can run."""

    vllm = "vllm"


def serve(
    model: Annotated[
        str,
        typer.Option(metavar="NAME", help="`tiny`, a folder of safetensors, or a hub's name."),
    ],
    engine: Annotated[Engine, typer.Option(help="The engine that generates.")] = Engine.vllm,
    home: options.Home = None,
    namespace: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Serve the live revision of this namespace; can be repeated [default: default].",
            show_default=False,
        ),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="The interpreter that has vLLM [default: searched on the PATH]."
        ),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 takes a free one.")] = 8000,
    max_loras: Annotated[
        int, typer.Option(metavar="N", help="How many revisions are loaded at a time.")
    ] = 4,
    max_lora_rank: Annotated[
        int, typer.Option(metavar="R", help="The largest rank; vLLM reserves memory for it.")
    ] = 16,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="The type of the base model's weights.")
    ] = "auto",
    max_model_len: Annotated[
        int | None,
        typer.Option(metavar="N", help="The most tokens of prompt and answer together."),
    ] = None,
    start_minutes: Annotated[
        float, typer.Option(metavar="M", help="How long the engine may take to start.")
    ] = 10.0,
    allow_remote: Annotated[
        bool,
        typer.Option(
            "--allow-remote",
            help="Allow a --host that others can reach. They can then load and remove revisions "
            "and stop the engine: use it only where an allowlisting proxy alone reaches the host.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- OPTION", help="More options of the engine, after `--`."),
    ] = None,
) -> None:
    """Run a vLLM server that serves the live revision and follows every swap.

    The server listens on this machine only. When another process promotes a revision, it is loaded,
    probed and served within two seconds, and no request is dropped. If that fails, the old revision
    keeps serving.

    Ctrl-C and SIGTERM end the command and the engine. The exit code is then 130 or 143. It is 1 if
    the engine does not start or ends by itself (let systemd, compose or Kubernetes restart the
    command), and 2 on bad usage.
    """
    from agentpref.errors import MissingDependency
    from agentpref.home import Home
    from agentpref.learn.process import Interrupts

    try:
        from agentpref_adapters._vllm_process import VllmSettings, vllm_process
        from agentpref_adapters.vllm import VllmBackend
    except ImportError as error:
        raise MissingDependency(
            f"serving through vLLM needs {error.name}; install it with: "
            f"pip install 'agentpref[vllm]'"
        ) from error
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
    opened = Home.open(home)
    server = vllm_process(settings, logs=opened.path / "logs", start_seconds=60 * start_minutes)

    def backend() -> VllmBackend:
        return VllmBackend(server.url, model=model, max_loras=max_loras)

    printer, interrupts = Printer(as_json), Interrupts()
    with interrupts.listening():
        try:
            _run(server, backend, opened, namespace or ["default"], printer)
        except KeyboardInterrupt:
            printer("ended", "ended; vLLM is stopped, and the live revision is unchanged")
            raise typer.Exit(SIGNALLED + (interrupts.signum or 0)) from None


class Printer(logging.Handler):
    """Prints one line for each event, as text or as JSON, also for warnings that threads log."""

    def __init__(self, as_json: bool) -> None:
        super().__init__(logging.WARNING)
        self._as_json = as_json

    def __call__(self, event: str, message: str, **facts: Any) -> None:
        """Print one line at once, also into a pipe."""
        with self.lock or nullcontext():  # one line at a time
            if self._as_json:
                import orjson

                line = {"event": event, "message": message, **facts}
                print(orjson.dumps(line, default=str).decode())
            else:
                say(message, STYLES.get(event, ""))
            sys.stdout.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a warning of agentpref, such as a swap that failed."""
        self("warning", record.getMessage())


def _run(
    server: VllmProcess, backend: Backend, home: Home, namespaces: Sequence[str], printer: Printer
) -> None:
    """Start the server and follow what is live, until the server ends or a signal comes.

    Raises:
        EngineFailed: the server did not start, or ended by itself.
        AgentprefError: the live revision cannot be served.
        KeyboardInterrupt: a signal came; the server has ended.
    """
    from agentpref.serve.registry import Registry
    from agentpref.serve.router import Router
    from agentpref.serve.watch import Watcher

    printer("starting", f"starting vLLM; its log is {server.log}", url=server.url, log=server.log)
    with ExitStack() as stack:
        stack.enter_context(server)
        printer("ready", f"vLLM answers at {server.url}")
        for logger in map(logging.getLogger, ("agentpref", "agentpref_adapters")):
            logger.addHandler(printer)
            stack.callback(logger.removeHandler, printer)
        engine = stack.enter_context(closing(backend()))
        printed: dict[Router, ServingState | None] = {}
        for namespace in namespaces:
            router = Router(Registry(home, namespace=namespace), engine)
            Watcher(stack.enter_context(router), FOLLOW_SECONDS)
            printed[router] = None
        while (failure := server.failure()) is None:
            for router, before in printed.items():
                if before != (state := router.serving):
                    printed[router] = state
                    _print_state(state, printer)
            time.sleep(LOOK_SECONDS)
        raise failure


def _print_state(state: ServingState, printer: Printer) -> None:
    from agentpref.types import BASE

    live = state.live or BASE
    message = f"{state.namespace}: {live} serves (generation {state.generation})"
    if state.canary is not None:
        message += f"; {state.canary} is canary for {state.weight:.0%} of the threads"
    printer("serving", message, **(state._asdict() | {"live": live}))
