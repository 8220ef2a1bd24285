"""The classification task: two networks, one data set, one distiller and one trainer, put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gkd.data import Digits
from gkd.distill import Distiller
from gkd.engine.checkpoint import seed_everything
from gkd.engine.evaluate import ClassifierEvaluator
from gkd.engine.export import export_onnx, export_program
from gkd.engine.position import Summary
from gkd.engine.run import RunFolder, read_description, save_student
from gkd.engine.task import Task
from gkd.engine.trainer import Trainer
from gkd.errors import UserError
from gkd.models import Teacher, build_classifier


@dataclass(frozen=True)
class Network:
    """How a classifier is built; the number of classes comes from the data.

    Args:
        name: A name that `build_classifier` knows.
        weights: File, or name of published weights, to start from. A teacher needs them.
        options: Further arguments of the network.
        mean: Mean of each channel of the images that a teacher was trained with. None: what its safetensors file says, or else the data's.
        std: Standard deviations, likewise.
        reverse_channels: A teacher that was trained with BGR images.
    """

    name: str
    weights: str | None = None
    options: Mapping[str, Any] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    reverse_channels: bool = False

    def build(self, num_classes: int) -> nn.Module:
        """The network, with its weights."""
        return build_classifier(self.name, num_classes=num_classes, weights=self.weights, **(self.options or {}))

    def build_teacher(self, num_classes: int, student_mean: Sequence[float], student_std: Sequence[float]) -> Teacher:
        """The network as a teacher of a student whose images are normalised by the statistics given.

        Raises:
            UserError: If there are no weights.
        """
        if self.weights is None:
            raise UserError(
                f"Expected weights of the teacher {self.name} (got none). Set teacher/Network.weights to a file; "
                "a training with this network as its student makes one, student.safetensors in its run folder."
            )
        model = self.build(num_classes)
        described = read_description(self.weights) if self.weights.endswith(".safetensors") else {}
        mean, std = (self.mean, self.std) if self.mean or self.std else (described.get("mean"), described.get("std"))
        return Teacher(
            model,
            mean=student_mean if mean is None else mean,
            std=student_std if std is None else std,
            student_mean=student_mean,
            student_std=student_std,
            reverse_channels=self.reverse_channels,
        )


class Classification(Task):
    """Trains, evaluates and exports a classifier, with or without a teacher.

    What follows from the parts is wired here and said nowhere else: classes and image size come from the data, the teacher learns the
    statistics that the images are normalised with, the distiller gets both networks.

    Args:
        student: The network to train.
        teacher: The network to learn from; None trains the student alone, which is how a teacher is made.
        data: Images with classes; the embedded digits by default.
        distiller: Called with the student, the teacher and the image size.
        trainer: The settings of the training.
        batch_size: Images in a step, over all processes.
        eval_batch_size: Images in a step of an evaluation, over all processes.
        seed: Seed of the weights, the order and the augmentation of the images.

    Raises:
        UserError: If the parts do not fit together.

    Examples:
        >>> from gkd.data import RandomImages
        >>> data = RandomImages(num_classes=4, num_train=16, num_test=8)
        >>> task = Classification(Network("resnet8"), data=data, batch_size=8, trainer=Trainer(device="cpu"))
        >>> sorted(task.evaluate())
        ['loss', 'split', 'top1', 'top5']
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | None = None,
        data: Any = None,
        distiller: Callable[..., Distiller] = Distiller,
        trainer: Trainer | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(Digits() if data is None else data, trainer or Trainer(), batch_size, eval_batch_size, seed)
        self.description = student

        seed_everything(seed)
        self.student = student.build(self.data.num_classes)
        self.teacher = None if teacher is None else teacher.build_teacher(self.data.num_classes, self.data.mean, self.data.std)
        self.distiller = distiller(student=self.student, teacher=self.teacher, input_size=self.data.input_size)
        for term in self.distiller.terms.values():
            set_targets: Any = getattr(term, "set_targets", None)  # of a term with a memory of the training samples
            if set_targets is not None:
                set_targets(self.data.targets("train"))
        self._place()
        self._evaluators: dict[str, ClassifierEvaluator] = {}

    @property
    def initial_weights(self) -> str | None:
        """File or name of the weights that the student started from."""
        return self.description.weights

    def _fit(self, folder: RunFolder, resume: bool) -> Summary:
        return self.trainer.fit(
            self.distiller,
            partial(self.data.batches, "train", self._share(self.batch_size), seed=self.seed, **self._sharing),
            steps_per_epoch=self.steps_per_epoch,
            samples_per_step=self.batch_size,
            evaluate=self.evaluator(self.choice_split),
            metrics=self._metrics,
            describe=lambda batch: f"training images {batch[2].tolist()}",
            folder=folder,
            resume=resume,
        )

    def evaluate(self, split: str = "test") -> dict[str, Any]:
        """Record of one evaluation of the student as it is."""
        return dict(self.evaluator(split)())

    def evaluator(self, split: str) -> ClassifierEvaluator:
        """The evaluator of a split; there is one, since it remembers the teacher's answers."""
        if split not in self._evaluators:
            self._evaluators[split] = ClassifierEvaluator(
                self.student,
                partial(self.data.batches, split, self._share(self.eval_batch_size), **self._sharing),
                self.data.num_classes,
                self.trainer.device,
                teacher=self.teacher,
                split=split,
                channels_last=self.trainer.channels_last,
            )
        return self._evaluators[split]

    def export(self, kind: str, folder: RunFolder) -> Path:
        """Writes the student in another format and checks that it computes the same.

        Args:
            kind: ``'onnx'`` or ``'torch'``.
            folder: Where to.
        """
        if self.trainer.fabric.is_global_zero:
            if kind == "onnx":
                export_onnx(self.student, self.data.input_size, folder.onnx)
            elif kind == "torch":
                export_program(self.student, self.data.input_size, folder.program)
            else:
                raise ValueError(f"Expected the export 'onnx' or 'torch' (got {kind!r})")
        return folder.onnx if kind == "onnx" else folder.program

    def _metrics(self, batch: tuple) -> dict[str, Tensor]:
        logits = self.distiller.student_logits
        if logits is None:
            return {}
        return {"top1": 100.0 * (logits.argmax(dim=1) == batch[1]).float().mean()}

    def _finish(self, folder: RunFolder, summary: Summary) -> dict[str, Any]:
        results = {
            "student": self.description.name,
            **self._figures(folder, summary, self.student, self.teacher),
        }
        if self.trainer.fabric.is_global_zero:
            save_student(
                folder.student,
                self.student,
                {
                    "model": self.description.name,
                    "options": dict(self.description.options or {}),
                    "classes": list(self.data.classes),
                    "num_classes": self.data.num_classes,
                    "input_size": list(self.data.input_size),
                    "mean": [float(value) for value in self.data.mean],
                    "std": [float(value) for value in self.data.std],
                },
            )
            folder.write_results(results)
        return results


def load_student(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """Builds the classifier in a student.safetensors, in eval mode, with what the file says of it (classes, mean, std, input_size).

    Raises:
        UserError: If the file does not say what it holds.
    """
    if not Path(path).is_file():
        raise UserError(f"Expected a student.safetensors at {path} (got no such file)")
    description = read_description(path)
    if "model" not in description:
        raise UserError(
            f"Expected a file that gkd wrote at {path} (got weights without a description); use build_classifier(name, weights=...)"
        )
    model = build_classifier(description["model"], num_classes=description["num_classes"], weights=str(path), **description["options"])
    return model.eval(), description
