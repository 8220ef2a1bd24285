"""The command lines of a sweep's cells, and of its teacher."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gkd.sweep.points import Point, Sweep


class Commands:
    """What each cell of a sweep is configured by, and the command that trains it.

    Args:
        sweep: The sweep.
        bindings: Further bindings of all cells.
    """

    def __init__(self, sweep: Sweep, bindings: Sequence[str]) -> None:
        self.sweep, self.further = sweep, list(bindings)

    @property
    def of_teacher(self) -> list[str]:
        """Those of the further bindings that the teacher's training takes too."""
        return [line for line in self.further if line.startswith("Trainer.device")]

    def files(self, point: Point) -> list[str]:
        """Gin files of a point."""
        return [*self.sweep.base, *point.files]

    def bindings(self, point: Point, weights: Path) -> list[str]:
        """Bindings of a point, whatever the seed, with its teacher at `weights`."""
        sweep = self.sweep
        teacher = [f"{sweep.teacher_macro} = {str(weights)!r}"] if sweep.teacher else []
        return [*sweep.bindings, *self.further, *teacher, *point.bindings]

    def train(self, point: Point, seed: int) -> list[str]:
        """Trains a cell."""
        options = ["--seed", str(seed)] if self.sweep.reports else ["--seed", str(seed), "--no-report"]
        return [*train_command(self.files(point), self.bindings(point, self.sweep.teacher_weights)), *options]

    def train_teacher(self) -> list[str]:
        """Trains the teacher."""
        return train_command(self.sweep.teacher, self.of_teacher)


def train_command(files: Sequence[str], bindings: Sequence[str]) -> list[str]:
    """The command that trains what the files and bindings configure, without its run folder."""
    options = [option for file in files for option in ("--gin", file)] + [option for line in bindings for option in ("--set", line)]
    return [sys.executable, "-m", "gkd", "train", *options]
