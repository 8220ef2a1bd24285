"""What a task is: a student, its data and its losses put together; how it is judged; and what its results and its report hold."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gkd.arguments import describe_value
from gkd.distill import Distiller
from gkd.engine import RunFolder, Summary, Trainer
from gkd.engine.average import load_average
from gkd.engine.checkpoint import load_checkpoint, seed_everything
from gkd.engine.folder import count_parameters, describe_machine, peak_memory, save_student
from gkd.errors import UserError
from gkd.tasks.cost import measure_cost
from gkd.tasks.dry_pass import dry_pass
from gkd.tasks.predictors import Predictor


class Task(ABC):
    """A student, its data and its training, put together; what all tasks have in common.

    A subclass takes the parts of its networks as keyword arguments, calls this constructor first, builds the networks, sets the attributes
    below and calls :meth:`place`. It says how the student is judged (:meth:`evaluate`, `score`), what its file says of it
    (:meth:`description_of_student`) and what its report shows (:meth:`sections`). Nothing else of gkd has to know of it; list it in
    ``__all__`` of `gkd.tasks`.

    Args:
        data: The data set. ``data.batches(split, batch_size, epoch=, start=, seed=, rank=, world_size=, device=)`` gives the batches,
            ``num_batches`` and ``num_samples`` count them.
        trainer: The settings of the training.
        batch_size: Samples in a step, over all processes.
        eval_batch_size: Samples in a step of an evaluation, over all processes.
        seed: Seed of the run.

    Attributes:
        student: The network that is trained and exported.
        teacher: The network to learn from, or None.
        distiller: From a batch to named losses: what the trainer trains.
        name: The student in words, for results and report.
        initial_weights: File or name of the weights that the student started from.
        score: Number of an evaluation whose highest value makes the best checkpoint.
        chance: Score that guessing reaches: a teacher has to be better.
        sizes_vary: Whether batches differ in the size of their images.
        steps_per_epoch: Batches in an epoch.

    Raises:
        UserError: If the batches do not fit the processes or the data.
    """

    student: nn.Module
    teacher: nn.Module | None
    distiller: Distiller
    name: str
    initial_weights: str | None
    score: str
    chance: float = 0.0
    sizes_vary: bool = False

    def __init__(self, data: Any, trainer: Trainer, batch_size: int, eval_batch_size: int, seed: int) -> None:
        self.data, self.trainer, self.seed = data, trainer, seed
        fabric = trainer.fabric
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size < 1 or size % fabric.world_size:
                raise UserError(f"Expected {name} to be a multiple of the {fabric.world_size} processes (got {size})")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.sharing: dict[str, Any] = {"rank": fabric.global_rank, "world_size": fabric.world_size, "device": fabric.device}
        absent = [name for name in ("batches", "num_batches", "num_samples") if not hasattr(data, name)]
        if absent:
            raise UserError(f"Expected data with {', '.join(absent)}, as the data sets of gkd.data (got {describe_value(data)})")
        # Checked now, where it is a mistake in the configuration, and not after an hour.
        self.steps_per_epoch = data.num_batches("train", self.share(batch_size), world_size=fabric.world_size)
        if self.steps_per_epoch < 1:
            raise UserError(f"Expected at least one batch of {batch_size} training images (got {data.num_samples('train')} images)")
        self._teacher_record: dict[str, Any] | None = None
        seed_everything(seed)  # what the subclass draws for its networks

    # ---------------------------------------------------------------- what a subclass says

    @abstractmethod
    def evaluate(self, split: str = "test") -> dict[str, Any]:
        """Record of one evaluation of the student as it is: ``split`` and named numbers."""

    @abstractmethod
    def description_of_student(self) -> dict[str, Any]:
        """What student.safetensors says of the student, so that it can be built and used again."""

    def judge(self, network: str, split: str, batches: Callable[[], Iterator[tuple]]) -> dict[str, Any] | None:
        """Record of an evaluation over the batches given; None where the task cannot judge this network.

        Args:
            network: ``'student'`` or ``'teacher'``.
            split: Name of the split, for the record.
            batches: Gives this process's batches.
        """
        return None

    def predict(self, network: str, images: Any) -> Any:
        """What the ``'student'`` or the ``'teacher'`` says of images, as it is used after the training."""
        return getattr(self, network)(images)

    def metrics(self, batch: tuple) -> Mapping[str, Tensor]:
        """Scalars of the batch just seen, to be logged beside the losses."""
        return {}

    def details(self) -> dict[str, Any]:
        """What results.json holds beside what every task has."""
        return {}

    def sections(self) -> list[str]:
        """What the report of this task shows beside what every report has: sections of HTML, made with `gkd.viz`."""
        return []

    def comparison(self, students: Mapping[str, Path]) -> list[str]:
        """Sections that show several students side by side on test images, from their student.safetensors by name."""
        return []

    def save(self, folder: RunFolder) -> list[Path]:
        """Writes the student and returns the files, in the order of their worth to a user."""
        save_student(folder.student, self.student, self.description_of_student())
        return [folder.student]

    @classmethod
    def predictor(cls, path: Path, device: torch.device, trust: bool = False) -> Predictor:
        """What `gkd predict` does with a student of this task.

        Args:
            path: The student's safetensors file.
            device: Where it computes.
            trust: Whether the file may name a network of one's own.
        """
        raise UserError(f"Expected a task whose student predicts (got {cls.__name__})")

    def export(self, kind: str, folder: RunFolder) -> Path:
        """Writes the student in another format, ``'onnx'`` or ``'torch'``, and checks that it computes the same."""
        raise UserError(f"Expected a task whose student can be exported (got --export {kind} for {type(self).__name__})")

    # ---------------------------------------------------------------- what the trainer asks

    @property
    def splits(self) -> Sequence[str]:
        """What is evaluated while training: the held-out images where there are any, else the test images, which choose; then the further
        sets that the data name."""
        first = "val" if self.data.num_samples("val") > 0 else "test"
        return (first, *getattr(self.data, "evaluation_sets", ()))

    def batches(self, split: str, batch_size: int, **options: Any) -> Iterator[tuple]:
        """This process's batches of a split; `batch_size` counts the samples of one process."""
        return self.data.batches(split, batch_size, **self.sharing, **options)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple]:
        """This process's training batches of an epoch from step `start` on."""
        return self.batches("train", self.share(self.batch_size), epoch=epoch, start=start, seed=self.seed)

    def eval_batches(self, split: str) -> Iterator[tuple]:
        """This process's batches of a split, for an evaluation."""
        return self.batches(split, self.share(self.eval_batch_size))

    def describe(self, batch: tuple) -> str:
        """Names the samples of a training batch."""
        return f"training images {batch[2].tolist()}"

    # ---------------------------------------------------------------- a run

    def place(self) -> None:
        """Takes the distiller, built from the same seed in all processes, to the device; what is drawn from here on is each one's own."""
        fabric = self.trainer.fabric
        self.distiller.to(fabric.device)
        if fabric.world_size > 1:
            seed_everything(self.seed + fabric.global_rank)

    def share(self, batch_size: int) -> int:
        """This process's part of a batch."""
        return batch_size // self.trainer.fabric.world_size

    def train(self, folder: RunFolder, config: str = "", resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
        """Trains and fills the run folder.

        Args:
            folder: A folder that was prepared.
            config: Operative configuration, to be kept with the run.
            resume: Go on from the last checkpoint.
            overwrite: Remove what an earlier training wrote, once nothing is known to stop this one.

        Returns:
            The results, or None where `max_steps` ended the training before its end.
        """
        is_first = self.trainer.fabric.is_global_zero
        if is_first:
            changed = folder.changed_bindings(config) if resume else []
            if changed:
                self.trainer.say("Resuming with other bindings than the run had: " + "; ".join(changed))
        if self.trainer.dry_pass:
            dry_pass(self)
        if overwrite and is_first:
            folder.clear()
        summary = self.trainer.fit(self, folder, resume, config)
        if not summary.finished:
            self.trainer.say(
                f"Stopped after step {summary.step} as Trainer.max_steps asks. Go on with --resume and a larger Trainer.max_steps."
            )
            return None
        paths = self.save(folder) if is_first else []  # first: nothing that fails from here on can take the student away
        results = self.results(folder, summary)
        if is_first:
            folder.write_results(results)
            self.trainer.say(f"Wrote {', '.join(map(str, paths))} and {folder.results}")
        return results

    def teacher_record(self) -> dict[str, Any] | None:
        """Record of the teacher on the test images, evaluated once; None without a teacher that can be judged."""
        if self._teacher_record is None and self.teacher is not None:
            self._teacher_record = self.judge("teacher", "test", partial(self.eval_batches, "test"))
        return self._teacher_record

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
                f"Train first, check --output, or set the weights of {type(self).__name__}.student."
            )
        return self.initial_weights

    def results(self, folder: RunFolder, summary: Summary) -> dict[str, Any]:
        """What results.json holds; the test images are looked at once where others were held out for choices."""
        final, best = summary.last, summary.best
        held_out = {"val": {"final": final, "best": best}} if self.splits[0] == "val" else {}
        memory = peak_memory(self.trainer.device)
        further = {split: self.evaluate(split) for split in self.splits[1:]}
        if self.splits[0] != "test":
            final = {**(summary.last or {}), **self.evaluate("test")}
            if best is not None:
                latest = {name: tensor.clone() for name, tensor in self.distiller.state_dict().items()}
                try:
                    self._load_checkpoint(folder.best)
                    best = {**best, **self.evaluate("test")}
                except UserError as error:
                    best = None
                    warnings.warn(f"Left the best epoch out of the results: {error}", stacklevel=2)
                self.distiller.load_state_dict(latest)
        machine = describe_machine(self.trainer.device)
        details = self.details()
        machine["versions"].update(details.pop("versions", {}))
        return {
            "task": type(self).__name__,
            "student": self.name,
            **details,
            "score": self.score,
            "seed": self.seed,
            "final": final,
            "best": best,
            **held_out,
            **({"further": further} if further else {}),
            "chosen_on": self.splits[0],
            "teacher": self.teacher_record(),
            "steps": summary.step,
            "epochs": summary.step / self.steps_per_epoch,
            "seconds": summary.seconds,
            "images_per_second": summary.images_per_second,
            "peak_memory": memory,
            "processes": self.trainer.fabric.world_size,
            "parameters": {
                "student": count_parameters(self.student),
                "teacher": 0 if self.teacher is None else count_parameters(self.teacher),
                "distillation": count_parameters(self.distiller) - count_parameters(self.student),
            },
            "cost": self._cost(),
            **machine,
        }

    def _cost(self) -> dict[str, Any]:
        images = next(iter(self.eval_batches("test")))[0][:1]
        networks = {"student": self.student, "teacher": self.teacher}
        return {
            name: measure_cost(network, partial(self.predict, name), images) for name, network in networks.items() if network is not None
        }

    def _load_checkpoint(self, path: Path) -> None:
        try:
            state = load_checkpoint(path)
            self.distiller.load_state_dict(state["model"])
            if state.get("average") is not None:
                load_average(self.student, state["average"])
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"Expected the networks of the configuration in {path} (got others: {error}). Check --gin and --output."
            ) from error
