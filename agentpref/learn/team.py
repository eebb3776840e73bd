"""The processes that train one candidate together, and what passes between them.

A launcher (``accelerate launch``, ``torchrun``) starts the same program several times; Accelerate
finds the others and their devices. The first process is the *main* one: it alone knows the home and
decides. The others *follow*: they wait for its orders and compute their share. Where no launcher
started several, a team is one process, costs nothing and loads nothing.

Two ways lead from one process to another. Orders, decisions and small numbers go through the CPU
(gloo), where a process that ended is noticed at once by its closed connection; gradients go from
device to device (NCCL on GPUs, gloo on CPUs). All is plain bytes and numbers: nothing is pickled.
This module knows nothing of rows, models and losses.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from agentpref import errors
from agentpref.errors import AgentprefError, MissingDependency, UpdateError, UpdateInterrupted

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_MAIN = 0
_STEP_APART = timedelta(minutes=30)
"""How long a device waits for another one's share of a step before it is taken to be lost."""

_FOR_ORDERS = timedelta(days=7)
"""Followers wait as long as the main process works alone; its end is noticed without a timeout."""


class Team:
    """Some processes, seen from one of them: ``rank`` of ``size``. ``Team()`` is a process alone.

    What every process must call at the same point: ``tell`` (for followers ``hear``), ``agree``,
    ``gather``, ``sum``, ``least``, ``sum_gradients`` and ``conclude``. Each raises ``UpdateError``
    where another process is gone.

    As a context manager it lets the followers go at its end, with the error if there was one.
    """

    def __init__(self, rank: int = 0, size: int = 1, orders: Any = None) -> None:
        self.rank, self.size = rank, size
        self._orders = orders
        self._in_step = True  # whether all stand where an order may be given
        self._over = False

    @property
    def main(self) -> bool:
        """Whether this process is the one that decides."""
        return self.rank == _MAIN

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.size == 1 or self._over:
            return
        if self.main and self._in_step and error is not None:
            self._let_go(_described(error))
        elif error is not None:
            self._come_apart()

    def deal(self, rows: Sequence[T]) -> Sequence[T]:
        """This process's share: every ``size``-th row, so that sorted rows are dealt evenly."""
        return rows[self.rank :: self.size]

    @contextmanager
    def ordered(self, order: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Give an order, made where there is somebody to obey; the block is the main one's part.

        Where the block raises, nobody can say how far the others are: no order can follow.
        """
        if self.size > 1 and self.main:
            self.tell(orjson.dumps(order()))
            self._in_step = False
        yield
        self._in_step = True

    def hear(self) -> dict[str, Any]:
        """Wait for the main process's next order.

        Raises:
            UpdateError: the main process is gone.
            AgentprefError: it ended with this error, and let its followers go.
        """
        order: dict[str, Any] = orjson.loads(self.tell(b""))
        if "error" in order:
            self._over = True
            raise _error(order)
        return order

    def dismiss(self, outcome: Mapping[str, Any]) -> None:
        """Let the followers go, with what all has come to."""
        if self.size > 1:
            self._let_go({"outcome": outcome})

    def released(self) -> None:
        """Note, as a follower, that it was let go."""
        self._over = True

    def tell(self, message: bytes) -> bytes:
        """The main process's message, in all processes."""
        if self.size == 1:
            return message
        import torch
        from torch import distributed

        with _connected():
            length = torch.tensor([len(message)])
            distributed.broadcast(length, _MAIN, group=self._orders)
            body = _tensor(message, int(length)) if self.main else _tensor(b"", int(length))
            distributed.broadcast(body, _MAIN, group=self._orders)
        return body.numpy().tobytes()

    def agree(self, numbers: Sequence[float]) -> list[float]:
        """The main process's numbers, to the last bit, in all processes."""
        if self.size == 1:
            return list(numbers)
        import torch
        from torch import distributed

        with _connected():
            agreed = torch.tensor(numbers, dtype=torch.float64)
            distributed.broadcast(agreed, _MAIN, group=self._orders)
        found: list[float] = agreed.tolist()
        return found

    def gather(self, message: bytes) -> list[bytes]:
        """The messages of all processes, by rank, in all processes."""
        if self.size == 1:
            return [message]
        lengths = [int(length) for length in self._columns([len(message)])[0]]
        own = _tensor(message, max(lengths))
        bodies = self._gathered(own)
        return [
            body.numpy().tobytes()[:length] for body, length in zip(bodies, lengths, strict=True)
        ]

    def gather_numbers(self, numbers: Iterable[float]) -> list[list[float]]:
        """As many numbers as each process has, by rank."""
        return [list(array("d", found)) for found in self.gather(array("d", numbers).tobytes())]

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the processes, added up by rank: the same to the last bit in all of them."""
        return [sum(others, main) for main, *others in self._columns(numbers)]

    def least(self, numbers: Sequence[float]) -> list[float]:
        """The least of each number over the processes."""
        return list(map(min, self._columns(numbers)))

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add the gradients of all processes up, in place and in one go; none counts as zero."""
        if self.size == 1:
            return
        import torch
        from torch import distributed

        parameters = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        with _connected():
            distributed.all_reduce(flat)
        parts = torch.split(flat, [p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def conclude(self, digest: str) -> None:
        """Hold what all processes ended with against one another; an order may follow.

        Raises:
            UpdateError: they ended with different weights.
        """
        if len(set(self.gather(digest.encode()))) > 1:
            raise UpdateError(
                f"the {self.size} processes ended with different weights, so that none can be "
                "trusted; use devices of one kind and one version of torch, or a single process"
            )
        self._in_step = True

    def _columns(self, numbers: Sequence[float]) -> list[list[float]]:
        """Of each number, that of every process, by rank."""
        if self.size == 1:
            return [[number] for number in numbers]
        import torch

        found = self._gathered(torch.tensor(numbers, dtype=torch.float64))
        columns: list[list[float]] = torch.stack(found, 1).tolist()
        return columns

    def _gathered(self, own: Tensor) -> list[Tensor]:
        import torch
        from torch import distributed

        with _connected():
            found = [torch.empty_like(own) for _ in range(self.size)]
            distributed.all_gather(found, own, group=self._orders)
        return found

    def _let_go(self, order: Mapping[str, Any]) -> None:
        """Give the last order. Who is gone already need not be told."""
        self._over = True
        try:
            self.tell(orjson.dumps(order))
        except UpdateError:
            self._come_apart()

    def _come_apart(self) -> None:
        """Close the connections, so that nobody waits for this process any longer."""
        from torch import distributed

        self._over = True
        group, self._orders = self._orders, None
        distributed.destroy_process_group(group)


def follows() -> bool:
    """Whether a launcher started this process to follow another one. Loads nothing."""
    return shares() and _launched()[0] != _MAIN


def shares() -> bool:
    """Whether a launcher started this process as one of several. Loads nothing."""
    return _launched()[1] > 1


def assembled() -> Team:
    """The team that this process belongs to, once all of its processes have called this.

    Raises:
        MissingDependency: several processes were started, and Accelerate is not installed.
        UpdateError: the others could not be reached.
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

    with _connected():
        found = PartialState(cpu=not torch.cuda.is_available(), timeout=_STEP_APART)
        orders = distributed.new_group(backend="gloo", timeout=_FOR_ORDERS)
    return Team(found.process_index, found.num_processes, orders)


def _launched() -> tuple[int, int]:
    """Rank and size as torch's launchers tell them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def _connected() -> Iterator[None]:
    """Say of what torch cannot send that another process is gone, which is nearly always why."""
    try:
        yield
    except RuntimeError as error:  # torch has no narrower one for gloo
        why = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise UpdateError(
            f"another process of this update ended or cannot be reached ({why}); see what that "
            "process or the launcher said, and start all of them again"
        ) from error


def _tensor(message: bytes, length: int) -> Tensor:
    """Bytes as a tensor, filled up with zeros to a length."""
    import torch

    return torch.frombuffer(bytearray(message.ljust(max(1, length), b"\0")), dtype=torch.uint8)


def _described(error: BaseException) -> dict[str, Any]:
    """An error as its name and words; of a stranger's the followers need not know more."""
    if isinstance(error, AgentprefError):
        signum = error.signum if isinstance(error, UpdateInterrupted) else None
        return {"error": type(error).__name__, "words": str(error), "signum": signum}
    words = f"the first process ended with {type(error).__name__}: {error}"
    return {"error": UpdateError.__name__, "words": words, "signum": None}


def _error(order: Mapping[str, Any]) -> AgentprefError:
    """The error that was described."""
    if order["signum"] is not None:
        return UpdateInterrupted(order["words"], order["signum"])
    kind = getattr(errors, order["error"])
    found: AgentprefError = kind(order["words"])
    return found
