"""The `agentpref` command: the list of commands, and how errors become exit codes.

The modules of the commands import only Typer at their top, so that ``agentpref --help`` starts
quickly. Each command imports the rest when it is called.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from agentpref_cli import demo
from agentpref_cli.commands import (
    adapters,
    adopt,
    ask,
    doctor,
    eval,
    exchange,
    feedback,
    forget,
    gateway,
    home,
    judge,
    keys,
    online,
    ope,
    report,
    review,
    reward,
    runs,
    schedule,
    serve,
    traces,
    update,
    updates,
    watch,
)
from agentpref_cli.terminal import Warnings, fail

BAD_USAGE = 2
BUSY = 75  # EX_TEMPFAIL: the same command succeeds later
SIGNALLED = 128
INTERRUPTED = 130
LEADER_SECONDS = 5


class Commands(TyperGroup):
    """A group of commands that turns errors and Ctrl-C into one line and an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, and let it refuse arguments that are not UTF-8."""
        name, command, rest = super().resolve_command(ctx, args)
        for each in _with_parts(command):
            each.callback = _of_text(each)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Exits 1 on a failure, 2 on a wrong setting, 130 on Ctrl-C.

        Exits 75 if another update or removal holds the home. An update that SIGTERM ended exits
        143; like 130, that is 128 plus the signal's number.
        """
        from agentpref.errors import AgentprefError, ConfigError, UpdateInterrupted, UpdateRunning

        try:
            return super().invoke(ctx)
        except UpdateInterrupted as error:
            fail(str(error))
            raise typer.Exit(SIGNALLED + error.signum) from error
        except UpdateRunning as error:
            fail(str(error))
            raise typer.Exit(BUSY) from error
        except AgentprefError as error:
            fail(str(error))
            raise typer.Exit(BAD_USAGE if isinstance(error, ConfigError) else 1) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # who reads the output has gone, which Typer handles
                raise
            fail(_of_the_system(error))
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            fail("interrupted; the log is kept, and the same revision serves")
            raise typer.Exit(INTERRUPTED) from error


def _with_parts(command: Any) -> Iterator[Any]:
    """A command that does something, and those of a group, at any depth."""
    if command.callback is not None:
        yield command
    for part in getattr(command, "commands", {}).values():
        yield from _with_parts(part)


def _of_text(command: Any) -> Any:
    """A command's function that first refuses a text which is not UTF-8, and names its argument.

    Python gives bytes that are no UTF-8 as halves of characters, which nothing stores. Paths may
    have them.
    """
    call = command.callback

    @functools.wraps(call)
    def checked(**values: Any) -> Any:
        for param in command.params:
            value = values.get(param.name)
            for text in value if isinstance(value, list | tuple) else [value]:
                if isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text):
                    hint = max(param.opts, key=len) if param.opts[0][:1] == "-" else param.metavar
                    raise typer.BadParameter(
                        f"{text!a} is not UTF-8; type it in a terminal that uses UTF-8",
                        param_hint=hint or param.name,
                    )
        return call(**values)

    return checked


def _of_the_system(error: OSError) -> str:
    """An error of the system that nothing has translated, with its path and a cure."""
    from pathlib import Path

    from agentpref.owners import access_cure

    cures = {
        errno.ENOSPC: "free space on its disk, then try again",
        errno.EDQUOT: "free space within this user's quota, then try again",
        errno.EROFS: "its file system is read-only: mount it for writing",
        errno.ENOENT: "check the path",
        errno.ENOTDIR: "a part of the path is a file: check the path",
        errno.EISDIR: "it is a folder: name a file",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
    }
    path = error.filename if isinstance(error.filename, str | os.PathLike) else None
    cure = cures.get(error.errno or 0, "check the disk and the path, then try again")
    if error.errno in (errno.EACCES, errno.EPERM) and path is not None:
        cure = access_cure(Path(path).absolute())
    where = f"{os.fspath(path)}: " if path is not None else ""
    return f"{where}{error.strerror or error}; {cure}"


app = typer.Typer(
    cls=Commands,
    help="Let an agent learn from the people who use it.",
    no_args_is_help=True,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing the help with rich doubles the time that it takes
)
app.command("init")(home.init)
app.command("demo")(demo.demo)
app.command("import", short_help="Read preferences from a file.")(exchange.import_)
app.command("export", short_help="Write pairs or thumbs to a file.")(exchange.export)
app.command("runs")(runs.runs)
app.command("show", short_help="Show a model call, and what learned from it.")(runs.show)
app.command("thumbs")(feedback.thumbs)
app.command("retract", short_help="Take back what somebody said of a run.")(feedback.retract)
app.add_typer(keys.app, name="keys", short_help="Say which keys of feedback are preferences.")
app.command("stats", short_help="Count what was logged, per namespace.")(home.stats)
app.command("pairs")(home.pairs)
app.command("update")(update.update)
app.command("adopt", short_help="Prove an adapter from elsewhere, and serve it if it is better.")(
    adopt.adopt
)
app.command("online", short_help="Learn from what a judge says of live's answers.")(online.online)
app.command("updates", short_help="List the updates, the newest first.")(updates.updates)
app.command("report", short_help="Show an update and the gate's verdict on it.")(report.report)
app.command("eval", short_help="Score revisions on held-out examples or a file.")(eval.evaluate)
app.command("traces", short_help="Read conversations as decisions with rewards.")(traces.traces)
app.command("ope", short_help="Estimate what revisions would have earned.")(ope.ope)
app.add_typer(judge.app, name="judge", short_help="Let a model compare answers.")
app.command("ask", short_help="Ask people the comparisons that tell most.")(ask.ask)
app.command("review", short_help="Serve a page on which people compare answers.")(review.review)
app.add_typer(reward.app, name="reward", short_help="Model what people prefer; best-of-N.")
app.add_typer(adapters.app, name="adapters")
app.add_typer(gateway.app, name="gateway", short_help="Serve apps that speak OpenAI's API.")
app.command("serve", short_help="Serve the live revision through vLLM.")(serve.serve)
app.command("watch", short_help="Compare thumbs on what serves, and update when pairs come in.")(
    watch.watch
)
app.command("schedule", short_help="Update every night, by systemd, cron or Kubernetes.")(
    schedule.schedule
)
app.command("verify")(doctor.verify)
app.command("forget")(forget.forget)
app.command("backup")(home.backup)
app.command("merge")(home.merge)
app.command("ship", short_help="Write what is new to object storage.")(home.ship)
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from agentpref import __version__

        print("agentpref", __version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line: the entry point of the installed script."""
    import logging
    import warnings

    from agentpref.learn.team import follows

    logging.lastResort = Warnings(logging.WARNING)  # of what a command does not show otherwise
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they draw over ours
    warnings.filterwarnings("ignore", category=FutureWarning)  # addressed to developers
    if follows():
        _follow()
    else:
        app(prog_name="agentpref")


def _follow() -> None:
    """Take part in an update that another process leads, silently, and exit with its exit code.

    A launcher ends all processes as soon as one fails. So a follower that fails waits, until the
    leader has printed its error and the launcher ends this process.
    """
    import sys
    import time
    from contextlib import redirect_stderr, redirect_stdout

    if sys.argv[1:2] != ["update"]:
        return  # no other command runs in several processes
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        try:
            app(prog_name="agentpref")
        except SystemExit as end:
            time.sleep(LEADER_SECONDS if end.code else 0)
            raise
