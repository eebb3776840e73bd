"""The state of a training run on disk, so that one that was killed goes on where it was.

One safetensors file: the tensors, and in its header everything else as JSON, with a digest over
both. It is written beside its place, synced and renamed, so that there is always the old state or
the new one, whole. It holds weights, moments and numbers; of texts nothing but the fingerprint of
the run. What is read back is believed only when all of it is well-formed and the fingerprint is
that of the run at hand. Knows nothing of models, optimizers and pairs.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from agentpref.config import UpdateConfig
from agentpref.errors import UnusableState
from agentpref.home import sync
from agentpref.learn.encode import EncodedPair, sequence_key
from agentpref.learn.objective import StepResult, TrainingRow

if TYPE_CHECKING:
    from torch import Tensor

EVERY_SECONDS = 30.0
"""How much training is between two saves, at least."""

_COST_SHARE = 0.01
_FORMAT = 1
_MOST_HEADER_BYTES = 1 << 26
_SUFFIX = ".safetensors"
_NUMBERS = (int, float)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run between two steps: ``step`` of ``planned`` are done, one entry of history each.

    ``tensors`` are weights, moments and generators by name; ``objective`` is the loss's own state;
    ``seconds`` is the time that the steps took.
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
    """What a state says of itself, ``about`` being the caller's own words."""

    snapshot: Snapshot
    about: Mapping[str, Any]


class Checkpoint:
    """Where one run keeps its state, and how often: as seldom as costs below 1 % of its time.

    Args:
        path: the file; its folder is made when there is something to keep.
        about: plain values that are kept with the state, for whoever finds it.
        every: seconds of training between two saves, at least.
        clock: seconds that pass.

    ``troubles`` says in words what was wrong with a state that was not used, or could not be kept.
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

    def load(self, fingerprint: str) -> Snapshot | None:
        """The state of the run with this fingerprint; any other is removed and said.

        From here on it is counted when to save again.
        """
        self._saved_at = self._clock()
        if not self.path.exists():
            return None
        try:
            found = read(self.path).snapshot
            if found.fingerprint != fingerprint:
                raise UnusableState("its rows, model or settings are not those of this run")
            return found
        except UnusableState as error:
            self.refuse(str(error))
            return None

    def refuse(self, why: str) -> None:
        """Remove the state, and say why it was not used."""
        self.troubles.append(f"the state of an interrupted training was thrown away: {why}")
        remove(self.path)

    def save(self, snapshot: Snapshot) -> None:
        """Put a state in the place of the last one. A disk that cannot take it ends no training."""
        from safetensors import SafetensorError

        started = self._clock()
        try:
            _write(self.path, snapshot, self.about)
        except (OSError, SafetensorError) as error:
            trouble = f"the training could not be saved in {self.path.parent}: {error}"
            self.troubles += [trouble] if trouble not in self.troubles else []
        self._saved_at = self._clock()
        self._pause = max(self._every, (self._saved_at - started) / _COST_SHARE)


def path_of(folder: Path, namespace: str) -> Path:
    """The file of a namespace's state. Namespaces are any text, so a digest names it."""
    return folder / (hashlib.blake2b(namespace.encode(), digest_size=16).hexdigest() + _SUFFIX)


def waiting(folder: Path) -> list[Header]:
    """The states that are kept in a folder; those that cannot be read are passed over."""
    found = (_peek_or_none(path) for path in sorted(folder.glob(f"*{_SUFFIX}")))
    return [header for header in found if header is not None]


def sweep(folder: Path) -> None:
    """Remove what a kill in the middle of a save left. Call it with the home held."""
    for part in folder.glob("*.part"):
        part.unlink()
    _remove_empty(folder)


def remove(path: Path) -> None:
    """Remove a state, and its folder with the last one."""
    path.unlink(missing_ok=True)
    _part(path).unlink(missing_ok=True)
    _remove_empty(path.parent)


def determining(config: UpdateConfig) -> dict[str, Any]:
    """The settings that determine what is trained, as plain values: all but gate and budget."""
    settings = config.to_mapping()
    for name in ("gate", "max_minutes"):
        settings.pop(name)
    plain: dict[str, Any] = orjson.loads(orjson.dumps(settings))
    return plain


def fingerprint(batches: Sequence[Sequence[TrainingRow]], **facts: Any) -> str:
    """Address a run by all that determines it: its rows in order, and plain values beside them.

    Of a row: its token ids, its references to the last bit, and what the loss reads of its pair.
    """
    import torch

    keys: dict[int, bytes] = {}
    facts |= {"torch": torch.__version__, "agentpref": _version(), "format": _FORMAT}
    digest = hashlib.blake2b(orjson.dumps(facts, option=orjson.OPT_SORT_KEYS), digest_size=16)
    for batch in batches:
        digest.update(b"batch")
        for row in batch:
            if id(row) not in keys:
                keys[id(row)] = _row_key(row)
            digest.update(keys[id(row)])
    return digest.hexdigest()


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Address tensors by their names, types, shapes and bytes."""
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
        UnusableState: it is no state, is damaged, or is of another version.
    """
    with _refusing():
        return _header(_metadata(path))


def read(path: Path) -> Header:
    """Read all of a state, and hold it against its digest.

    Raises:
        UnusableState: as :func:`peek`, and where a tensor is not the one that was saved.
    """
    from safetensors import SafetensorError, safe_open

    header = peek(path)
    with _refusing():
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
        except SafetensorError as error:
            raise ValueError(f"it is damaged ({error})") from error
        if metadata.get("digest") != _seal(metadata["state"], tensors):
            raise ValueError("it is damaged (its digest is another)")
    return Header(replace(header.snapshot, tensors=tensors), header.about)


def _peek_or_none(path: Path) -> Header | None:
    try:
        return peek(path)
    except UnusableState:
        return None


def _version() -> str:
    """The version that is installed: another one may train differently."""
    try:
        return version("agentpref")
    except PackageNotFoundError:
        return "a checkout"


def _row_key(row: TrainingRow) -> bytes:
    """Address all that the loss reads of a row."""
    encoded = row.encoded
    parts = [
        *(sequence_key(encoded.prompt, ids) for ids in encoded.completions),
        *(float(logp).hex() for logp in row.reference),
    ]
    if isinstance(encoded, EncodedPair):
        pair = encoded.pair
        parts += [float(pair.weight).hex(), float(pair.noise).hex(), pair.origin]
        parts += [f"{pair.chosen_by}", f"{pair.rejected_by}"]
    else:
        parts += ["liked" if encoded.thumb.desirable else "disliked"]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()


def _write(path: Path, snapshot: Snapshot, about: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in snapshot.tensors.items()}
    body = orjson.dumps(
        {
            "format": _FORMAT,
            "fingerprint": snapshot.fingerprint,
            "step": snapshot.step,
            "planned": snapshot.planned,
            "seconds": snapshot.seconds,
            "objective": dict(snapshot.objective),
            "history": [list(step) for step in snapshot.history],
            "about": about,
        }
    ).decode()
    path.parent.mkdir(mode=0o700, exist_ok=True)
    part = _part(path)
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
    """What the header of a safetensors file says beside the tensors: 8 bytes of length, JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= _MOST_HEADER_BYTES:
            raise ValueError("it is damaged (no header)")
        return orjson.loads(orjson.loads(file.read(length))["__metadata__"]["state"])


def _header(found: Any) -> Header:
    """Take nothing on trust: a field of another kind than it should be is damage."""
    _require(isinstance(found, dict) and found.get("format") == _FORMAT, "format")
    step, planned, seconds = found["step"], found["planned"], found["seconds"]
    _require(type(step) is int and type(planned) is int and 0 <= step <= planned, "step")
    _require(_is_number(seconds) and seconds >= 0, "seconds")
    objective, about = found["objective"], found["about"]
    _require(isinstance(objective, dict) and all(map(_is_number, objective.values())), "objective")
    _require(isinstance(about, dict) and isinstance(found["fingerprint"], str), "about")
    history = [_result(entry) for entry in found["history"]]
    _require(len(history) == step, "history")
    snapshot = Snapshot(found["fingerprint"], step, planned, seconds, objective, history)
    return Header(snapshot, about)


def _result(entry: Any) -> StepResult:
    _require(isinstance(entry, list) and len(entry) == len(StepResult._fields), "history")
    _require(all(value is None or _is_number(value) for value in entry), "history")
    _require(entry[0] is not None, "history")
    return StepResult(*entry)


def _is_number(value: Any) -> bool:
    return type(value) in _NUMBERS and math.isfinite(value)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"it is damaged, or of another version ({what})")


@contextmanager
def _refusing() -> Iterator[None]:
    """Whatever reading strange bytes comes to is one thing to the caller: not usable."""
    try:
        yield
    except UnusableState:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise UnusableState(f"it is damaged, or of another version ({error!r})") from error
    except (ValueError, OSError, OverflowError, RecursionError) as error:
        raise UnusableState(str(error)) from error


def _part(path: Path) -> Path:
    return path.with_suffix(".part")


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
