"""Saves the state of a training run, so a killed run continues where it stopped.

One safetensors file holds the tensors, and in its header everything else as JSON, with a digest of
both. It is written beside its place, synced and renamed, so the file is always a whole old state or
a whole new one. It holds weights, moments and numbers, and no text.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from agentpref.config import UpdateConfig
from agentpref.errors import NotKept, UnusableState
from agentpref.home import is_of_system, make_private_folder, ours, replacing
from agentpref.learn.objective import StepResult, TrainingRow
from agentpref.models.base_files import read_header

if TYPE_CHECKING:
    from torch import Tensor

EVERY_SECONDS = 30.0
"""Default of the least time of training between two saves."""

FORMAT = 2
"""2: examples with any number of completions; states of format 1 had pairs and thumbs."""

_COST_SHARE = 0.01
_SUFFIX = ".safetensors"


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
    """A state without its tensors, and the caller's own values ``about`` it."""

    state: TrainingState
    about: Mapping[str, Any]


class Checkpoint:
    """Saves one run's state, seldom enough to cost less than 1 % of its time.

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
        self._is_of_another = False

    def supersede(self) -> None:
        """Another run begins: the state of the one that ended stays until the first save."""
        self._is_of_another = True

    def due(self) -> bool:
        """Whether it is time to save again."""
        return self._clock() - self._saved_at >= self._pause

    def load(self, fingerprint: str) -> TrainingState | None:
        """The state of the run with this fingerprint; any other is removed and reported.

        The time to the next save counts from here.
        """
        self._saved_at = self._clock()
        if self._is_of_another or not self.path.exists():
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
        """Replace the saved state; an error of the disk is reported, and training goes on."""
        from safetensors import SafetensorError

        started, self._is_of_another = self._clock(), False
        try:
            _write(self.path, state, self.about)
        except (OSError, SafetensorError) as error:
            if isinstance(error, OSError) and not is_of_system(error):
                raise
            trouble = f"the training state could not be saved in {self.path.parent}: {error}"
            if trouble not in self.troubles:
                self.troubles.append(trouble)
        self._saved_at = self._clock()
        self._pause = max(self._every, (self._saved_at - started) / _COST_SHARE)


def training_settings(config: UpdateConfig) -> dict[str, Any]:
    """The settings that determine what is trained, as plain values."""
    return training_part(config.to_mapping())


def training_part(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some settings that determine what is trained: all but gate and budget."""
    return {name: v for name, v in settings.items() if name not in ("gate", "max_minutes")}


def fingerprint(batches: Sequence[Sequence[TrainingRow]], **facts: Any) -> str:
    """A digest of all that determines a run: its rows in order, and plain values.

    A row counts with its token ids, its references to the last bit, and what the losses read of it.
    """
    import torch

    try:
        installed = version("agentpref")  # another version may train differently
    except PackageNotFoundError:
        installed = "a checkout"
    facts |= {"torch": torch.__version__, "agentpref": installed, "format": FORMAT}
    digest = hashlib.blake2b(orjson.dumps(facts, option=orjson.OPT_SORT_KEYS), digest_size=16)
    keys: dict[int, bytes] = {}
    for batch in batches:
        digest.update(b"batch")
        for row in batch:
            if id(row) not in keys:
                keys[id(row)] = hashlib.blake2b(orjson.dumps(row.freeze()), digest_size=16).digest()
            digest.update(keys[id(row)])
    return digest.hexdigest()


def path_of(folder: Path, namespace: str) -> Path:
    """The file of a namespace's state. Namespaces are any text, so a digest names the file."""
    return folder / (hashlib.blake2b(namespace.encode(), digest_size=16).hexdigest() + _SUFFIX)


def waiting(folder: Path) -> list[Header]:
    """The states in a folder; those that cannot be read are skipped."""
    found = []
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        with suppress(UnusableState):
            found.append(peek(path))
    return found


def damaged(folder: Path) -> dict[Path, str]:
    """The states in a folder that cannot be read, and why."""
    found = {}
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        try:
            peek(path)
        except UnusableState as error:  # noqa: PERF203
            found[path] = str(error)
    return found


def sweep(folder: Path) -> None:
    """Remove what a kill in the middle of a save left. Call it with the home locked.

    Raises:
        NotKept: the folder is not this user's to use.
    """
    with ours(folder):
        for draft in folder.glob(".*"):
            draft.unlink()
        _remove_empty(folder)


def remove(path: Path) -> None:
    """Remove a state, and its folder with the last one."""
    path.unlink(missing_ok=True)
    _remove_empty(path.parent)


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A digest of tensors: of their names, types, shapes and bytes."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def peek(path: Path) -> Header:
    """Read the header of a state without its tensors; torch is not needed.

    Raises:
        UnusableState: it is not a state, is damaged, or is of another version.
    """
    with _translating_errors():
        header = read_header(path)
        ends = [entry["data_offsets"][1] for entry in header.tensors.values()]
        _require(path.stat().st_size == header.start + max(ends, default=0), "its length")
        return _header(orjson.loads(header.metadata["state"]))


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
            raise ValueError(error) from error
        _require(metadata.get("digest") == _seal(metadata["state"], tensors), "its digest")
    return Header(replace(header.state, tensors=tensors), header.about)


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
    make_private_folder(path.parent)
    with replacing(path) as draft:
        save_file(tensors, draft, metadata={"state": body, "digest": _seal(body, tensors)})


def _seal(body: str, tensors: Mapping[str, Tensor]) -> str:
    joined = body + digest_tensors(tensors)
    return hashlib.blake2b(joined.encode(), digest_size=16).hexdigest()


def _header(found: Any) -> Header:
    """Check every field's type before it is used."""
    if found["format"] != FORMAT:
        raise UnusableState("another version of agentpref wrote it")
    step, planned, seconds = found["step"], found["planned"], found["seconds"]
    objective, about = found["objective"], found["about"]
    _require(type(step) is int and type(planned) is int and 0 <= step <= planned, "step")
    _require(_is_number(seconds) and seconds >= 0, "seconds")
    _require(isinstance(objective, dict) and all(map(_is_number, objective.values())), "objective")
    _require(isinstance(about, dict) and isinstance(found["fingerprint"], str), "about")
    history = [StepResult(*entry) for entry in found["history"]]
    _require(len(history) == step, "history")
    for result in history:
        optional = [value for value in (result.kl, result.nll) if value is not None]
        _require(all(map(_is_number, (result.loss, result.margin, *optional))), "history")
    state = TrainingState(found["fingerprint"], step, planned, seconds, objective, history)
    return Header(state, about)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _require(passed: bool, what: str) -> None:
    if not passed:
        raise ValueError(what)


@contextmanager
def _translating_errors() -> Iterator[None]:
    """Raise whatever reading damaged bytes raises as ``UnusableState``."""
    try:
        yield
    except UnusableState:
        raise
    except NotKept as error:  # it is not this user's, or no plain file
        raise UnusableState(f"it cannot be read ({error})") from error
    except OSError as error:
        if isinstance(error, TimeoutError) and not is_of_system(error):
            raise  # of a signal handler; what safetensors raises has no number either
        raise UnusableState(f"it cannot be read ({error})") from error
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UnusableState(f"it is damaged ({error})") from error


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
