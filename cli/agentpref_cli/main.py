"""The `agentpref` command: the list of commands, and how errors become exit codes.

The modules of the commands import only Typer at their top, so that ``agentpref --help`` starts
quickly. Each command imports the rest when it is called.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from agentpref_cli import demo
from agentpref_cli.commands import (
    adapters,
    doctor,
    exchange,
    feedback,
    forget,
    home,
    keys,
    runs,
    serve,
    update,
    updates,
)
from agentpref_cli.terminal import fail

BAD_USAGE = 2
SIGNALLED = 128
INTERRUPTED = 130
LEADER_SECONDS = 5


class Commands(TyperGroup):
    """A group of commands that turns agentpref's errors and Ctrl-C into one line and exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, and let it refuse arguments that are not UTF-8."""
        name, command, rest = super().resolve_command(ctx, args)
        for each in getattr(command, "commands", {name: command}).values():
            each.callback = _of_text(each)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Exits 1 on a failure, 2 on a wrong setting, 130 on Ctrl-C.

        An update that SIGTERM ended exits 143; like 130, that is 128 plus the signal's number.
        """
        from agentpref.errors import AgentprefError, ConfigError, UpdateInterrupted

        try:
            return super().invoke(ctx)
        except UpdateInterrupted as error:
            fail(str(error))
            raise typer.Exit(SIGNALLED + error.signum) from error
        except AgentprefError as error:
            fail(str(error))
            raise typer.Exit(BAD_USAGE if isinstance(error, ConfigError) else 1) from error
        except KeyboardInterrupt as error:
            fail("interrupted; the log is kept, and the same revision serves")
            raise typer.Exit(INTERRUPTED) from error


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


app = typer.Typer(
    cls=Commands,
    help="Let an agent learn from the people who use it.",
    no_args_is_help=True,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing the help with rich doubles the time that it takes
)
app.command("init")(home.init)
app.command("demo")(demo.demo)
app.command("import")(exchange.import_)
app.command("export")(exchange.export)
app.command("runs")(runs.runs)
app.command("show")(runs.show)
app.command("thumbs")(feedback.thumbs)
app.command("retract")(feedback.retract)
app.add_typer(keys.app, name="keys")
app.command("stats")(home.stats)
app.command("pairs")(home.pairs)
app.command("update")(update.update)
app.command("updates")(updates.updates)
app.command("report")(update.report)
app.add_typer(adapters.app, name="adapters")
app.command("serve")(serve.serve)
app.command("verify")(doctor.verify)
app.command("forget")(forget.forget)
app.command("backup")(home.backup)
app.command("merge")(home.merge)
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
    import os
    import warnings

    from agentpref.learn.team import follows

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
    import os
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
