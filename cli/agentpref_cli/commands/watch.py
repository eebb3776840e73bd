"""`watch`: compares people's thumbs on what serves with those before it, and acts on a proof."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import options
from agentpref_cli.terminal import BAD, GOOD, fail, print_result, say

if TYPE_CHECKING:
    from agentpref.serve.registry import Finding, Registry

SIGNALLED = 128
WORSE = 8
"""The exit code of a look that proved something worse."""

STYLES = {"worse": BAD, "better": GOOD, "open": ""}


def watch(
    every: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait between two looks.")
    ] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Keep a setting in the home and end: canary or live = act or report, alpha, "
            "margin; may be repeated.",
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only what is proven.")
    ] = False,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Compare people's thumbs on what serves now with those on what served before.

    The canary is compared with the live revision, thread by thread, and the live revision with what
    a rollback goes back to. A canary that is proven worse is ended and one that is proven better is
    promoted. A live revision that is proven worse is rolled back if `--set live=act` said so, and
    else only named. What is taken out of service goes into quarantine. Each update looks, too.

    The chance of a false alarm is alpha (0.05) for each revision, however often one looks. With
    --once it exits 0, or 8 if something is proven worse. Else it looks until Ctrl-C (130) or
    SIGTERM (143), and prints what is new.
    """
    from agentpref.learn.process import Interrupts
    from agentpref.serve.registry import Registry

    if not every > 0:
        raise typer.BadParameter(f"{every} is not above 0", param_hint="--every")
    with options.reading(home, namespace):
        registry = Registry(home, namespace=namespace)
    if set_:
        return _set(registry, set_, as_json)
    if once:
        found = registry.check_thumbs()
        print_result(as_json, _value(found), lambda: _show(found, quiet))
        raise typer.Exit(WORSE if any(one.verdict == "worse" for one in found) else 0)
    interrupts = Interrupts()
    with interrupts.listening():
        try:
            _look_until_told(registry, every, as_json, quiet)
        except KeyboardInterrupt:
            raise typer.Exit(SIGNALLED + (interrupts.signum or 0)) from None
    return None


def _look_until_told(registry: Registry, every: float, as_json: bool, quiet: bool) -> None:
    """Look again and again; print what differs from the last look in more than its votes."""
    from agentpref.errors import AgentprefError

    said: object = None
    while True:
        try:
            found = registry.check_thumbs()
        except AgentprefError as error:  # a home that is locked or full now may be usable later
            if said != str(error):
                fail(f"{error}; looked again in {every:g} s")
            said = str(error)
        else:
            now = [(one.role, one.revision, one.verdict, one.action, one.why_not) for one in found]
            if now != said:
                print_result(as_json, _value(found), lambda: _show(found, quiet))  # noqa: B023
            said = now
        time.sleep(every)


def _set(registry: Registry, assignments: Sequence[str], as_json: bool) -> None:
    given = options.read_settings(None, assignments)
    value = asdict(registry.watch(**given))
    text = ", ".join(f"{name}={value}" for name, value in value.items())
    print_result(as_json, value, lambda: say(f"kept in the home: {text}", GOOD))


def _value(found: Sequence[Finding]) -> dict[str, Any]:
    return {"thumbs": [one.to_mapping() for one in found]}


def _show(found: Sequence[Finding], quiet: bool) -> None:
    for one in found:
        if not quiet or one.verdict != "open":
            say(one.message, STYLES[one.verdict])
    if not found and not quiet:
        say("nothing serves that thumbs could be compared of: the base model is live")
