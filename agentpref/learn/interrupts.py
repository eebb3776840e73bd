"""Being asked to end: signals that a training run answers at its next step boundary.

A step that is broken off leaves weights and moments half changed, so while training holds them,
the first Ctrl-C or SIGTERM is only noted. Everywhere else, and the second time, it is raised at
once, as Python does. Knows nothing of what is being trained, nor of what is saved on the way out.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupts:
    """The signals that came while it listened. ``signum`` is the last of them, or ``None``."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._held = False

    @property
    def asked(self) -> bool:
        """Whether somebody has asked for the end."""
        return self.signum is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM for a block, where they are at Python's defaults.

        A host's own handlers stay, and outside of the main thread there is nothing to take.
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
        """Note the first signal within the block, and raise it at the block's end.

        Raises:
            KeyboardInterrupt: at the end where one signal came, at once where a second did.
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
