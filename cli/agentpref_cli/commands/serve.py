"""`serve`: runs a vLLM server beside a home, serves its live revision and follows every swap."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agentpref_cli import options
from agentpref_cli.terminal import GOOD, WARN, print_result, say

if TYPE_CHECKING:
    from agentpref.home import Home
    from agentpref.serve.registry import ServingState
    from agentpref.serve.router import Router
    from agentpref_adapters._vllm_process import VllmProcess

SIGNALLED = 128
FOLLOW_SECONDS = 1.0
LOOK_SECONDS = 0.2
STYLES = {"ready": GOOD, "serving": GOOD, "warning": WARN}


def serve(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="`tiny`, a folder of safetensors, or a hub's name.")
    ],
    home: options.Home = None,
    engine: Annotated[Literal["vllm"], typer.Option(help="The engine that generates.")] = "vllm",
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
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="0 takes a free one.")
    ] = 8000,
    max_loras: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many revisions are loaded at a time.")
    ] = 4,
    start_minutes: Annotated[
        float, typer.Option(metavar="M", help="How long vLLM may take to start.")
    ] = 10.0,
    chat_template_kwargs: Annotated[
        str,
        typer.Option(
            metavar="JSON",
            help="Arguments of the chat template, as in the update's settings, "
            "e.g. '{\"enable_thinking\": false}'.",
        ),
    ] = "{}",
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
        list[str] | None, typer.Argument(metavar="-- OPTION", help="Options of vLLM, after `--`.")
    ] = None,
) -> None:
    """Run a vLLM server that serves the live revision and follows every swap.

    The server listens on this machine only. When another process promotes a revision, it is loaded,
    probed and served within two seconds, and no request is dropped. If that fails, the old revision
    keeps serving.

    Ctrl-C and SIGTERM end the command and vLLM. The exit code is then 130 or 143. It is 1 if vLLM
    does not start or ends by itself (let systemd, compose or Kubernetes restart the command), and 2
    on bad usage.
    """
    from agentpref.home import Home
    from agentpref.learn.process import Interrupts
    from agentpref_adapters._vllm_process import vllm_process
    from agentpref_adapters.vllm import servable_template

    opened = Home.open(home)
    printer = Printer(as_json)
    for name in namespace or ["default"]:
        _warn_of_unknown(name, opened, printer)
    arguments = options.read_object(chat_template_kwargs, option="--chat-template-kwargs")
    servable_template(model, arguments)  # what would fail is refused before vLLM starts
    server = vllm_process(
        model,
        *(more or ()),
        logs=opened.path / "logs",
        python=python,
        host=host,
        port=port,
        max_loras=max_loras,
        allow_remote=allow_remote,
        start_seconds=60 * start_minutes,
    )
    interrupts = Interrupts()
    with interrupts.listening():
        try:
            base = {"model": model, "max_loras": max_loras, "chat_template_kwargs": arguments}
            _run(server, base, opened, namespace or ["default"], printer)
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
            line = {"event": event, "message": message, **facts}
            print_result(self._as_json, line, lambda: say(message, STYLES.get(event, "")))
            sys.stdout.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a warning of agentpref, such as a swap that failed."""
        self("warning", record.getMessage())


def _warn_of_unknown(namespace: str, home: Home, printer: Printer) -> None:
    """Say that a namespace is not in the home: it may be new, or a slip of the pen."""
    from agentpref.errors import UnknownNamespace

    try:
        with options.reading(home.path, namespace):
            pass
    except UnknownNamespace as unknown:
        printer("warning", f"{unknown}; until then the base model serves it", namespace=namespace)


def _run(
    server: VllmProcess,
    base: Mapping[str, Any],
    home: Home,
    namespaces: Sequence[str],
    printer: Printer,
) -> None:
    """Start the server and follow what is live, until it ends (``EngineFailed``) or a signal."""
    from agentpref.serve.registry import Registry
    from agentpref.serve.router import Router
    from agentpref.serve.watch import Watcher
    from agentpref.types import BASE
    from agentpref_adapters.vllm import VllmBackend

    printer("starting", f"starting vLLM; its log is {server.log}", url=server.url, log=server.log)
    with ExitStack() as stack:
        stack.enter_context(server)
        printer("ready", f"vLLM answers at {server.url}")
        for logger in map(logging.getLogger, ("agentpref", "agentpref_adapters")):
            logger.addHandler(printer)
            stack.callback(logger.removeHandler, printer)
        backend = VllmBackend(server.url, **base)
        stack.enter_context(closing(backend))
        printed: dict[Router, ServingState | None] = {}
        for namespace in namespaces:
            router = stack.enter_context(Router(Registry(home, namespace=namespace), backend))
            Watcher(router, FOLLOW_SECONDS)
            printed[router] = None
        while (failure := server.failure()) is None:
            for router, before in printed.items():
                state = router.serving
                if state != before:
                    printed[router] = state
                    live = state.live or BASE
                    said = f"{state.namespace}: {live} serves (generation {state.generation})"
                    if state.canary is not None:
                        said += f"; {state.canary} is canary for {state.weight:.0%} of the threads"
                    printer("serving", said, **(state._asdict() | {"live": live}))
            time.sleep(LOOK_SECONDS)
        raise failure
