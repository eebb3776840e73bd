"""The processes that train one candidate together, and the messages between them.

A launcher (``accelerate launch``, ``torchrun``) starts the same program several times, and
Accelerate connects the processes and assigns their devices. The first process is the *main* one:
only it opens the home and decides. The others *follow*: they wait for orders and compute their
share. Without a launcher a team is one process, which adds no cost and imports nothing.

Orders, decisions and small numbers go through the CPU (gloo), where a closed connection shows at
once that a process ended. Gradients go from device to device (NCCL on GPUs, gloo on CPUs). All
messages are plain bytes and numbers; nothing is pickled.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from agentpref import errors
from agentpref.errors import AgentprefError, MissingDependency, UpdateError, UpdateInterrupted

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_MAIN = 0
_STEP_TIMEOUT = timedelta(minutes=30)
"""How long a device waits for another one's share of a step before it reports an error."""

_ORDER_TIMEOUT = timedelta(days=7)
"""How long followers wait while the main process works alone. Its end closes the connection."""


class Team:
    """A process's view of its team: it is ``rank`` of ``size``. ``Team()`` is a single process.

    Every process must call these at the same point: ``broadcast`` (in followers ``receive``),
    ``agree``, ``gather``, ``sum``, ``least``, ``sum_gradients`` and ``conclude``. Each raises
    ``UpdateError`` if another process ended.

    As a context manager it sends an error in its block to the followers, so that they end too.
    """

    def __init__(self, rank: int = 0, size: int = 1, orders: Any = None) -> None:
        self.rank, self.size = rank, size
        self._orders = orders
        self._in_step = True  # whether all processes are ready for an order
        self._over = False

    @property
    def main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == _MAIN

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.size == 1 or self._over or error is None:
            return
        if self.main and self._in_step:
            self._broadcast_last(error_to_json(error))
        else:
            self._disconnect()

    def deal(self, rows: Sequence[T]) -> Sequence[T]:
        """This process's share: every ``size``-th row, so that sorted rows are shared evenly."""
        return rows[self.rank :: self.size]

    @contextmanager
    def order(self, write: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Send an order to the followers, if there are any; the block is the main process's part.

        After an error in the block the followers may be anywhere, so no further order is sent.
        """
        if self.size > 1 and self.main:
            self.broadcast(orjson.dumps(write()))
            self._in_step = False
        yield
        self._in_step = True

    def receive(self) -> dict[str, Any]:
        """Wait for the main process's next order; one with an ``outcome`` is the last.

        Raises:
            UpdateError: the main process ended without a message.
            AgentprefError: the main process ended with this error.
        """
        order: dict[str, Any] = orjson.loads(self.broadcast(b""))
        self._over = "error" in order or "outcome" in order
        if "error" in order:
            raise error_from_json(order)
        return order

    def finish(self, outcome: Mapping[str, Any]) -> None:
        """Send the outcome to the followers, so that they end."""
        if self.size > 1:
            self._broadcast_last({"outcome": outcome})

    def broadcast(self, message: bytes) -> bytes:
        """Send the main process's message to all processes; returns it in each."""
        if self.size == 1:
            return message
        import torch
        from torch import distributed

        with _translating_errors():
            length = torch.tensor([len(message)])
            distributed.broadcast(length, _MAIN, group=self._orders)
            body = _tensor(message if self.main else b"", int(length))
            distributed.broadcast(body, _MAIN, group=self._orders)
        return body.numpy().tobytes()

    def agree(self, numbers: Sequence[float]) -> list[float]:
        """Send the main process's numbers to all processes, bit for bit; returns them in each."""
        return list(array("d", self.broadcast(array("d", numbers).tobytes())))

    def gather(self, message: bytes) -> list[bytes]:
        """Exchange messages: returns those of all processes, by rank, in each."""
        if self.size == 1:
            return [message]
        lengths = [int(length) for length in self._columns([len(message)])[0]]
        bodies = self._all_gather(_tensor(message, max(lengths)))
        return [
            body.numpy().tobytes()[:length] for body, length in zip(bodies, lengths, strict=True)
        ]

    def gather_numbers(self, numbers: Iterable[float]) -> list[list[float]]:
        """Exchange any number of numbers: returns those of all processes, by rank, in each."""
        return [list(array("d", found)) for found in self.gather(array("d", numbers).tobytes())]

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the processes, added in order of rank: equal to the last bit in all of them."""
        return [sum(others, main) for main, *others in self._columns(numbers)]

    def least(self, numbers: Sequence[float]) -> list[float]:
        """The minimum of each number over the processes."""
        return list(map(min, self._columns(numbers)))

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients of all processes in place; a missing one counts as zero."""
        if self.size == 1:
            return
        import torch
        from torch import distributed

        parameters = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        with _translating_errors():
            distributed.all_reduce(flat)
        parts = torch.split(flat, [p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def conclude(self, digest: str) -> None:
        """Compare the digests of what the processes ended with; an order may follow.

        Raises:
            UpdateError: they ended with different weights.
        """
        if len(set(self.gather(digest.encode()))) > 1:
            raise UpdateError(
                f"the {self.size} processes ended with different weights, so the update is "
                "discarded; use the same kind of device and the same torch everywhere, or a single "
                "process"
            )
        self._in_step = True

    def _columns(self, numbers: Sequence[float]) -> list[list[float]]:
        """For each number, its values in all processes, by rank."""
        if self.size == 1:
            return [[number] for number in numbers]
        import torch

        found = self._all_gather(torch.tensor(numbers, dtype=torch.float64))
        columns: list[list[float]] = torch.stack(found, 1).tolist()
        return columns

    def _all_gather(self, own: Tensor) -> list[Tensor]:
        import torch
        from torch import distributed

        with _translating_errors():
            found = [torch.empty_like(own) for _ in range(self.size)]
            distributed.all_gather(found, own, group=self._orders)
        return found

    def _broadcast_last(self, order: Mapping[str, Any]) -> None:
        """Send the last order; a process that ended already does not need it."""
        self._over = True
        try:
            self.broadcast(orjson.dumps(order))
        except UpdateError:
            self._disconnect()

    def _disconnect(self) -> None:
        """Close the connections, so that no other process waits for this one."""
        from torch import distributed

        self._over = True
        group, self._orders = self._orders, None
        distributed.destroy_process_group(group)


def follows() -> bool:
    """Whether a launcher started this process to follow another one. Imports nothing."""
    return shares() and int(os.environ.get("RANK", "0")) != _MAIN


def shares() -> bool:
    """Whether a launcher started this process as one of several. Imports nothing."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1  # torch's launchers set it


def assembled() -> Team:
    """Connect to the team of this process; returns once all its processes have called this.

    Raises:
        MissingDependency: there are several processes, and Accelerate is not installed.
        UpdateError: the other processes cannot be reached.
    """
    if not shares():
        return Team()
    try:
        import torch
        from accelerate import PartialState
    except ImportError as error:
        raise MissingDependency(
            f"several processes need {error.name}; install it with: pip install 'agentpref[train]'"
        ) from error
    from torch import distributed

    with _translating_errors():
        found = PartialState(cpu=not torch.cuda.is_available(), timeout=_STEP_TIMEOUT)
        orders = distributed.new_group(backend="gloo", timeout=_ORDER_TIMEOUT)
    return Team(found.process_index, found.num_processes, orders)


@contextmanager
def _translating_errors() -> Iterator[None]:
    """Raise torch's errors as ``UpdateError``: nearly always another process has ended."""
    try:
        yield
    except RuntimeError as error:  # torch raises nothing more specific for gloo
        why = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise UpdateError(
            f"another process of this update ended or cannot be reached ({why}); see the output "
            "of that process or of the launcher, and start all of them again"
        ) from error


def _tensor(message: bytes, length: int) -> Tensor:
    """Bytes as a tensor, padded with zeros to a length."""
    import torch

    return torch.frombuffer(bytearray(message.ljust(max(1, length), b"\0")), dtype=torch.uint8)


def error_to_json(error: BaseException) -> dict[str, Any]:
    """An error as its name and message; an error of another library becomes ``UpdateError``."""
    name, message = type(error).__name__, str(error)
    if not isinstance(error, AgentprefError):
        name, message = "UpdateError", f"the main process ended with {name}: {message}"
    signum = error.signum if isinstance(error, UpdateInterrupted) else None
    return {"error": name, "message": message, "signum": signum}


def error_from_json(order: Mapping[str, Any]) -> AgentprefError:
    """The error that :func:`error_to_json` wrote."""
    if order["signum"] is not None:
        return UpdateInterrupted(order["message"], order["signum"])
    found: AgentprefError = getattr(errors, order["error"])(order["message"])
    return found
