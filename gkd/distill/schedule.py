from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real


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

    @property
    def is_share(self) -> bool:
        """Whether the weight counts in units of the task's gradient, see :class:`Share`."""
        return False

    def __add__(self, other: Schedule | float) -> Schedule:
        return Sum(self, as_schedule(other))

    def __mul__(self, other: Schedule | float) -> Schedule:
        return Product(self, as_schedule(other))

    __radd__ = __add__
    __rmul__ = __mul__


@dataclass(frozen=True)
class Constant(Schedule):
    """The same weight at all times.

    Raises:
        ValueError: If the value is no number, negative or not finite: a loss is never to be made larger.
    """

    value: float

    def __post_init__(self) -> None:
        check_number("a weight", self.value)

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

    The factor is 0 before ``start``, grows to 1 over ``up``, stays there for ``hold`` and falls back to 0 over ``down``.
    Without ``hold`` it stays for ever.

    Args:
        value: The weight at the top.
        up: Length of the rise; 0 starts at the top.
        hold: Length at the top, or None for the rest of the training.
        down: Length of the fall; 0 ends at once.
        start: Time at which the rise begins.
        unit: Epochs that the lengths count in. The length of the training makes them fractions of it: with ``unit=240``,
            ``Ramp(up=0.1, hold=0.6, down=0.2)`` has faded out when the last tenth of 240 epochs begins. In gin: ``Ramp.unit = %EPOCHS``.

    Raises:
        ValueError: If the value or a length is negative or not finite, the unit not positive, or ``down`` is given without ``hold``.

    Examples:
        >>> ramp = Ramp(value=2.0, up=4, hold=10, down=2)
        >>> [ramp(epoch) for epoch in (0, 1, 4, 14, 15, 16)]
        [0.0, 0.5, 2.0, 2.0, 1.0, 0.0]
        >>> Ramp(up=0.5, unit=40)(epoch=10)
        0.5
    """

    value: float = 1.0
    up: float = 0.0
    hold: float | None = None
    down: float = 0.0
    start: float = 0.0
    unit: float = 1.0

    def __post_init__(self) -> None:
        for name in ("value", "up", "hold", "down", "start", "unit"):
            number = getattr(self, name)
            if name != "hold" or number is not None:
                check_number(f"Ramp.{name}", number)
        if self.down and self.hold is None:
            raise ValueError(f"Expected 'hold' with 'down': when does the fall begin? (got hold=None, down={self.down})")
        if self.unit == 0:
            raise ValueError("Expected Ramp.unit above 0 (got 0)")

    def factor(self, epoch: float) -> float:
        """Returns the share of the top weight at ``epoch``, in [0, 1]."""
        passed = epoch / self.unit - self.start
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
class Share(Schedule):
    """A weight in units of the task's gradient: the weighted loss pulls at the student s times as strongly as the task does.

    It stands beside plain weights of other losses: ``weights={'kd': 0.9, 'graph/vertex': Share(0.3)}``. How the pull is measured, and
    how the sum of all shares is bounded, says :class:`~gkd.distill.GradientBalance`.

    Args:
        weight: The share s: a number, or a schedule such as ``Ramp(value=0.3, up=0.1, hold=0.6, down=0.2, unit=240)``.

    Raises:
        ValueError: If the number is negative or not finite, or the schedule is a share already.

    Examples:
        >>> Share(Ramp(value=0.3, up=2))(epoch=1)
        0.15
    """

    weight: Schedule | float | Callable[[float], float]

    def __post_init__(self) -> None:
        if self._schedule.is_share:
            raise ValueError(f"Expected a number or a schedule that is no share yet (got {self.weight})")

    def __call__(self, epoch: float) -> float:
        """Returns the share."""
        return self._schedule(epoch)

    @property
    def always_zero(self) -> bool:
        """Whether the share is 0 for ever."""
        return self._schedule.always_zero

    @property
    def is_share(self) -> bool:
        """Always."""
        return True

    @property
    def _schedule(self) -> Schedule:
        return as_schedule(self.weight)


@dataclass(frozen=True)
class Sum(Schedule):
    """Two schedules added; both are shares, or none is."""

    first: Schedule
    second: Schedule

    def __post_init__(self) -> None:
        if self.first.is_share != self.second.is_share:
            raise ValueError(f"Expected both summands to be shares of the task's gradient, or none (got {self.first} and {self.second})")

    def __call__(self, epoch: float) -> float:
        """Returns the sum of both weights."""
        return self.first(epoch) + self.second(epoch)

    @property
    def always_zero(self) -> bool:
        """Whether both are."""
        return self.first.always_zero and self.second.always_zero

    @property
    def is_share(self) -> bool:
        """Whether both are."""
        return self.first.is_share


@dataclass(frozen=True)
class Product(Schedule):
    """Two schedules multiplied, at most one of them a share."""

    first: Schedule
    second: Schedule

    def __post_init__(self) -> None:
        if self.first.is_share and self.second.is_share:
            raise ValueError(f"Expected at most one factor to be a share of the task's gradient (got {self.first} and {self.second})")

    def __call__(self, epoch: float) -> float:
        """Returns the product of both weights."""
        return self.first(epoch) * self.second(epoch)

    @property
    def always_zero(self) -> bool:
        """Whether one of them is."""
        return self.first.always_zero or self.second.always_zero

    @property
    def is_share(self) -> bool:
        """Whether one of them is."""
        return self.first.is_share or self.second.is_share


def as_schedule(weight: Schedule | float | Callable[[float], float]) -> Schedule:
    """Makes a schedule of a number; a schedule stays what it is, and any other function of the epoch is taken at its word."""
    if isinstance(weight, Schedule):
        return weight
    return _Function(weight) if callable(weight) else Constant(weight)


@dataclass(frozen=True)
class _Function(Schedule):
    function: Callable[[float], float]

    def __call__(self, epoch: float) -> float:
        weight = self.function(epoch)
        check_number(f"a weight at epoch {epoch:g}", weight)
        return float(weight)


def check_number(name: str, value: object) -> None:
    """Asks for a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"Expected {name} to be a finite number that is not negative (got {value!r})")
