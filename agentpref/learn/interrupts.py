"""Ctrl-C and SIGTERM: a training run stops at its next step boundary.

Breaking off a step would leave weights and optimizer moments half changed. So during training the
first signal is only noted. Outside of training, and the second time, it is raised at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupts:
    """Catches signals. ``signum`` is the last one that came, or ``None``."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._held = False

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.signum is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM within the block, if they have Python's default handlers.

        A host's own handlers stay. Outside of the main thread this changes nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        defaults: dict[int, Any] = {
            signal.SIGINT: signal.default_int_handler,
            signal.SIGTERM: signal.SIG_DFL,
        }
        taken = {s: d for s, d in defaults.items() if signal.getsignal(s) == d}
        try:
            for signum in taken:
                signal.signal(signum, self._on_signal)
            yield
        finally:
            for signum, default in taken.items():
                signal.signal(signum, default)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Note the first signal within the block, and raise it at the end of the block.

        Raises:
            KeyboardInterrupt: at the end after one signal, at once on a second one.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.asked:
            raise KeyboardInterrupt

    def _on_signal(self, signum: int, frame: object) -> None:
        first, self.signum = self.signum is None, signum
        if not (first and self._held):
            raise KeyboardInterrupt
