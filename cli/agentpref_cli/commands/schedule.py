"""`schedule`: an update every night, by systemd, cron or Kubernetes."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentpref_cli import notify as notices
from agentpref_cli import options
from agentpref_cli.terminal import GOOD, print_result, say, warn

if TYPE_CHECKING:
    from agentpref_cli.schedules import Job, Plan, Step

_SECONDS = 60.0


class Kind(str, Enum):
    """What runs the updates."""

    systemd = "systemd"
    cron = "cron"
    kubernetes = "kubernetes"


def schedule(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What to train, as for `update`; --remove needs none.",
            show_default=False,
        ),
    ] = None,
    as_: Annotated[Kind, typer.Option("--as", help="What runs the updates.")] = Kind.systemd,
    at: Annotated[
        str,
        typer.Option(
            metavar="HH:MM", help="When, in the machine's time zone; or '03:00 Europe/Berlin'."
        ),
    ] = "03:00",
    home: options.Home = None,
    namespace: options.Namespace = "default",
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings of the updates, as TOML.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(metavar="M", min=0, help="Time for each update.")
    ] = None,
    notify: notices.Notify = None,
    install: Annotated[
        bool, typer.Option("--install", help="Write it and turn it on, instead of printing it.")
    ] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="Turn it off, and remove what --install wrote.")
    ] = False,
    of_system: Annotated[
        bool | None,
        typer.Option(
            "--system/--user",
            help="Units of the machine, or of this user [default: of the machine for root].",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(metavar="NAME", help="What it is called; another one for each home.")
    ] = "agentpref-update",
    image: Annotated[
        str, typer.Option(metavar="IMAGE", help="For Kubernetes: an image that has agentpref.")
    ] = "",
    claim: Annotated[
        str, typer.Option(metavar="PVC", help="For Kubernetes: the claim that holds the home.")
    ] = "",
    as_json: options.AsJson = False,
) -> None:
    """Print a timer, a line for cron or a CronJob that updates a home every night.

    With --install it is written and turned on, and with --remove it is turned off and its files
    are removed; a file that this command did not write, or wrote for another home, is not touched.
    All paths become absolute, the command is this very one, and variables that an update depends
    on (HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, PYTHONPATH, CUDA_VISIBLE_DEVICES) are kept. Secrets
    are not.

    Updates of one home never overlap: the home has a lock. Their beginnings are spread over ten
    minutes. The lines at the end say how to try it once, and where its log is.
    """
    if install and remove:
        raise typer.BadParameter("choose this or --install", param_hint="--remove")
    if model is None and not remove:
        raise typer.BadParameter(
            "it is missing: what is the update to train?", param_hint="--model"
        )
    if as_ is not Kind.systemd and of_system is not None:
        raise typer.BadParameter("it is about units of systemd", param_hint="--system/--user")
    if as_ is not Kind.kubernetes and (image or claim):
        option = "--image" if image else "--claim"
        raise typer.BadParameter("it needs --as kubernetes", param_hint=option)
    if as_ is Kind.kubernetes:
        job = _in_container(name, at, home, namespace, model, config, max_minutes, notify)
        job = replace(job, image=image, claim=claim)
        needed = {} if remove else {"--image": image, "--claim": claim}
        for option in (option for option, value in needed.items() if not value):
            raise typer.BadParameter("Kubernetes needs it", param_hint=option)
    else:
        job = _here(name, at, home, namespace, model, config, max_minutes, notify)
        of_system = os.geteuid() == 0 if of_system is None else of_system
        job = replace(job, of_system=of_system and as_ is Kind.systemd)
    plan = _plan(as_, job)
    if install:
        done = _install(job, plan)
    elif remove:
        done = _remove(job, plan)
    else:
        return print_result(as_json, _value(plan), lambda: _show(plan))
    value = {"done": done, "hints": [] if remove else [*plan.hints]}
    return print_result(as_json, value, lambda: _show_done(value))


def _plan(kind: Kind, job: Job) -> Plan:
    from importlib import import_module

    planned: Plan = import_module(f"agentpref_cli.schedules.{kind.value}").plan(job)
    return planned


# What is to be run


def _here(
    name: str, at: str, home: Path | None, namespace: str, model: str | None, config: Path | None,
    max_minutes: float | None, notify: str | None,
) -> Job:  # fmt: skip
    """An update by this very command, with all that it needs from here."""
    from agentpref.home import Home
    from agentpref.models.base import BUNDLED
    from agentpref_cli.oneself import own_command
    from agentpref_cli.schedules import CARRIED, At, Job

    place = Home.open(home)
    owner = _owner(place.path)
    reads, writes = [], []
    if model is not None and model != BUNDLED:
        folder = Path(model).expanduser()
        if folder.is_dir():
            model = os.path.abspath(folder)
            reads.append(Path(model))
        elif model.startswith(("/", ".", "~")):
            raise typer.BadParameter(f"{model!r} is no folder", param_hint="--model")
        else:
            writes.append(_hub(owner))
    if config is not None:
        _require_settings(config)
        config = Path(os.path.abspath(config))
        reads.append(config)
    carried = {name: os.environ[name] for name in CARRIED if os.environ.get(name)}
    if "PYTHONPATH" in carried:
        parts = map(os.path.abspath, carried["PYTHONPATH"].split(os.pathsep))
        carried["PYTHONPATH"] = os.pathsep.join(parts)
    return Job(
        name, own_command(), _words(place.path, namespace, model, config, max_minutes, notify),
        place.path, namespace, At.parse(at), reads, writes, notify is not None, carried, owner,
    )  # fmt: skip


def _in_container(
    name: str, at: str, home: Path | None, namespace: str, model: str | None, config: Path | None,
    max_minutes: float | None, notify: str | None,
) -> Job:  # fmt: skip
    """An update in a container, whose paths are not those of here."""
    from agentpref.home import VARIABLE
    from agentpref_cli.schedules import At, Job

    place = home or Path(os.environ.get(VARIABLE) or ".agentpref")
    if not place.is_absolute():
        raise typer.BadParameter(
            f"{str(place)!r} is relative; name the folder of the home in the container, from /",
            param_hint="--home",
        )
    words = _words(place, namespace, model, config, max_minutes, notify)
    return Job(name, ["agentpref"], words, place, namespace, At.parse(at))


def _words(
    home: Path, namespace: str, model: str | None, config: Path | None,
    max_minutes: float | None, notify: str | None,
) -> list[str]:  # fmt: skip
    """The words of the update; a value that begins with a dash stays a value."""
    words = [f"--home={home}", f"--namespace={namespace}"]
    words += [] if model is None else [f"--model={model}"]
    words += [] if config is None else [f"--config={config}"]
    words += [] if max_minutes is None else [f"--max-minutes={max_minutes:g}"]
    return words + ([] if notify is None else [f"--notify={_absolute(notify)}"])


def _absolute(command: str) -> str:
    """A command whose program is found from everywhere, as timers have another PATH."""
    program, *rest = notices.split(command)
    found = shutil.which(program)
    if found is None:
        warn(
            f"--notify: {program} is not found here, or cannot be run; the nights will say so, too"
        )
    return shlex.join([os.path.abspath(found) if found else program, *rest])


def _require_settings(config: Path) -> None:
    """Refuse settings that every night would refuse."""
    from agentpref.config import UpdateConfig

    UpdateConfig.from_mapping(options.read_settings(config, ()))


def _owner(folder: Path) -> str:
    import pwd

    number = folder.stat().st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # a user of another machine
        return str(number)


def _hub(owner: str) -> Path:
    """Where models from a hub are kept."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME")
    return Path(named or f"~{owner}/.cache/huggingface").expanduser()


# Printing


def _value(plan: Plan) -> dict[str, Any]:
    files = {str(path): text for path, text in plan.files.items()}
    commands = [[*step.words] for step in plan.install]
    return {
        "files": files, "manifest": plan.manifest, "commands": commands, "hints": [*plan.hints],
    }  # fmt: skip


def _show(plan: Plan) -> None:
    for path, text in plan.files.items():
        say(f"# {path}")
        say(text)
    if plan.manifest:
        say(plan.manifest)
    for line in ("with --install it is written and turned on", *plan.hints):
        say(f"# {line}")


def _show_done(value: Mapping[str, Any]) -> None:
    for line in value["done"]:
        say(line, GOOD)
    for line in value["hints"]:
        say(line)


# Installing


def _install(job: Job, plan: Plan) -> list[str]:
    """Write the files and turn it on; returns what was done."""
    _require_ours(job, plan)
    _require_programs([*plan.install])
    for path, text in plan.files.items():
        _write(path, text, plan.mode)
    return [*(f"wrote {path}" for path in plan.files), *map(_run, plan.install)]


def _remove(job: Job, plan: Plan) -> list[str]:
    """Turn it off and remove the files; returns what was done."""
    _require_ours(job, plan)
    there = [path for path in plan.files if path.exists()]
    if plan.files and not there:
        names = " and ".join(map(str, plan.files))
        return [f"nothing was removed: there is no {names}"]
    _require_programs([*plan.remove, *plan.after])
    done = [*map(_run, plan.remove)]
    for path in there:
        path.unlink()
    return [*done, *(f"removed {path}" for path in there), *map(_run, plan.after)]


def _require_ours(job: Job, plan: Plan) -> None:
    """Refuse to change files that are not of this schedule."""
    from agentpref.errors import ConfigError

    for path in plan.files:
        if path.exists() and job.mark not in path.read_text("utf-8", "replace").splitlines()[:2]:
            raise ConfigError(
                f"{path} is not this home's schedule: its first lines lack {job.mark!r}; choose "
                "another --name, or remove the file yourself"
            )


def _require_programs(steps: Sequence[Step]) -> None:
    from agentpref.errors import ConfigError

    for program in (step.words[0] for step in steps):
        if shutil.which(program) is None:
            raise ConfigError(
                f"{program} is not on this machine; without --install the schedule is printed, or "
                "choose another --as"
            )


def _write(path: Path, text: str, mode: int) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    try:
        draft.touch(mode)
        draft.chmod(mode)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _run(step: Step) -> str:
    """Run a command of the system; returns it as it was.

    Raises:
        AgentprefError: it failed.
    """
    from agentpref.errors import AgentprefError

    words = shlex.join(step.words)
    given = None if step.given is None else step.given()
    try:
        done = subprocess.run(
            step.words, input=given, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise AgentprefError(f"`{words}` took more than {_SECONDS:g} s; run it by hand") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or "it said nothing"
        raise AgentprefError(
            f"`{words}` exited {done.returncode}: {said}; mend that, then run this again"
        )
    return f"ran {words}"
