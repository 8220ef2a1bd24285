"""Where a training is, how long it took, and what is said of it in the end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Position:
    """Where a training is; part of every checkpoint."""

    step: int = 0
    evaluated: int = 0  # step of the last evaluation
    last: dict[str, Any] | None = None  # record of the last evaluation
    best: dict[str, Any] | None = None  # record of the best one
    seconds: float = 0.0  # training alone, without evaluations and checkpoints
    samples: int = 0
    peak: float | None = None  # score that the patience of an early stop counts from
    stale: int = 0  # evaluations since
    stopped: bool = False  # whether that patience is over


@dataclass(frozen=True)
class Summary:
    """What `Trainer.fit` gives back.

    Attributes:
        step: Optimiser steps made.
        finished: Whether the training reached its end.
        last: Record of the last evaluation, if there was one.
        best: Record of the evaluation with the highest score.
        seconds: Time of the training alone, over all resumptions.
        images_per_second: Mean throughput over that time.
    """

    step: int
    finished: bool
    last: dict[str, Any] | None
    best: dict[str, Any] | None
    seconds: float
    images_per_second: float


@dataclass
class Clock:
    """A stopwatch that can be halted."""

    seconds: float = 0.0
    _since: float | None = field(default=None, repr=False)

    def start(self) -> None:
        """Runs."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Halts."""
        self.seconds, self._since = self.read(), None

    @property
    def is_running(self) -> bool:
        """Whether it runs."""
        return self._since is not None

    def read(self) -> float:
        """Seconds that it ran."""
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)
