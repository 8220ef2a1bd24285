"""What a training calls on its way, and when it ends before its last step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gkd.engine.checks import check_integer, check_number
from gkd.engine.position import Position, Summary


class Callback:
    """Base of the user's own callbacks: override what you need, and bind ``Trainer.callbacks = [@MyCallback()]``.

    All arguments are passed by name, and a method may leave out those that it does not use. Every process calls its own.

    Examples:
        >>> class Progress(Callback):
        ...     def on_evaluation_end(self, record):
        ...         print(record["top1"])
    """

    def on_train_start(self, task: Any, step: int) -> None:
        """Before the first step.

        Args:
            task: The task that is trained.
            step: Steps made before, by the run that is resumed.
        """

    def on_step_end(self, task: Any, step: int, losses: Mapping[str, Tensor]) -> None:
        """After each step of the optimiser.

        Args:
            task: The task that is trained.
            step: Steps made.
            losses: ``loss``, ``loss/TERM`` and the task's metrics. They are on the device: reading one waits for it.
        """

    def on_evaluation_end(self, task: Any, step: int, record: Mapping[str, Any]) -> None:
        """After the evaluation of each split.

        Args:
            task: The task that is trained.
            step: Steps made.
            record: The line of metrics.jsonl.
        """

    def on_train_end(self, task: Any, summary: Summary) -> None:
        """After the last step.

        Args:
            task: The task that is trained.
            summary: What `Trainer.fit` returns.
        """


@dataclass(frozen=True)
class EarlyStopping:
    """Ends a training whose score no longer rises.

    Args:
        patience: Evaluations without a rise after which it ends.
        min_delta: What a score has to gain to count as risen.
    """

    patience: int = 10
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        check_integer("patience", self.patience, least=1)
        check_number("min_delta", self.min_delta, least=0)

    def update(self, position: Position, score: float | None) -> None:
        """Counts an evaluation, and marks the position as stopped where the patience is over."""
        if score is not None and math.isfinite(score) and (position.peak is None or score > position.peak + self.min_delta):
            position.peak, position.stale = score, 0
        else:
            position.stale += 1
        position.stopped = position.stale >= self.patience
