"""What every task does around its training: the run folder, the checkpoint that is looked at, the figures of the results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import nn

from gkd.distill import Distiller
from gkd.engine.checkpoint import load_checkpoint, seed_everything
from gkd.engine.position import Summary
from gkd.engine.run import RunFolder, count_parameters, describe_machine, peak_memory
from gkd.engine.trainer import Trainer
from gkd.errors import UserError


class Task(ABC):
    """A student, its data and its training, put together; a subclass builds the networks and says how they are trained and evaluated.

    Args:
        data: The data set.
        trainer: The settings of the training.
        batch_size: Samples in a step, over all processes.
        eval_batch_size: Samples in a step of an evaluation, over all processes.
        seed: Seed of the run.

    Attributes:
        description: How the student is built; the subclass sets it and what follows.
        distiller: The module that is trained.
        steps_per_epoch: Batches in an epoch.

    Raises:
        UserError: If the batches do not fit the processes or the data.
    """

    description: Any
    distiller: Distiller

    def __init__(self, data: Any, trainer: Trainer, batch_size: int, eval_batch_size: int, seed: int) -> None:
        self.data, self.trainer, self.seed = data, trainer, seed
        fabric = trainer.fabric
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size < 1 or size % fabric.world_size:
                raise UserError(f"Expected {name} to be a multiple of the {fabric.world_size} processes (got {size})")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self._sharing: dict[str, Any] = {"rank": fabric.global_rank, "world_size": fabric.world_size, "device": fabric.device}
        # Found now, where it is a mistake in the configuration, and not after an hour.
        self.steps_per_epoch = data.num_batches("train", self._share(batch_size), world_size=fabric.world_size)
        if self.steps_per_epoch < 1:
            raise UserError(f"Expected at least one batch of {batch_size} training images (got {data.num_samples('train')} images)")

    @abstractmethod
    def evaluate(self, split: str = "test") -> dict[str, Any]:
        """Record of one evaluation of the student as it is."""

    @abstractmethod
    def _fit(self, folder: RunFolder, resume: bool) -> Summary:
        """Trains to the end, or to `max_steps`."""

    @abstractmethod
    def _finish(self, folder: RunFolder, summary: Summary) -> dict[str, Any]:
        """Writes the student and the results of a training that has ended, and returns the results."""

    @property
    @abstractmethod
    def initial_weights(self) -> str | None:
        """File or name of the weights that the student started from."""

    def train(self, folder: RunFolder, config: str = "", resume: bool = False) -> dict[str, Any] | None:
        """Trains and fills the run folder.

        Args:
            folder: A folder that was prepared.
            config: Operative configuration, to be kept with the run.
            resume: Go on from the last checkpoint.

        Returns:
            The results, or None where `max_steps` ended the training before its end.
        """
        fabric = self.trainer.fabric
        if fabric.is_global_zero:
            changed = folder.changed_bindings(config) if resume else []
            if changed:
                fabric.print("Resuming with other bindings than the run had: " + "; ".join(changed))
            folder.write_config(config)
        summary = self._fit(folder, resume)
        if summary.finished:
            return self._finish(folder, summary)
        fabric.print(f"Stopped after step {summary.step} as Trainer.max_steps asks. Go on with --resume and a larger Trainer.max_steps.")
        return None

    def load(self, folder: RunFolder) -> Path | str:
        """Takes the student of the folder's last checkpoint, or leaves it with the weights that it started from; returns which.

        Raises:
            UserError: If there is neither a checkpoint nor a file of weights: nothing to evaluate but random numbers.
        """
        if folder.last.is_file():
            self._load_checkpoint(folder.last)
            return folder.last
        if self.initial_weights is None:
            raise UserError(
                f"Expected a checkpoint in {folder.last.parent}, or weights of the student (got neither). "
                f"Train first, check --output, or set student/{type(self.description).__name__}.weights."
            )
        return self.initial_weights

    def outputs(self, folder: RunFolder) -> list[Path]:
        """What a user takes from the folder after the training."""
        return [folder.student, folder.results]

    def _place(self) -> None:
        """Takes the distiller, built from the same seed in all processes, to the device; what is drawn from here on is each one's own."""
        fabric = self.trainer.fabric
        self.distiller.to(fabric.device)
        if fabric.world_size > 1:
            seed_everything(self.seed + fabric.global_rank)

    def _share(self, batch_size: int) -> int:
        """This process's part of a batch."""
        return batch_size // self.trainer.fabric.world_size

    @property
    def choice_split(self) -> str:
        """Split that is looked at while training: the held-out images where there are any, else the test images."""
        return "val" if self.data.num_samples("val") > 0 else "test"

    def _load_checkpoint(self, path: Path) -> None:
        try:
            self.distiller.load_state_dict(load_checkpoint(path)["model"])
        except RuntimeError as error:
            raise UserError(
                f"Expected the networks of the configuration in {path} (got others: {error}). Check --gin and --output."
            ) from error

    def _figures(self, folder: RunFolder, summary: Summary, student: nn.Module, teacher: nn.Module | None) -> dict[str, Any]:
        """What the results of every task hold; the test images are looked at once where others were held out for choices."""
        final, best = summary.last, summary.best
        memory = peak_memory(self.trainer.device)
        if self.choice_split != "test":
            final = {**(summary.last or {}), **self.evaluate("test")}
            if best is not None:
                latest = {name: tensor.clone() for name, tensor in self.distiller.state_dict().items()}
                self._load_checkpoint(folder.best)
                best = {**best, **self.evaluate("test")}
                self.distiller.load_state_dict(latest)
        return {
            "seed": self.seed,
            "final": final,
            "best": best,
            "chosen_on": self.choice_split,
            "steps": summary.step,
            "epochs": summary.step / self.steps_per_epoch,
            "seconds": summary.seconds,
            "images_per_second": summary.images_per_second,
            "peak_memory": memory,
            "processes": self.trainer.fabric.world_size,
            "parameters": {
                "student": count_parameters(student),
                "teacher": 0 if teacher is None else count_parameters(teacher),
                "distillation": count_parameters(self.distiller) - count_parameters(student),
            },
            **describe_machine(self.trainer.device),
        }
