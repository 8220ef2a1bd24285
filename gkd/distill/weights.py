from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from gkd.distill.schedule import Constant, Schedule, as_schedule, check_number
from gkd.errors import UserError, unknown_name


class LossName(NamedTuple):
    """The address of one loss value: a term, the stage it looks at and the part of the term, where there are any."""

    term: str
    stage: str | None = None
    part: str | None = None

    def __str__(self) -> str:
        return "/".join(piece for piece in self if piece is not None)

    @property
    def weight_keys(self) -> list[str]:
        """The keys that may give its weight, the most specific one first."""
        keys = [str(self), str(self._replace(stage=None)), str(self._replace(part=None)), self.term]
        return list(dict.fromkeys(keys))


def resolve_weights(weights: Mapping[str, float | Schedule | Callable[[float], float]], names: Iterable[LossName]) -> dict[str, Schedule]:
    """Finds the weight of every loss: the most specific key wins, and what no key reaches weighs 1.

    For ``graph/layer3/edge`` the keys are, in this order: ``graph/layer3/edge``, ``graph/edge``, ``graph/layer3``, ``graph``.

    Args:
        weights: Numbers or schedules by key.
        names: All the losses there are.

    Returns:
        The schedule of every loss, by its full name and in the order of ``names``.

    Raises:
        UserError: If a key addresses no loss.
        ValueError: If a number is negative or not finite.

    Examples:
        >>> names = [LossName("graph", "layer3", part) for part in ("vertex", "edge")]
        >>> {name: schedule(0) for name, schedule in resolve_weights({"graph": 2.0, "graph/edge": 3.0}, names).items()}
        {'graph/layer3/vertex': 2.0, 'graph/layer3/edge': 3.0}
    """
    names = list(names)
    addresses = dict.fromkeys(key for name in names for key in name.weight_keys)
    for key in weights:
        if key not in addresses:
            raise UserError(unknown_name("a key of 'weights'", key, sorted(addresses)))
        if not callable(weights[key]):
            check_number(f"weights['{key}']", weights[key])
    schedules = {key: as_schedule(weight) for key, weight in weights.items()}
    return {str(name): next((schedules[key] for key in name.weight_keys if key in schedules), Constant(1.0)) for name in names}
