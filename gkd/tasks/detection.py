"""The detection task: two detectors of one library, one data set, one distiller and one trainer, put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gkd.data import DetectionData, DigitScenes, UnreadableImageError
from gkd.detection import Backend, Detector, DetectorNetwork, Regions, choose_backend, read_detector
from gkd.detection.networks import DetectorPair, TaskLosses
from gkd.distill import Distiller
from gkd.engine import RunFolder, Trainer
from gkd.engine.folder import package_versions
from gkd.errors import UserError
from gkd.models import Teacher, load_weights
from gkd.tasks.made import check_weights
from gkd.tasks.precision import evaluate_detector
from gkd.tasks.predictors import BoxPredictor, Predictor
from gkd.tasks.task import Task

SHOWN = 6  # images of a comparison


class Detection(Task):
    """Trains, evaluates and exports a detector, with or without a teacher; the sibling of `Classification`.

    What follows from the parts is wired here: classes come from the data; images reach both networks as bytes, and each normalises and pads
    them in its own way; the distiller's stages are the levels of the feature pyramids.

    Args:
        student: The network to train.
        teacher: The network to learn from; None trains the student alone, which is how a teacher is made.
        data: Images with boxes; scenes of digits by default.
        backend: ``'torchvision'``, ``'detectron2'``, a `Backend`, or None: Detectron2 where it is installed.
        teacher_backend: The teacher's library, where it is another one.
        distiller: Called with the networks.
        regions: Which regions take part in the terms that look at regions.
        trainer: The settings of the training.
        batch_size: Images in a step, over all processes.
        eval_batch_size: Images in a step of an evaluation, over all processes.
        seed: Seed of the weights, the order and the augmentation of the images.

    Raises:
        UserError: If the parts do not fit together.
    """

    sizes_vary = True

    def __init__(
        self,
        student: DetectorNetwork,
        teacher: DetectorNetwork | None = None,
        data: DetectionData | None = None,
        backend: str | Backend | None = None,
        teacher_backend: str | Backend | None = None,
        distiller: Callable[..., Distiller] = Distiller,
        regions: Regions | None = None,
        trainer: Trainer | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(DigitScenes() if data is None else data, trainer or Trainer(), batch_size, eval_batch_size, seed)
        self.backend, note = choose_backend(backend)
        if note is not None:
            self.trainer.say(note)
        self.initial_weights = student.setting("weights", self.backend.name)
        for network in (student, *([] if teacher is None else [teacher])):
            check_weights(network.setting("weights", self.backend.name), network.recipe)
        self.detector = self.backend.build_student(student, self.data)
        self._check_data()
        described = self.detector.describe()
        self.name = " ".join(str(described[part]) for part in ("architecture", "backbone") if described[part])
        of_teacher = self.backend if teacher_backend is None else choose_backend(teacher_backend)[0]
        self.teacher_detector: Detector | None = None if teacher is None else of_teacher.build_teacher(teacher, self.data)
        self.student = self.detector.model
        self.teacher = None if self.teacher_detector is None else Teacher(self.teacher_detector.model)
        self.distiller = distiller(
            student=self.student,
            teacher=self.teacher,
            input_size=self.data.input_size,
            task=TaskLosses(),
            networks=DetectorPair(self.detector, self.teacher_detector, regions or Regions(), self.data.num_classes),
        )
        self._check_logit_terms()
        self.place()

    @property
    def score(self) -> str:  # type: ignore[override]
        """Number whose highest value makes the best checkpoint."""
        return "AP" if self.data.metric == "coco" else "AP50"

    def batches(self, split: str, batch_size: int, **options: Any) -> Iterator[tuple]:
        """Batches of a split, resized as the library does it; images that cannot be read are the user's to repair."""
        try:
            yield from super().batches(split, batch_size, antialias=self.backend.antialias, **options)
        except UnreadableImageError as error:
            raise UserError(str(error)) from error

    def eval_batches(self, split: str) -> Iterator[tuple]:
        """Batches of a split with images as they are stored: in inference the library itself resizes them."""
        return self.batches(split, self.share(self.eval_batch_size), resized=False)

    def judge(self, network: str, split: str, batches: Callable[[], Iterator[tuple]]) -> dict[str, Any]:
        """Record of an evaluation over the batches given: average precisions in percent."""
        evaluate = self.backend.evaluate or evaluate_detector
        return evaluate(self._detectors[network], self.data, split, batches)

    def predict(self, network: str, images: Any) -> Any:
        """What a detector finds in images."""
        return self._detectors[network].detect(images)

    def evaluate(self, split: str = "test") -> dict[str, Any]:
        """Record of one evaluation of the student as it is: average precisions in percent."""
        return self.judge("student", split, partial(self.eval_batches, split))

    @property
    def _detectors(self) -> dict[str, Any]:
        return {"student": self.detector, "teacher": self.teacher_detector}

    def description_of_student(self) -> dict[str, Any]:
        """How the detector is built and set up for inference, and its classes."""
        return {
            "task": type(self).__name__,
            "backend": self.backend.name,
            "network": self.detector.describe(),
            "classes": list(self.data.classes),
            "category_ids": [int(number) for number in self.data.category_ids],
            "keypoints": list(getattr(self.data, "keypoints", ())),
        }

    def details(self) -> dict[str, Any]:
        """The library, its version, and how many images could not be read."""
        versions = package_versions(("pycocotools", "detectron2"))
        return {"backend": self.backend.name, "unreadable_images": len(self.data.unreadable), "versions": versions}

    def save(self, folder: RunFolder) -> list[Path]:
        """Writes the student in the library's own format too."""
        path = folder.path / self.backend.checkpoint_name
        self.detector.save(path)
        return [path, *super().save(folder)]

    def export(self, kind: str, folder: RunFolder) -> Path:
        """Writes the student in another format and checks that it finds the same boxes."""
        return self.backend.export(self.detector, kind, folder.path)

    @classmethod
    def predictor(cls, path: Path, device: torch.device, trust: bool = False) -> Predictor:
        """See :meth:`Task.predictor`."""
        return BoxPredictor(*read_detector(path, trust=trust), device)

    def sections(self) -> list[str]:
        """Precision of every class, boxes detected beside the true ones, graphs of patches and regions."""
        from gkd.viz import detections

        images, targets, _ = next(iter(self.batches("test", 4)))
        stored, true, _ = next(iter(self.batches("test", 4, resized=False)))
        return [
            detections.class_section(self.evaluate("test")),
            detections.box_section(stored, true, self._detected(stored), self.data.classes),
            detections.graph_section(self.distiller, images, targets),
        ]

    def comparison(self, students: Mapping[str, Path]) -> list[str]:
        """What the teacher and each student detect beside the true boxes."""
        from gkd.viz import detections

        stored, true, _ = next(iter(self.batches("test", SHOWN, resized=False)))
        detected = {name: boxes for name, boxes in self._detected(stored).items() if name == "teacher"}
        for name, path in students.items():
            load_weights(self.student, path)
            detected[name] = self.detector.detect(stored)
        return [detections.box_section(stored, true, detected, self.data.classes)]

    def _detected(self, images: Any) -> dict[str, Any]:
        """What each network finds; a teacher of other classes is left out."""
        detectors = {"student": self.detector, "teacher": self.teacher_detector}
        return {
            name: detector.detect(images) for name, detector in detectors.items() if detector is not None and detector.labels is not None
        }

    def _check_data(self) -> None:
        """What a network learns beside boxes must be in the data."""
        sample = self.data.samples("train")[0]
        wanted = {"masks": ("segmentations", self.detector.has_masks), "keypoints": ("keypoints", self.detector.num_keypoints)}
        for what, (attribute, is_wanted) in wanted.items():
            if is_wanted and getattr(sample, attribute, None) is None:
                raise UserError(
                    f"Expected {what} in the data for {type(self.detector.model).__name__}, which learns them (got boxes alone). "
                    f"Read them, with COCO.{what} = True, say, or choose a network without."
                )
        if self.detector.num_keypoints not in (0, len(getattr(self.data, "keypoints", ()))):
            raise UserError(
                f"Expected data of {self.detector.num_keypoints} keypoints, as the network finds (got {len(self.data.keypoints)})"
            )

    def _check_logit_terms(self) -> None:
        """A term of logits must suit the stages of the networks whose heads it asks: both, or the teacher's where heads are crossed."""
        if self.teacher_detector is None:
            return
        for module, term in self.distiller.declared_terms():
            asked = {self.teacher_detector.two_stage} | ({self.detector.two_stage} if term.compares != "crossed" else set())
            if term.level == "logits" and asked != {not term.dense}:
                kinds = " and ".join("two stages" if two else "one stage" for two in sorted(asked))
                raise UserError(
                    "Expected DenseKDLoss for the class logits of one-stage detectors, and another term, such as KDLoss, for two stages "
                    f"(got {type(module).__name__} for {kinds}). Set KD = @DenseKDLoss() or KD = @KDLoss(), give the term the weight 0, or "
                    "compare unlike detectors by CrossKDLoss, maps and graphs."
                )
