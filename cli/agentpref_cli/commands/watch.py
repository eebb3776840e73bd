"""`watch`: one loop that follows what people say, and acts on it.

Each look compares people's thumbs on what serves with those before it. With `--every-pairs` it also
counts the new pairs, and starts an update when there are enough. Updates are processes of their
own: the loop stays small for weeks, and one that runs out of memory does not end it.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from agentpref_cli import notify as notices
from agentpref_cli import options
from agentpref_cli.terminal import BAD, GOOD, fail, print_result, say

if TYPE_CHECKING:
    from agentpref.learn.process import Interrupts
    from agentpref.prefer.arrivals import Arrivals
    from agentpref.serve.registry import Finding, Registry
    from agentpref_cli.pace import Pace, Window

SIGNALLED = 128
_NOT_FOUND = 127
_RESTS = 20
"""How many times as long as a look at the thumbs took there is no other one."""
WORSE = 8
"""The exit code of a look that proved something worse."""

STYLES = {"worse": BAD, "better": GOOD, "open": ""}


def watch(
    every: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait between two looks.")
    ] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    every_pairs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Update when N new pairs are there; needs --model. A thumb without a pair counts.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What the updates train, as for `update`.", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="Settings of the updates, as TOML."
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="HH:MM-HH:MM",
            help="Start updates only at these hours, in local time.",
            show_default=False,
        ),
    ] = None,
    notify: notices.Notify = None,
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
        bool, typer.Option("--quiet", "-q", help="Print only what is proven, and updates.")
    ] = False,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Compare people's thumbs on what serves with those before, and update when pairs come in.

    The canary is compared with the live revision, thread by thread, and the live revision with what
    a rollback goes back to. A canary that is proven worse is ended and one that is proven better is
    promoted. A live revision that is proven worse is rolled back if `--set live=act` said so, and
    else only named. What is taken out of service goes into quarantine. Each update looks, too.

    The chance of a false alarm is alpha (0.05) for each revision, however often one looks.

    With --every-pairs it runs `agentpref update` when N new pairs are there, and soon after one
    that failed or was interrupted. After a failure it waits a minute, then two, up to an hour;
    after an update that was refused or had too little evidence it waits for twice as many pairs, up
    to 8 N. --only 22:00-06:00 leaves the day to those who serve: an update starts only then.
    --notify runs a command after each update, and for what thumbs prove.

    With --once it exits 0, or 8 if something is proven worse; if it updated, as the update did.
    Else it looks until Ctrl-C (130) or SIGTERM (143), and prints what is new. A running update
    then ends after its step, and resumes the next time.
    """
    from agentpref.learn.process import Interrupts
    from agentpref.serve.registry import Registry

    if not every > 0:
        raise typer.BadParameter(f"{every} is not above 0", param_hint="--every")
    _refuse_idle(every_pairs, model, config, only)
    with options.reading(home, namespace):
        registry = Registry(home, namespace=namespace)
    if set_:
        return _set(registry, set_, as_json)
    out = _Output(as_json, quiet)
    notifier = notices.Notifier(notify, registry.home.path, namespace)
    interrupts = Interrupts()
    looks: list[Look] = [_Thumbs(registry, out, notifier, once).look]
    if every_pairs is not None and model is not None:
        from agentpref_cli.pace import Pace, Window

        window = None if only is None else Window.parse(only)
        arrivals, command = _prepare(registry, model, config, notify, out)
        updates = _Updates(
            registry, arrivals, command, Pace(every_pairs), window, out, notifier, interrupts
        )
        updates.pace.resumes = updates.is_unfinished(failures=not once)
        looks.append(updates.look)
    with interrupts.listening():
        try:
            if once:
                codes = [look() for look in looks]
                raise typer.Exit(next((code for code in reversed(codes) if code is not None), 0))
            _look_until_told(looks, every)
        except KeyboardInterrupt:
            raise typer.Exit(SIGNALLED + (interrupts.signum or 0)) from None
    return None


Look: TypeAlias = "Callable[[], int | None]"
"""One look; returns the exit code of what it found or did, if it has one."""


def _refuse_idle(
    every_pairs: int | None, model: str | None, config: Path | None, only: str | None
) -> None:
    """Refuse options that would have no effect, and updates without a model."""
    if every_pairs is not None and model is None:
        raise typer.BadParameter("it needs --model: what to train", param_hint="--every-pairs")
    given = {"--model": model, "--config": config, "--only": only}
    idle = [name for name, value in given.items() if value is not None and every_pairs is None]
    if idle:
        raise typer.BadParameter("it is about updates: add --every-pairs N", param_hint=idle[0])


def _look_until_told(
    looks: Sequence[Look], every: float, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Look again and again; an error is told once, until it is another one."""
    said: list[str | None] = [None] * len(looks)
    while True:
        for number, look in enumerate(looks):
            trouble = _trouble_of(look)
            if trouble is not None and trouble != said[number]:
                fail(f"{trouble}; looked again in {every:g} s")
            said[number] = trouble
        sleep(every)


def _trouble_of(look: Look) -> str | None:
    """Look, and return the error as text: a home that is locked or full may be usable later."""
    from agentpref.errors import AgentprefError

    try:
        look()
    except AgentprefError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class _Output:
    """How the loop prints: lines, or with ``--json`` one object a line."""

    as_json: bool
    quiet: bool

    def tell(self, value: Any, show: Callable[[], None]) -> None:
        print_result(self.as_json, value, show)


@dataclass
class _Thumbs:
    """Looks at thumbs, and prints what differs from the last look in more than its votes."""

    registry: Registry
    out: _Output
    notifier: notices.Notifier
    always: bool
    """Whether to print what is found also if it is nothing new."""
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._said: object = None
        self._next = float("-inf")

    def look(self) -> int | None:
        """Look, unless so much was read a moment ago that looking would take much of the time."""
        begun = self.clock()
        if begun < self._next:
            return None
        found = self.registry.check_thumbs()
        self._next = begun + _RESTS * (self.clock() - begun)
        now = [(one.role, one.revision, one.verdict, one.action, one.why_not) for one in found]
        if now != self._said or self.always:
            self.out.tell(_value(found), lambda: _show(found, self.out.quiet))
            proven = [one for one in found if one.verdict != "open"]
            if proven:
                lines = [f"- {one.message}" for one in proven]
                self.notifier.say(proven[0].verdict, f"thumbs: {proven[0].message}", *lines)
        self._said = now
        return WORSE if any(one.verdict == "worse" for one in found) else None


# Updates


def _prepare(
    registry: Registry, model: str, config: Path | None, notify: str | None, out: _Output
) -> tuple[Arrivals, list[str]]:
    """What counts new pairs, and the command of an update; wrong settings are said before."""
    from agentpref.config import UpdateConfig
    from agentpref.models.base import find_base
    from agentpref.prefer.arrivals import Arrivals
    from agentpref_cli.oneself import own_command

    checked = UpdateConfig.from_mapping(options.read_settings(config, ()))
    find_base(model)
    words = [f"--home={registry.home.path}", f"--namespace={registry.namespace}"]
    words += [f"--model={model}"] + ([] if config is None else [f"--config={config}"])
    words += ([] if notify is None else [f"--notify={notify}"]) + ["--quiet"] * out.quiet
    words += ["--json"] * out.as_json
    return (
        Arrivals(registry.namespace, held_out=checked.held_out),
        [*own_command(), "update", *words],
    )


@dataclass
class _Updates:
    """Starts an update when there are enough new pairs, and the pace and the hour allow it."""

    registry: Registry
    arrivals: Arrivals
    command: Sequence[str]
    pace: Pace
    window: Window | None
    out: _Output
    notifier: notices.Notifier
    interrupts: Interrupts
    now: Callable[[], datetime] = datetime.now

    def __post_init__(self) -> None:
        self._said: object = None

    def is_unfinished(self, *, failures: bool) -> bool:
        """Whether the last update has not come to its end; ``failures`` says if these count."""
        from agentpref.learn import checkpoint
        from agentpref.record import journal

        home, namespace = self.registry.home, self.registry.namespace
        with options.reading(home.path) as connection:
            newest = journal.listed(connection, namespace, limit=1)
        if checkpoint.path_of(home.training, namespace).exists():
            return True
        ended = ("interrupted", journal.RUNNING, *["failed"] * failures)
        return bool(newest) and newest[0].verdict in ended

    def look(self) -> int | None:
        """Update if it is time to; returns the exit code of an update that ran."""
        if self.pace.rests:
            return None
        wanted = self.pace.wanted
        with options.reading(self.registry.home.path) as connection:
            new = self.arrivals.count(connection, wanted)
        if new < wanted and not self.pace.resumes:
            self._tell("waiting", new, f"{new:,} of {wanted:,} new pairs are there")
            return None
        why = f"{new:,} new pairs" if new >= wanted else "the last update has not come to its end"
        if self.window is not None and not self.window.has(self.now()):
            self._tell("outside", new, f"{why}; updates begin only {self.window}")
            return None
        self._tell("updating", new, f"{why}: an update begins")
        code = self._run()
        self._tell(f"exited {code}", new, self.pace.ended(code))
        return code

    def _run(self) -> int:
        """Run an update to its end; Ctrl-C and SIGTERM reach it, and then end the loop.

        Raises:
            KeyboardInterrupt: a signal came; the update has ended.
        """
        child: subprocess.Popen[bytes] | None = None
        while True:
            try:
                if child is None:
                    with self.interrupts.deferred():  # a signal waits until it can be handed on
                        # In a session of its own: else the terminal's Ctrl-C would reach it twice,
                        # which ends it at once.
                        child = subprocess.Popen(
                            self.command, stdin=subprocess.DEVNULL, start_new_session=True
                        )
                code = child.wait()
                break
            except OSError as error:  # a new version may be being installed just now
                fail(f"{self.command[0]} cannot be run ({error.strerror})")
                return _NOT_FOUND
            except KeyboardInterrupt:
                if child is None:
                    raise
                child.send_signal(self.interrupts.signum or signal.SIGINT)
        if self.interrupts.asked:
            raise KeyboardInterrupt
        if code >= 0:
            return code
        killed = f"the update was killed by signal {-code}"
        cure = "most often memory ran out: `agentpref doctor --model NAME` compares"
        fail(f"{killed}; {cure}")
        self.notifier.say("failed", f"failed: {killed}", cure)
        return SIGNALLED - code

    def _tell(self, state: str, new: int, text: str) -> None:
        """Print where the loop is, unless it was there at the last look."""
        is_new = (state, self.pace.wanted) != self._said
        self._said = (state, self.pace.wanted)
        if is_new and not self.out.quiet:
            value = {"state": state, "new": new, "wanted": self.pace.wanted, "message": text}
            self.out.tell({"updates": value}, lambda: say(text))


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
