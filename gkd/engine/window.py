"""Running means on the device between two log points, and the watch for losses that are no numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_NAMES = 62  # bits of the mask of bad names that one int64 holds


class Window:
    """Sums named scalars where they are, so that a step costs no synchronisation with the host.

    The names may change from step to step: a term of weight 0 is not computed, and its mean is over the steps that had it.
    The first step with a value that is not finite is remembered, with the names, until `first_bad` asks.

    Args:
        device: Where the scalars are.

    Examples:
        >>> window = Window(torch.device("cpu"))
        >>> window.add(1, {"task": torch.tensor(1.0), "kd": torch.tensor(4.0)})
        >>> window.add(2, {"task": torch.tensor(2.0)})
        >>> window.means()
        {'task': 1.5, 'kd': 4.0}
        >>> window.first_bad() is None
        True
        >>> window.add(3, {"task": torch.tensor(float("nan"))})
        >>> window.first_bad()
        (3, ['task'])
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = {}
        self._names: list[tuple[int, tuple[str, ...]]] = []  # since which step which names
        self._bad = torch.tensor([-1, 0], device=device)  # first bad step, bit mask of its names
        self._bits = torch.ones((), dtype=torch.int64, device=device) << torch.arange(MAX_NAMES, device=device)

    @torch.no_grad()
    def add(self, step: int, values: dict[str, Tensor]) -> None:
        """Adds the scalars of one step."""
        names = tuple(values)
        if not 0 < len(names) <= MAX_NAMES:
            raise ValueError(f"Expected 1 to {MAX_NAMES} named scalars (got {len(names)})")
        vector = torch.stack([value.detach().float() for value in values.values()])
        if names in self._sums:
            self._sums[names] += vector
            self._counts[names] += 1
        else:
            self._sums[names], self._counts[names] = vector, 1
        if not self._names or self._names[-1][1] != names:
            self._names.append((step, names))
        bad = ~vector.isfinite()
        mask = (bad * self._bits[: len(names)]).sum()
        is_first = (mask != 0) & (self._bad[0] < 0)
        self._bad = torch.where(is_first, torch.stack([torch.full_like(mask, step), mask]), self._bad)

    def first_bad(self) -> tuple[int, list[str]] | None:
        """First step that added a value which is not finite, and the names of such values; waits for the device."""
        step, mask = self._bad.tolist()
        if step < 0:
            return None
        names = next(names for since, names in reversed(self._names) if since <= step)
        return step, [name for bit, name in enumerate(names) if mask >> bit & 1]

    def means(self, reduce: Any = None) -> dict[str, float]:
        """Mean of every name over the steps that had it; waits for the device.

        Args:
            reduce: Applied to the vector of means before it is read: the mean over processes.
        """
        names = list(dict.fromkeys(name for group in sorted(self._sums, key=len, reverse=True) for name in group))
        if not names:
            return {}
        totals = {name: torch.zeros((), device=self.device) for name in names}
        counts = dict.fromkeys(names, 0)
        for group, vector in self._sums.items():
            for name, value in zip(group, vector, strict=True):
                totals[name] = totals[name] + value
                counts[name] += self._counts[group]
        means = torch.stack([totals[name] / counts[name] for name in names])
        return dict(zip(names, (means if reduce is None else reduce(means)).tolist(), strict=True))

    def reset(self) -> None:
        """Starts the next window; the watch goes on."""
        self._sums, self._counts, self._names = {}, {}, self._names[-1:]

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, on the CPU."""
        return {"sums": [[list(names), vector.cpu(), self._counts[names]] for names, vector in self._sums.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the sums that `state_dict` gave."""
        self._sums = {tuple(names): vector.to(self.device, copy=True) for names, vector, _ in state["sums"]}
        self._counts = {tuple(names): count for names, _, count in state["sums"]}
