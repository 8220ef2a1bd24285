"""The classification task: two networks, one data set, one distiller and one trainer, put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gkd.data import Digits, Mix
from gkd.distill import Distiller
from gkd.engine import RunFolder, Trainer
from gkd.engine.folder import read_description
from gkd.errors import UserError
from gkd.models import class_order
from gkd.tasks.accuracy import ClassifierEvaluator
from gkd.tasks.ensemble import TeacherEnsemble
from gkd.tasks.export import export_onnx, export_program
from gkd.tasks.network import Network, load_student
from gkd.tasks.predictors import ClassPredictor, Predictor
from gkd.tasks.task import Task

MOST_CONFUSED = 50_000  # images that the confusion matrix is counted from, about


class Classification(Task):
    """Trains, evaluates and exports a classifier, with or without a teacher.

    What follows from the parts is wired here and said nowhere else: classes and image size come from the data, the teacher learns the
    statistics that the images are normalised with, the distiller gets both networks.

    Args:
        student: The network to train.
        teacher: The network to learn from, or several; None trains the student alone, which is how a teacher is made.
        data: Images with classes; the embedded digits by default.
        distiller: Called with the student, the teacher and the image size.
        trainer: The settings of the training.
        batch_size: Images in a step, over all processes.
        eval_batch_size: Images in a step of an evaluation, over all processes.
        seed: Seed of the weights, the order and the augmentation of the images.
        mix: Mixes the training images of a batch, and their classes. None: no mixing.

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
        teacher: Network | TeacherEnsemble | None = None,
        data: Any = None,
        distiller: Callable[..., Distiller] = Distiller,
        trainer: Trainer | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        seed: int = 0,
        mix: Mix | None = None,
    ) -> None:
        super().__init__(Digits() if data is None else data, trainer or Trainer(), batch_size, eval_batch_size, seed)
        self.network, self.name, self.initial_weights, self.mix = student, student.name, student.weights, mix
        for network in (student, *([] if teacher is None else [teacher])):
            network.check_weights()
        built = student.build(self.data)
        self.student, self._new_layers = built.model, built.new_layers
        self.teacher, difference = (None, "") if teacher is None else teacher.build_teacher(self.data)
        self.distiller = distiller(student=self.student, teacher=self.teacher, input_size=self.data.input_size)
        comparing = [name for name, term in self.distiller.terms.items() if getattr(term, "level", None) == "logits"]
        if difference and comparing:
            raise UserError(
                f"Expected a teacher for the classes of the data, whose logits {', '.join(comparing)} can compare (got: {difference}). "
                "Take one that was trained on them, name its classes in teacher/Network.classes, or compare features alone."
            )
        self._judge = None if difference else self.teacher  # with whose answers the student's are compared
        if self.distiller.remembers_samples:
            self.distiller.set_targets(self.data.targets("train"))
        self.place()
        self._evaluators: dict[str, ClassifierEvaluator] = {}

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple]:
        """This process's training batches of an epoch from step `start` on, mixed if asked."""
        batches = super().train_batches(epoch, start)
        return batches if self.mix is None else self.mix.batches(batches, self.data.num_classes, seed=self.seed, epoch=epoch, start=start)

    @property
    def chance(self) -> float:  # type: ignore[override]
        """Two standard deviations above the share that is right by chance, in percent."""
        share = 1.0 / self.data.num_classes
        return 100.0 * (share + 2.0 * math.sqrt(share * (1.0 - share) / self.data.num_samples("test")))

    def judge(self, network: str, split: str, batches: Callable[[], Iterator[tuple]]) -> dict[str, Any] | None:
        """Record of an evaluation over the batches given; None for a teacher of other classes."""
        judged = self.student if network == "student" else self._judge
        if judged is None:
            return None
        evaluator = ClassifierEvaluator(
            judged, batches, self.data.num_classes, self.trainer.device, split=split, channels_last=self.trainer.channels_last
        )
        return dict(evaluator())

    def evaluate(self, split: str = "test") -> dict[str, Any]:
        """Record of one evaluation of the student as it is."""
        if split not in self._evaluators:  # one for each split, since it remembers the teacher's answers
            self._evaluators[split] = ClassifierEvaluator(
                self.student,
                partial(self.eval_batches, split),
                self.data.num_classes,
                self.trainer.device,
                teacher=self._judge,
                split=split,
                channels_last=self.trainer.channels_last,
            )
        return dict(self._evaluators[split]())

    def load(self, folder: RunFolder) -> Path | str:
        """See :meth:`Task.load`; a student for other classes, or for none yet, is refused."""
        if folder.last.is_file():
            if folder.student.is_file():
                classes = read_description(folder.student).get("classes", self.data.classes)
                if class_order(classes, self.data.classes, f"the run {folder.path}") is not None:
                    trained, current = (", ".join(names[:3]) for names in (classes, self.data.classes))
                    raise UserError(
                        f"Expected the classes of the data in the order that {folder.path} was trained with, {trained}, ... "
                        f"(got {current}, ...). Evaluate {folder.student} instead: set student/Network.weights to it."
                    )
        elif self._new_layers:
            raise UserError(
                f"Expected weights for the {self.data.num_classes} classes of the data (got {self.initial_weights}, for others: "
                f"{', '.join(self._new_layers)} would be random numbers). Train first."
            )
        return super().load(folder)

    def metrics(self, batch: tuple) -> Mapping[str, Tensor]:
        """Share of the batch that the student names right, in percent."""
        logits = self.distiller.student_logits
        targets = batch[1] if batch[1].dim() == 1 else batch[1].argmax(dim=1)
        return {} if logits is None else {"top1": 100.0 * (logits.argmax(dim=1) == targets).float().mean()}

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

    @classmethod
    def predictor(cls, path: Path, device: torch.device, trust: bool = False) -> Predictor:
        """See :meth:`Task.predictor`."""
        return ClassPredictor(*load_student(path, trust=trust), device)

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
