"""What the trainer asks of a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Trainable(Protocol):
    """What `Trainer.fit` trains. `gkd.tasks.Task` is the base of the tasks that gkd brings.

    Attributes:
        distiller: ``distiller(*batch)`` gives a dictionary of scalar losses, whose sum is minimised. Where it has a method
            ``progress(epoch)``, that is called before each step.
        student: The network inside the distiller that is evaluated and exported, and averaged where that is asked for.
        steps_per_epoch: Batches in an epoch.
        batch_size: Samples in a step over all processes.
        splits: What is evaluated while training, the split that chooses the best checkpoint first; nothing where it is empty.
        score: Number of an evaluation record whose highest value makes the best checkpoint.

    An attribute ``sizes_vary``, where there is one, says whether batches differ in the size of their images.
    """

    @property
    def distiller(self) -> nn.Module: ...  # noqa: D102

    @property
    def student(self) -> nn.Module: ...  # noqa: D102

    @property
    def steps_per_epoch(self) -> int: ...  # noqa: D102

    @property
    def batch_size(self) -> int: ...  # noqa: D102

    @property
    def splits(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def score(self) -> str: ...  # noqa: D102

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple]:
        """This process's batches of an epoch from step `start` on, the same whenever it is called."""

    def evaluate(self, split: str) -> Mapping[str, Any]:
        """Record of one evaluation: its split and named numbers. Called on every process."""

    def metrics(self, batch: tuple) -> Mapping[str, Tensor]:
        """Scalars of the batch just seen, on the device, to be logged beside the losses."""

    def describe(self, batch: tuple) -> str:
        """Names the samples of a batch, for the message about a loss that is not finite."""
