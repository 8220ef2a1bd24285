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
from gkd.engine import RunFolder, Trainer
from gkd.engine.folder import read_description
from gkd.errors import UserError
from gkd.models import Teacher, build_classifier
from gkd.tasks.accuracy import ClassifierEvaluator
from gkd.tasks.export import export_onnx, export_program
from gkd.tasks.task import Task

MOST_CONFUSED = 50_000  # images that the confusion matrix is counted from, about


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

    score = "top1"

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
        self.network, self.name, self.initial_weights = student, student.name, student.weights
        self.student = student.build(self.data.num_classes)
        self.teacher = None if teacher is None else teacher.build_teacher(self.data.num_classes, self.data.mean, self.data.std)
        self.distiller = distiller(student=self.student, teacher=self.teacher, input_size=self.data.input_size)
        if self.distiller.remembers_samples:
            self.distiller.set_targets(self.data.targets("train"))
        self.place()
        self._evaluators: dict[str, ClassifierEvaluator] = {}

    def evaluate(self, split: str = "test") -> dict[str, Any]:
        """Record of one evaluation of the student as it is."""
        if split not in self._evaluators:  # one for each split, since it remembers the teacher's answers
            self._evaluators[split] = ClassifierEvaluator(
                self.student,
                partial(self.eval_batches, split),
                self.data.num_classes,
                self.trainer.device,
                teacher=self.teacher,
                split=split,
                channels_last=self.trainer.channels_last,
            )
        return dict(self._evaluators[split]())

    def metrics(self, batch: tuple) -> Mapping[str, Tensor]:
        """Share of the batch that the student names right, in percent."""
        logits = self.distiller.student_logits
        return {} if logits is None else {"top1": 100.0 * (logits.argmax(dim=1) == batch[1]).float().mean()}

    def description_of_student(self) -> dict[str, Any]:
        """Name and options of the network, classes, size and statistics of the images."""
        return {
            "task": type(self).__name__,
            "model": self.network.name,
            "options": dict(self.network.options or {}),
            "classes": list(self.data.classes),
            "num_classes": self.data.num_classes,
            "input_size": list(self.data.input_size),
            "mean": [float(value) for value in self.data.mean],
            "std": [float(value) for value in self.data.std],
        }

    def sections(self) -> list[str]:
        """Graphs and attention on test images, and what is taken for what."""
        from gkd.viz import collect_views, count_confusion, sections

        device = self.trainer.device
        batch = next(iter(self.data.batches("test", 32, device=device)))
        views = collect_views(self.distiller, batch, self.data.mean, self.data.std, self.data.classes)
        confusion = count_confusion(
            self.student, self.eval_batches("test"), self.data.num_classes, -(-MOST_CONFUSED // self.eval_batch_size)
        )
        return [sections.graphs(views), sections.attention(views), sections.confusion(confusion, self.data.classes)]

    def export(self, kind: str, folder: RunFolder) -> Path:
        """Writes the student in another format and checks that it computes the same.

        Args:
            kind: ``'onnx'`` or ``'torch'``.
            folder: Where to.
        """
        writers = {"onnx": (export_onnx, folder.onnx), "torch": (export_program, folder.program)}
        if kind not in writers:
            raise UserError(f"Expected the export 'onnx' or 'torch' (got {kind!r})")
        write, path = writers[kind]
        write(self.student, self.data.input_size, path)
        return path


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
