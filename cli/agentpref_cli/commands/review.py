"""`review`: a page on which people compare answers."""

from __future__ import annotations

import getpass
import secrets
import sys
from collections.abc import Mapping
from contextlib import closing
from typing import Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.commands.ask import Gold, Pool, RewardBase, RuleOption
from agentpref_cli.commands.gateway import is_local, listening_at
from agentpref_cli.terminal import GOOD, print_result, say, warn


def review(
    annotator: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Who may answer, under this name; can be repeated [default: who runs it].",
            show_default=False,
        ),
    ] = None,
    owner: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Who may also see runs, updates, revisions and people, and change what serves.",
            show_default=False,
        ),
    ] = None,
    rule: RuleOption = None,
    pool: Pool = 200,
    gold: Gold = None,
    model: RewardBase = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="0 takes a free one.")
    ] = 8200,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the addresses as one JSON object.")
    ] = False,
) -> None:
    """Serve a page on which people compare answers, until Ctrl-C or SIGTERM.

    An --owner has more pages: runs (search, conversations), updates with their reports, revisions
    (promote, roll back, canary; each after a second click), and what each annotator did.

    It asks what `agentpref ask` asks: pairs of answers that nobody compared, blind, and in random
    order. Each annotator has an address of their own, with a token that is good while the page is
    served. Keys: 1 and 2, t for a tie, b for both bad, s to skip, u to undo. An answer may be
    corrected in place. What is said is logged before the next pair shows.

    The page speaks plain HTTP. With a --host that others can reach, put a proxy with TLS before it.
    """
    from agentpref.elicitation.acquisition import WITHOUT_REWARD
    from agentpref.elicitation.questions import newest_reward
    from agentpref.home import Home
    from agentpref_adapters.review import Desks, Office, create_app
    from agentpref_cli.commands.report import page_of

    place = Home.open(home)
    with options.reading(place.path, namespace):
        pass  # a wrong namespace is said before anything is loaded
    owners = owner or []
    if not all(name.strip() for name in (*owners, *(annotator or []))):
        raise typer.BadParameter("a name is empty", param_hint="--owner, --annotator")
    names = list(dict.fromkeys([*(annotator or ([] if owners else [getpass.getuser()])), *owners]))
    tokens = {secrets.token_urlsafe(24): name for name in names}
    with closing(listening_at(host, port)) as listening:
        reward = None if rule in WITHOUT_REWARD else newest_reward(place, namespace, model=model)
        office = Office(place, namespace, names, lambda name: page_of(place.path, name, namespace))
        with Desks(
            place, namespace=namespace, rule=rule, reward=reward, pool=pool, gold=gold
        ) as desks:
            address = listening.getsockname()
            shown = f"[{address[0]}]" if ":" in address[0] else address[0]
            if not is_local(host):
                warn("others can reach this address over plain HTTP; put TLS before it")
            pages = {
                name: f"http://{shown}:{address[1]}/login?token={token}"
                for token, name in tokens.items()
            }
            value = {"annotators": pages, "owners": owners}
            print_result(as_json, value, lambda: _show(pages))
            sys.stdout.flush()
            page = create_app(desks, tokens, office=office, owners=owners)
            _server(page).run(sockets=[listening])


def _show(pages: Mapping[str, str]) -> None:
    for name, address in pages.items():
        say(f"{name}: {address}", GOOD)


def _server(app: Any) -> Any:
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    )
