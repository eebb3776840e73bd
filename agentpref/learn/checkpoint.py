"""The state of a training run on disk, so a killed run continues where it stopped.

One safetensors file holds the tensors, and in its header everything else as JSON, with a digest of
both. It is written beside its place, synced and renamed, so the file is always a whole old state or
a whole new one. It holds weights, moments and numbers, and no text. A state is used only when all
of it is well-formed and its fingerprint is that of the run at hand.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from agentpref.errors import UnusableState
from agentpref.home import sync
from agentpref.learn.objective import StepResult

if TYPE_CHECKING:
    from torch import Tensor

EVERY_SECONDS = 30.0
"""Seconds of training between two saves, at least."""

FORMAT = 2
"""2: examples with any number of completions; states of format 1 had pairs and thumbs."""

_COST_SHARE = 0.01
_MOST_HEADER_BYTES = 1 << 26
_SUFFIX = ".safetensors"
_NUMBERS = (int, float)


@dataclass(frozen=True, slots=True)
class TrainingState:
    """A run between two steps: ``step`` of ``planned`` are done, one entry of history each.

    ``tensors`` are weights, moments and random generators by name; ``objective`` is the state of
    the losses; ``seconds`` is the time that the steps took.
    """

    fingerprint: str
    step: int
    planned: int
    seconds: float
    objective: Mapping[str, float]
    history: Sequence[StepResult]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Header:
    """What a state file says of itself; ``about`` holds the caller's own values."""

    state: TrainingState
    about: Mapping[str, Any]


class Checkpoint:
    """Where one run saves its state, and how often: seldom enough to cost below 1 % of its time.

    Args:
        path: the file; its folder is made with the first save.
        about: plain values that are stored with the state.
        every: seconds of training between two saves, at least.
        clock: a monotonic clock, in seconds.

    ``troubles`` lists why a state was not used, or could not be saved.
    """

    def __init__(
        self,
        path: Path,
        about: Mapping[str, Any] | None = None,
        *,
        every: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.about = path, dict(about or {})
        self.troubles: list[str] = []
        self._every, self._clock = every, clock
        self._saved_at, self._pause = clock(), every

    def due(self) -> bool:
        """Whether it is time to save again."""
        return self._clock() - self._saved_at >= self._pause

    def load(self, fingerprint: str) -> TrainingState | None:
        """The state of the run with this fingerprint; any other is removed and reported.

        The time to the next save counts from here.
        """
        self._saved_at = self._clock()
        if not self.path.exists():
            return None
        try:
            found = read(self.path).state
            if found.fingerprint != fingerprint:
                raise UnusableState("its rows, model or settings are not those of this run")
            return found
        except UnusableState as error:
            self.discard(str(error))
            return None

    def discard(self, why: str) -> None:
        """Remove the state, and report why it was not used."""
        self.troubles.append(f"the state of an interrupted training was discarded: {why}")
        remove(self.path)

    def save(self, state: TrainingState) -> None:
        """Replace the saved state. Training goes on where the disk cannot take it."""
        from safetensors import SafetensorError

        started = self._clock()
        try:
            _write(self.path, state, self.about)
        except (OSError, SafetensorError) as error:
            trouble = f"the training state could not be saved in {self.path.parent}: {error}"
            self.troubles += [trouble] if trouble not in self.troubles else []
        self._saved_at = self._clock()
        self._pause = max(self._every, (self._saved_at - started) / _COST_SHARE)


def path_of(folder: Path, namespace: str) -> Path:
    """The file of a namespace's state. Namespaces are any text, so a digest names the file."""
    return folder / (hashlib.blake2b(namespace.encode(), digest_size=16).hexdigest() + _SUFFIX)


def waiting(folder: Path) -> list[Header]:
    """The states in a folder; those that cannot be read are skipped."""
    found = (_peek_or_none(path) for path in sorted(folder.glob(f"*{_SUFFIX}")))
    return [header for header in found if header is not None]


def sweep(folder: Path) -> None:
    """Remove what a kill in the middle of a save left. Call it with the home locked."""
    for part in folder.glob("*.part"):
        part.unlink()
    _remove_empty(folder)


def remove(path: Path) -> None:
    """Remove a state, and its folder with the last one."""
    path.unlink(missing_ok=True)
    path.with_suffix(".part").unlink(missing_ok=True)
    _remove_empty(path.parent)


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The address of tensors by their names, types, shapes and bytes."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def peek(path: Path) -> Header:
    """Read the header of a state, and no tensor; torch is not needed.

    Raises:
        UnusableState: it is not a state, is damaged, or is of another version.
    """
    with _translating_errors():
        return _header(_metadata(path))


def read(path: Path) -> Header:
    """Read all of a state, and check it against its digest.

    Raises:
        UnusableState: as :func:`peek`, and where a tensor is not the one that was saved.
    """
    from safetensors import SafetensorError, safe_open

    header = peek(path)
    with _translating_errors():
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
        except SafetensorError as error:
            raise ValueError(f"it is damaged ({error})") from error
        if metadata.get("digest") != _seal(metadata["state"], tensors):
            raise ValueError("it is damaged (its digest does not match)")
    return Header(replace(header.state, tensors=tensors), header.about)


def _peek_or_none(path: Path) -> Header | None:
    try:
        return peek(path)
    except UnusableState:
        return None


def _write(path: Path, state: TrainingState, about: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in state.tensors.items()}
    body = orjson.dumps(
        {
            "format": FORMAT,
            "fingerprint": state.fingerprint,
            "step": state.step,
            "planned": state.planned,
            "seconds": state.seconds,
            "objective": dict(state.objective),
            "history": [list(step) for step in state.history],
            "about": about,
        }
    ).decode()
    path.parent.mkdir(mode=0o700, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        save_file(tensors, part, metadata={"state": body, "digest": _seal(body, tensors)})
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _seal(body: str, tensors: Mapping[str, Tensor]) -> str:
    joined = body + digest_tensors(tensors)
    return hashlib.blake2b(joined.encode(), digest_size=16).hexdigest()


def _metadata(path: Path) -> Any:
    """The metadata in the header of a safetensors file: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= _MOST_HEADER_BYTES:
            raise ValueError("it is damaged (no header)")
        return orjson.loads(orjson.loads(file.read(length))["__metadata__"]["state"])


def _header(found: Any) -> Header:
    """Check every field's type before it is used."""
    _require(isinstance(found, dict), "format")
    if found.get("format") != FORMAT:
        raise ValueError("another version of agentpref wrote it")
    step, planned, seconds = found["step"], found["planned"], found["seconds"]
    _require(type(step) is int and type(planned) is int and 0 <= step <= planned, "step")
    _require(_is_number(seconds) and seconds >= 0, "seconds")
    objective, about = found["objective"], found["about"]
    _require(isinstance(objective, dict) and all(map(_is_number, objective.values())), "objective")
    _require(isinstance(about, dict) and isinstance(found["fingerprint"], str), "about")
    history = [_result(entry) for entry in found["history"]]
    _require(len(history) == step, "history")
    state = TrainingState(found["fingerprint"], step, planned, seconds, objective, history)
    return Header(state, about)


def _result(entry: Any) -> StepResult:
    _require(isinstance(entry, list) and len(entry) == len(StepResult._fields), "history")
    _require(all(value is None or _is_number(value) for value in entry), "history")
    _require(entry[0] is not None, "history")
    return StepResult(*entry)


def _is_number(value: Any) -> bool:
    return type(value) in _NUMBERS and math.isfinite(value)


def _require(passed: bool, what: str) -> None:
    if not passed:
        raise ValueError(f"it is damaged ({what})")


@contextmanager
def _translating_errors() -> Iterator[None]:
    """Raise whatever reading strange bytes raises as ``UnusableState``."""
    try:
        yield
    except UnusableState:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise UnusableState(f"it is damaged ({error!r})") from error
    except (ValueError, OSError, OverflowError, RecursionError) as error:
        raise UnusableState(str(error)) from error


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
