from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass


class Schedule(ABC):
    """A weight over the time of a training: a pure function of the epoch, so that there is nothing to checkpoint.

    Schedules add and multiply with each other and with numbers: ``Ramp(up=5) * 0.9 + 0.1`` rises from 0.1 to 1.
    """

    @abstractmethod
    def __call__(self, epoch: float) -> float:
        """Returns the weight at ``epoch``, which need not be a whole number."""

    @property
    def always_zero(self) -> bool:
        """Whether the weight is known to be 0 for ever, so that what it weighs need not exist."""
        return False

    def __add__(self, other: Schedule | float) -> Schedule:
        return Sum(self, as_schedule(other))

    def __mul__(self, other: Schedule | float) -> Schedule:
        return Product(self, as_schedule(other))

    __radd__ = __add__
    __rmul__ = __mul__


@dataclass(frozen=True)
class Constant(Schedule):
    """The same weight at all times."""

    value: float

    def __call__(self, epoch: float) -> float:
        """Returns the weight."""
        return self.value

    @property
    def always_zero(self) -> bool:
        """Whether the weight is 0."""
        return self.value == 0


@dataclass(frozen=True)
class Ramp(Schedule):
    """Rises linearly, holds, and falls linearly.

    The factor is 0 before ``start``, grows to 1 over ``up`` epochs, stays there for ``hold`` epochs and falls back to 0 over ``down``
    epochs. Without ``hold`` it stays for ever.

    Args:
        value: The weight at the top.
        up: Epochs of the rise; 0 starts at the top.
        hold: Epochs at the top, or None for the rest of the training.
        down: Epochs of the fall; 0 ends at once.
        start: Epoch at which the rise begins.

    Raises:
        ValueError: If a length is negative, or ``down`` is given without ``hold``.

    Examples:
        >>> ramp = Ramp(value=2.0, up=4, hold=10, down=2)
        >>> [ramp(epoch) for epoch in (0, 1, 4, 14, 15, 16)]
        [0.0, 0.5, 2.0, 2.0, 1.0, 0.0]
    """

    value: float = 1.0
    up: float = 0.0
    hold: float | None = None
    down: float = 0.0
    start: float = 0.0

    def __post_init__(self) -> None:
        for name in ("up", "hold", "down", "start"):
            length = getattr(self, name)
            if length is not None and not length >= 0:
                raise ValueError(f"Expected '{name}' not to be negative (got {length})")
        if self.down and self.hold is None:
            raise ValueError(f"Expected 'hold' with 'down': when does the fall begin? (got hold=None, down={self.down})")

    def factor(self, epoch: float) -> float:
        """Returns the share of the top weight at ``epoch``, in [0, 1]."""
        passed = epoch - self.start
        if passed < 0:
            return 0.0
        if passed < self.up:
            return passed / self.up
        passed -= self.up
        if self.hold is None or passed < self.hold:
            return 1.0
        passed -= self.hold
        return 1.0 - passed / self.down if passed < self.down else 0.0

    def __call__(self, epoch: float) -> float:
        """Returns the weight at ``epoch``."""
        return self.value * self.factor(epoch)

    @property
    def always_zero(self) -> bool:
        """Whether even the top weight is 0."""
        return self.value == 0


@dataclass(frozen=True)
class Sum(Schedule):
    """Two schedules added."""

    first: Schedule
    second: Schedule

    def __call__(self, epoch: float) -> float:
        """Returns the sum of both weights."""
        return self.first(epoch) + self.second(epoch)

    @property
    def always_zero(self) -> bool:
        """Whether both are."""
        return self.first.always_zero and self.second.always_zero


@dataclass(frozen=True)
class Product(Schedule):
    """Two schedules multiplied."""

    first: Schedule
    second: Schedule

    def __call__(self, epoch: float) -> float:
        """Returns the product of both weights."""
        return self.first(epoch) * self.second(epoch)

    @property
    def always_zero(self) -> bool:
        """Whether one of them is."""
        return self.first.always_zero or self.second.always_zero


def as_schedule(weight: Schedule | float | Callable[[float], float]) -> Schedule:
    """Makes a schedule of a number; a schedule stays what it is, and any other function of the epoch is taken at its word."""
    if isinstance(weight, Schedule):
        return weight
    if callable(weight):
        return _Function(weight)
    return Constant(float(weight))


@dataclass(frozen=True)
class _Function(Schedule):
    function: Callable[[float], float]

    def __call__(self, epoch: float) -> float:
        return float(self.function(epoch))
