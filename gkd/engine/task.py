"""What every task does around its training: the run folder, the checkpoint that is looked at, the figures of the results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import nn

from gkd.distill import Distiller
from gkd.engine.checkpoint import load_checkpoint
from gkd.engine.position import Summary
from gkd.engine.run import RunFolder, count_parameters, describe_machine, peak_memory
from gkd.engine.trainer import Trainer
from gkd.errors import UserError


class Task(ABC):
    """A student, its data and its training, put together. The attributes are the subclass's to set.

    Attributes:
        trainer: The settings of the training.
        distiller: The module that is trained.
        data: Tells how many samples a split has.
        seed: Seed of the run.
        steps_per_epoch: Batches in an epoch.
    """

    trainer: Trainer
    distiller: Distiller
    data: Any
    seed: int
    steps_per_epoch: int

    @abstractmethod
    def evaluate(self, split: str = "test") -> dict[str, Any]:
        """Record of one evaluation of the student as it is."""

    @property
    def choice_split(self) -> str:
        """Split that is looked at while training: the held-out images where there are any, else the test images."""
        return "val" if self.data.num_samples("val") > 0 else "test"

    def _begin(self, folder: RunFolder, config: str, resume: bool) -> None:
        """Writes the configuration, and says what of it a resumed run had otherwise."""
        fabric = self.trainer.fabric
        if fabric.is_global_zero:
            changed = folder.changed_bindings(config) if resume else []
            if changed:
                fabric.print("Resuming with other bindings than the run had: " + "; ".join(changed))
            folder.write_config(config)

    def _ended(self, summary: Summary) -> bool:
        """Whether the training reached its end; says how to go on where it did not."""
        if not summary.finished:
            self.trainer.fabric.print(
                f"Stopped after step {summary.step} as Trainer.max_steps asks. Go on with --resume and a larger Trainer.max_steps."
            )
        return summary.finished

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
