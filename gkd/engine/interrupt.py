"""Ctrl-C and SIGTERM become a wish to stop, which the trainer grants at the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):
    """Training stopped because a signal asked for it.

    Args:
        signum: The signal; a command ends with the exit code 128 + signum.
        message: What was saved and how to go on.
    """

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signum = signum


class Interrupts:
    """Context in which the first SIGINT or SIGTERM is remembered instead of acted upon; a second SIGINT acts at once.

    Outside the main thread, where Python allows no handlers, the signals keep their meaning.

    Examples:
        >>> import os
        >>> with Interrupts() as interrupts:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     interrupts.signum == signal.SIGTERM
        True
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._immediate = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Within, a signal raises `Interrupted` at once: for work that can be thrown away, such as an evaluation."""
        if self.signum is not None:
            raise Interrupted(self.signum)
        self._immediate = True
        try:
            yield
        finally:
            self._immediate = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        if self._immediate:
            raise Interrupted(signum)
