"""`--notify COMMAND`: hands what the operator reads in the morning to a command.

The command is called once for each update, without a shell: its words are split as a shell would,
and nothing in them is expanded. It reads the report as Markdown on its standard input, and has the
facts as variables of its environment, which also says who wants to hear only of some verdicts. What
goes wrong with it is one warning, and changes nothing about the update.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Annotated, Any

import typer

from agentpref_cli.terminal import one_line, warn

Notify = Annotated[
    str | None,
    typer.Option(
        "--notify",
        metavar="COMMAND",
        help="Run a command that gets the report on standard input, and AGENTPREF_VERDICT and "
        "AGENTPREF_SUBJECT in its environment.",
        show_default=False,
    ),
]

SECONDS = 60.0
"""How long a command may take before it is ended."""

_TAIL_BYTES = 4_000


def split(command: str) -> list[str]:
    """The words of a command; ``BadParameter`` if there are none, or a quote is not closed."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise typer.BadParameter(
            f"{command!r} cannot be split into words ({error}); quote it as in a shell",
            param_hint="--notify",
        ) from error
    if not words:
        raise typer.BadParameter("it is empty; name a command", param_hint="--notify")
    return words


class Notifier:
    """Tells a command what came of an update; a context manager that also tells how it failed.

    Args:
        command: what the user gave, or ``None``: nobody is told.
        home: the home's folder.
        namespace: whose update it is.
        seconds: how long the command may take.
    """

    def __init__(
        self, command: str | None, home: Path, namespace: str, *, seconds: float = SECONDS
    ) -> None:
        self._words = [] if command is None else split(command)
        self._place = {"AGENTPREF_HOME": str(home), "AGENTPREF_NAMESPACE": namespace}
        self._seconds = seconds

    def __enter__(self) -> Notifier:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        place: TracebackType | None,
    ) -> None:
        from agentpref.errors import AgentprefError, UpdateRunning

        if error is None or isinstance(error, typer.Exit | typer.Abort):
            return
        verdict = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        verdict = "busy" if isinstance(error, UpdateRunning) else verdict
        # Only our own messages quote nothing that was logged.
        text = str(error) if isinstance(error, AgentprefError) else type(error).__name__
        self.say(verdict, f"{verdict}: {text}", "The log of the update says more.")

    def report(self, value: Mapping[str, Any], serving: str) -> None:
        """Tell an update's report; ``serving`` says whether its revision serves, in words."""
        if not self._words:
            return
        from agentpref_cli.commands.update import headline
        from agentpref_cli.page import mail

        self.say(
            value["verdict"],
            headline(value, serving),
            *mail.one(value, serving),
            update=value["update_id"],
            revision=value["revision"] or "",
        )

    def say(
        self, verdict: str, subject: str, *lines: str, update: str = "", revision: str = ""
    ) -> None:
        """Run the command on some lines, after the subject if there is no heading in them."""
        if not self._words:
            return
        facts = {
            "AGENTPREF_VERDICT": verdict,
            "AGENTPREF_SUBJECT": one_line(subject),
            "AGENTPREF_UPDATE": update,
            "AGENTPREF_REVISION": revision,
        }
        text = "\n".join(lines if lines and lines[0].startswith("#") else (subject, "", *lines))
        trouble = _run(self._words, text + "\n", {**self._place, **facts}, self._seconds)
        if trouble is not None:
            warn(f"--notify: {self._words[0]} {trouble}; the update is as it was told here")


def _run(words: Sequence[str], text: str, facts: Mapping[str, str], seconds: float) -> str | None:
    """Run a command, pass on what it prints, and say what went wrong, if anything did.

    Its input and output are files: who does not read, or leaves a process behind that holds the
    output open, stops nothing.
    """
    with TemporaryFile() as given, TemporaryFile() as printed:
        given.write(text.encode("utf-8", "backslashreplace"))
        given.seek(0)
        try:
            process = subprocess.Popen(
                words,
                stdin=given,
                stdout=printed,
                stderr=subprocess.STDOUT,
                env={**os.environ, **facts},
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return f"cannot be run ({getattr(error, 'strerror', None) or error})"
        code: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed.seek(max(0, printed.seek(0, os.SEEK_END) - _TAIL_BYTES))
        said = printed.read().decode("utf-8", "replace").strip()
    for line in said.splitlines():
        print(f"{Path(words[0]).name}: {one_line(line)}", file=sys.stderr)
    if code is None:
        return f"was ended: it took more than {seconds:g} s"
    return None if code == 0 else f"exited {code}"
