"""The trainer: what is trained, on what, and how it is judged are passed to `fit`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from gkd.engine.loop import Loop
from gkd.engine.position import Summary
from gkd.engine.run import RunFolder
from gkd.engine.settings import Settings


class Trainer(Settings):
    """Trains any module that turns a batch into a dictionary of losses, on the CPU, a GPU, or several of either by `torchrun`.

    The sum of the losses is minimised. Batches, evaluation and metrics are arguments of `fit`, so that classifiers and detectors are
    trained by the same code. No step waits for the device: sums stay there and are read every `log_every` steps. The arguments are those
    of `Settings`.
    """

    def fit(
        self,
        model: nn.Module,
        batches: Callable[..., Iterator[tuple]],
        *,
        steps_per_epoch: int,
        samples_per_step: int,
        evaluate: Callable[[], Mapping[str, Any]] | None = None,
        metrics: Callable[[tuple], Mapping[str, Tensor]] | None = None,
        describe: Callable[[tuple], str] | None = None,
        score: str = "top1",
        folder: RunFolder | None = None,
        resume: bool = False,
    ) -> Summary:
        """Trains to the end, or to `max_steps`.

        Args:
            model: ``model(*batch)`` gives a dictionary of scalar losses. Where it has a method ``progress(epoch)``, that is called before
                each step.
            batches: ``batches(epoch=.., start=..)`` iterates over this process's batches of an epoch from step `start` on, the same
                whenever it is called.
            steps_per_epoch: Batches in an epoch.
            samples_per_step: Samples in a step over all processes, for the throughput.
            evaluate: Gives the record of an evaluation; called on every process.
            metrics: Scalars of the batch just seen, on the device, to be logged beside the losses.
            describe: Names the samples of a batch, for the message about a loss that is not finite.
            score: Number of the evaluation record whose highest value makes the best checkpoint.
            folder: Where records and checkpoints go; None keeps nothing.
            resume: Go on from the folder's last checkpoint; from the start where it holds none.

        Raises:
            NonFiniteLossError: If a loss is NaN or infinite.
            Interrupted: If SIGINT or SIGTERM asked to stop; the checkpoint is written.
            UserError: If the checkpoint does not fit.
        """
        loop = Loop(
            self,
            model,
            batches,
            steps_per_epoch=steps_per_epoch,
            samples_per_step=samples_per_step,
            evaluate=evaluate,
            metrics=metrics,
            describe=describe,
            score=score,
            folder=folder,
        )
        if resume:
            loop.restore()
        return loop.run()
