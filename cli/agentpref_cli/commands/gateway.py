"""`gateway`: an OpenAI-compatible server that logs, serves what is live, and takes in feedback."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args
from urllib.parse import urlsplit

import typer

from agentpref.errors import ConfigError, MissingDependency
from agentpref_cli import options
from agentpref_cli.terminal import GOOD, WARN, moment, print_result, say, table, warn

if TYPE_CHECKING:
    from agentpref.config import Precision
    from agentpref.home import Home
    from agentpref.serve.backend import ServingBackend
    from agentpref_adapters.gateway import Gateway
    from agentpref_adapters.gateway.upstream import Upstream

app = typer.Typer(
    help="Serve any app that speaks OpenAI's or Anthropic's API: log it, and take in feedback.",
    invoke_without_command=True,
)
key_app = typer.Typer(
    help="The API keys of a home's gateway, one for each app.", no_args_is_help=True
)
app.add_typer(key_app, name="key")

FOLLOW_SECONDS = 1.0
DRAIN_SECONDS = 20
_LOCAL_NAMES = ("localhost", "")


@app.callback()
def gateway(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="`tiny`, a folder of safetensors, or a hub's name: answered in this process, or "
            "through --vllm. With --upstream: the model that is asked for where apps name none.",
        ),
    ] = None,
    vllm: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A vLLM server of --model; can be repeated."),
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Any OpenAI-compatible server, with its /v1: logs and takes in feedback only.",
        ),
    ] = None,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="0 takes a free one.")
    ] = 8100,
    reward: Annotated[
        bool,
        typer.Option(
            "--reward",
            help="With --model: choose the best of `best_of` answers by the namespace's reward "
            "model, whose base is loaded at the first such call.",
        ),
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="With --model: bfloat16, float32 or 4bit [default: auto, bfloat16 where the "
            "processor multiplies it natively].",
            show_default=False,
        ),
    ] = None,
    value: Annotated[
        bool,
        typer.Option(
            "--value",
            help="With --model: choose it by what whole conversations earned, of revisions that "
            "`update --method` made with iql, cql, bcq, combo or airl.",
        ),
    ] = False,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Pages that may send feedback from a browser, such as https://chat.example; can "
            "be repeated [default: none].",
            show_default=False,
        ),
    ] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            help="A proxy in front, whose X-Forwarded-For says who asks; can be repeated "
            "[default: none].",
            show_default=False,
        ),
    ] = None,
    token_minutes: Annotated[
        int, typer.Option(metavar="M", min=1, help="How long a page's token is good.")
    ] = 60,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="The longest answer where an app does not say.")
    ] = 1024,
    max_open: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many calls are answered at once.")
    ] = 256,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="What an upstream's piece may take.")
    ] = 120.0,
) -> None:
    """Run a gateway until Ctrl-C or SIGTERM; calls that are under way have 20 seconds to end.

    Apps set their base URL to http://ADDRESS:PORT/v1 (Anthropic's to http://ADDRESS:PORT). Every
    call is logged in the home, under the id of its reply, and judged by that id. The upstream's
    key is read from AGENTPREF_UPSTREAM_KEY, that of vLLM from VLLM_API_KEY; apps never see it.

    Without an API key (`agentpref gateway key add APP`), only this machine is served.
    """
    if context.invoked_subcommand is not None:
        return
    from agentpref.config import Precision
    from agentpref.home import Home
    from agentpref_adapters.gateway import Access, Gateway, Keys, create_app

    if (model is None and upstream is None) or (vllm and model is None) or (vllm and upstream):
        raise typer.BadParameter(
            "name what answers: --model NAME, --model NAME with --vllm URL, or --upstream URL"
        )
    if reward and model is None:
        raise typer.BadParameter("--reward chooses among answers of --model, which is not given")
    if value and (model is None or reward):
        raise typer.BadParameter(
            "--value chooses among answers of --model, "
            + ("and so does --reward; name one of them" if reward else "which is not given")
        )
    if precision is not None and (model is None or vllm):
        raise typer.BadParameter("--precision is how this process holds --model; vLLM has its own")
    if precision not in (None, *get_args(Precision)):
        allowed = ", ".join(get_args(Precision))
        raise typer.BadParameter(f"--precision is {precision!r}, but must be one of {allowed}")
    origins, proxies = tuple(map(_origin, cors or ())), [*map(_proxy, proxy or ())]
    place = Home.create(home)
    keys = Keys(place)
    if not keys.list() and not is_local(host):
        raise ConfigError(
            f"host is {host!r}, which others can reach, and there is no API key; make one for each "
            "app first: agentpref gateway key add APP"
        )
    with ExitStack() as stack:
        listening = stack.enter_context(listening_at(host, port))
        opened = _upstreams(
            stack, place, model, vllm or (), upstream, max_tokens=max_tokens, max_open=max_open,
            timeout=timeout, reward=reward, value=value, precision=cast("Precision", precision),
        )  # fmt: skip
        access = Access(
            keys, namespace=namespace, origins=origins, token_seconds=60 * token_minutes
        )
        gate = Gateway(lambda name: _log(place, name), opened, access, max_open=max_open)
        server = _server(gate, create_app(gate, origins=origins), proxies=proxies)
        _announced(listening, place, keys_needed=bool(keys.list()))
        server.run(sockets=[listening])


def _announced(listening: socket.socket, home: Home, *, keys_needed: bool) -> None:
    address = listening.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    url = f"http://{shown}:{address[1]}"
    say(f"the gateway answers at {url}/v1 (Anthropic's API at {url}); logged in {home.path}", GOOD)
    if keys_needed:
        say("apps need their API keys: `agentpref gateway key list`")
    else:
        say("no API key is needed from this machine; make one with `agentpref gateway key add`")
    sys.stdout.flush()  # also into a pipe


def listening_at(host: str, port: int) -> socket.socket:
    """A socket at the address, bound before anything is loaded.

    Raises:
        ConfigError: somebody else listens there, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = socket.create_server((host, port), family=family)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"cannot listen at {host}, port {port}: {why}; name another --port (0 takes a free "
            "one), or another --host"
        ) from error
    # Its connections inherit this; asyncio leaves it out of a socket that others made, and then
    # every answer waits 40 ms for the client's acknowledgement.
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def _server(gate: Gateway, app: Any, *, proxies: Sequence[str]) -> Any:
    """A uvicorn server, in which calls that are under way when it stops have a while to end."""
    try:
        import uvicorn
    except ImportError as error:
        raise MissingDependency(
            "the gateway needs uvicorn; install it with: pip install 'agentpref[gateway]'"
        ) from error

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[Any] | None = None) -> None:
            asyncio.get_running_loop().call_later(DRAIN_SECONDS, gate.stop)
            await super().shutdown(sockets)

    return Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            http="h11",  # the one that bounds headers
            timeout_graceful_shutdown=DRAIN_SECONDS + 5,
            proxy_headers=bool(proxies),
            forwarded_allow_ips=list(proxies),
        )
    )


def _proxy(text: str) -> str:
    """An address of a proxy, or a network of them.

    Raises:
        ConfigError: it is neither, and would never match.
    """
    try:
        return (
            str(ipaddress.ip_network(text, strict=False))
            if "/" in text
            else str(ipaddress.ip_address(text))
        )
    except ValueError as error:
        raise ConfigError(
            f"--proxy is {text!r}; give the proxy's address, such as 10.0.0.2 or 10.0.0.0/24"
        ) from error


def _origin(text: str) -> str:
    """An origin as browsers send it.

    Raises:
        ConfigError: it is none, and would never match.
    """
    if text == "*":
        return text
    found = urlsplit(text)
    if found.scheme not in ("http", "https") or not found.netloc or found.path not in ("", "/"):
        raise ConfigError(
            f"--cors is {text!r}; give the scheme and the host of the page, such as "
            "https://chat.example"
        )
    return f"{found.scheme}://{found.netloc.lower()}"


def _upstreams(
    stack: ExitStack,
    home: Home,
    model: str | None,
    vllm: Sequence[str],
    upstream: str | None,
    *,
    max_tokens: int,
    max_open: int,
    timeout: float,
    reward: bool,
    value: bool,
    precision: Precision | None,
) -> Callable[[str], Upstream]:
    """What opens the upstream of a namespace; an engine is loaded now, and shared by all."""
    if upstream is not None:
        from agentpref_adapters.gateway import Proxied

        key = os.environ.get("AGENTPREF_UPSTREAM_KEY") or None
        # Opened now, so that a wrong address is refused here; it is one for all namespaces.
        opened = Proxied(upstream, key=key, timeout=timeout, model=model, connections=max_open)
        return lambda namespace: opened
    from anyio import CapacityLimiter

    from agentpref.offline.values import ValueFollower
    from agentpref.reward import RewardFollower
    from agentpref.serve.best import BestOf
    from agentpref.serve.registry import Registry
    from agentpref.serve.router import Router
    from agentpref.serve.watch import Watcher
    from agentpref_adapters.gateway import Routed

    assert model is not None
    backend, decode = _engine(model, vllm, timeout, precision)
    stack.callback(backend.close)

    def open_upstream(namespace: str) -> Upstream:
        engine = backend
        if reward:
            engine = BestOf(backend, RewardFollower(home, namespace=namespace).rank)
        if value:
            engine = BestOf(backend, ValueFollower(home, namespace=namespace, model=model).rank)
        router = Router(Registry(home, namespace=namespace), engine)
        Watcher(router, FOLLOW_SECONDS)
        limiter = CapacityLimiter(max_open)
        return Routed(router, model=model, decode=decode, limiter=limiter, max_tokens=max_tokens)

    return open_upstream


def _engine(
    model: str, vllm: Sequence[str], timeout: float, precision: Precision | None
) -> tuple[ServingBackend, Callable[[Sequence[int]], str]]:
    if vllm:
        from agentpref_adapters.vllm import VllmBackend

        servers = VllmBackend(*vllm, model=model, timeout=timeout)
        return servers, servers.decode
    from agentpref_adapters.transformers import TransformersBackend

    say(f"loading {model} …")
    inside = TransformersBackend(model, precision=precision)
    return inside, inside.decode


def _log(home: Home, namespace: str) -> Any:
    from agentpref.record.log import Log

    return Log(home.path, namespace=namespace)


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host in _LOCAL_NAMES:
        return host != ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


_Name = Annotated[str, typer.Argument(metavar="APP", help="The app that gets the key.")]


@key_app.command("add")
def add(
    name: _Name,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: options.AsJson = False,
) -> None:
    """Make a key for an app, bound to a namespace, and print it: it is not shown again."""
    from agentpref.home import Home
    from agentpref.record.database import connect
    from agentpref_adapters.gateway.keys import Keys

    existed = Home(Home.resolve(home)).database.exists()
    place = Home.create(home)
    key = Keys(place).add(name, namespace)
    if not existed:
        connect(place).close()
        warn(f"{place.path} was no home; it is one now, for the key of {name}")
    print_result(as_json, {"name": name, "namespace": namespace, "key": key}, lambda: say(key))


@key_app.command("list")
def list_(home: options.Home = None, as_json: options.AsJson = False) -> None:
    """List the apps that have a key; the keys themselves are not kept."""
    from agentpref.home import Home
    from agentpref_adapters.gateway.keys import Keys

    found = Keys(Home.open(home)).list()
    facts = [
        {"name": key.name, "namespace": key.namespace, "created_at": key.created_at}
        for key in found
    ]
    print_result(as_json, {"keys": facts}, lambda: _show(facts))


def _show(facts: Sequence[dict[str, Any]]) -> None:
    if not facts:
        say("no app has a key; make one with `agentpref gateway key add APP`", WARN)
        return
    rows = [(one["name"], one["namespace"], moment(one["created_at"])) for one in facts]
    table(("app", "namespace", "made"), rows)


@key_app.command("remove")
def remove(name: _Name, home: options.Home = None, as_json: options.AsJson = False) -> None:
    """Remove an app's key; a running gateway refuses it from now on."""
    from agentpref.home import Home
    from agentpref_adapters.gateway.keys import Keys

    Keys(Home.open(home)).remove(name)
    print_result(as_json, {"removed": name}, lambda: say(f"removed the key of {name}"))
