"""Signals request a stop, which the trainer grants after the current step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch

# Ctrl-C; what `kill` and schedulers send; a terminal that closes; what Slurm sends ahead of a time limit.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


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
    """Context in which the first of the `STOPPING` signals is remembered instead of acted upon; a second SIGINT acts at once.

    A signal that the process ignores, such as SIGHUP under ``nohup``, stays ignored. Outside the main thread, where Python allows no
    handlers, the signals keep their meaning.

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
            for signum in STOPPING:
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
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


class Agreement:
    """Lets several processes stop after the same step, whichever of them a signal reached.

    They ask each other every few steps: about every `seconds` of the slowest, and at least every `most` steps. All of them compute from the
    same numbers when to ask next, so that none waits alone.

    Args:
        device: Where the processes exchange numbers.
        seconds: Time between two questions.
        most: Steps between two questions.
    """

    def __init__(self, device: torch.device, seconds: float = 2.0, most: int = 50) -> None:
        self.device, self.seconds, self.most = device, seconds, most
        self._next = self._step = 0
        self._time = time.perf_counter()

    def ask(self, signum: int, step: int) -> int:
        """The largest signal that any process has, or 0; 0 between two questions.

        Args:
            signum: Signal that this process received, or 0.
            step: Steps made, the same in all processes.
        """
        if step < self._next:
            return 0
        now = time.perf_counter()
        answers = torch.tensor([signum, (now - self._time) / max(1, step - self._step)], device=self.device)
        torch.distributed.all_reduce(answers, op=torch.distributed.ReduceOp.MAX)
        wish, step_seconds = answers.tolist()
        self._step, self._time, self._next = step, now, step + self.interval(step_seconds)
        return int(wish)

    def interval(self, step_seconds: float) -> int:
        """Steps until the next question.

        Examples:
            >>> agreement = Agreement(torch.device("cpu"), seconds=2.0, most=50)
            >>> [agreement.interval(step_seconds) for step_seconds in (10.0, 0.5, 0.001)]
            [1, 4, 50]
        """
        return max(1, min(self.most, int(self.seconds / max(step_seconds, 1e-9))))
