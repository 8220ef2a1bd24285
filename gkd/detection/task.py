"""The detection task: two detectors of one library, one data set, one distiller and one trainer, put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gkd.data import DetectionData, DigitScenes, UnreadableImageError
from gkd.detection.backend import Backend, Job, choose_backend
from gkd.detection.distiller import DetectionNetworks, TaskLosses
from gkd.detection.interface import Detector, DetectorNetwork
from gkd.detection.regions import Regions
from gkd.distill import Distiller
from gkd.engine import RunFolder, Summary, Trainer
from gkd.engine.checkpoint import seed_everything
from gkd.engine.run import package_versions, save_student
from gkd.engine.task import Task
from gkd.errors import UserError
from gkd.models import Teacher


class Detection(Task):
    """Trains, evaluates and exports a detector, with or without a teacher; the sibling of `gkd.engine.Classification`.

    What follows from the parts is wired here: classes come from the data; images reach both networks as bytes, and each normalises and pads
    them in its own way; the distiller's stages are the levels of the feature pyramids.

    Args:
        student: The network to train.
        teacher: The network to learn from; None trains the student alone, which is how a teacher is made.
        data: Images with boxes; scenes of digits by default.
        backend: ``'torchvision'``, ``'detectron2'``, a `Backend`, or None: Detectron2 where it is installed.
        distiller: Called with the networks.
        regions: Which regions take part in the terms that look at regions.
        trainer: The settings of the training.
        batch_size: Images in a step, over all processes.
        eval_batch_size: Images in a step of an evaluation, over all processes.
        seed: Seed of the weights, the order and the augmentation of the images.

    Raises:
        UserError: If the parts do not fit together.
    """

    def __init__(
        self,
        student: DetectorNetwork,
        teacher: DetectorNetwork | None = None,
        data: DetectionData | None = None,
        backend: str | Backend | None = None,
        distiller: Callable[..., Distiller] = Distiller,
        regions: Regions | None = None,
        trainer: Trainer | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(DigitScenes() if data is None else data, trainer or Trainer(), batch_size, eval_batch_size, seed)
        self.description = student
        self.backend, note = choose_backend(backend)
        if note is not None:
            self.trainer.fabric.print(note)

        seed_everything(seed)
        self.detector = self.backend.build_student(student, self.data)
        self.teacher: Detector | None = None if teacher is None else self.backend.build_teacher(teacher, self.data)
        self.distiller = distiller(
            student=self.detector.model,
            teacher=None if self.teacher is None else Teacher(self.teacher.model),
            input_size=self.data.input_size,
            task=TaskLosses(),
            networks=DetectionNetworks(self.detector, self.teacher, regions or Regions(), self.data.num_classes),
        )
        stages = {detector.two_stage for detector in (self.detector, self.teacher) if detector is not None}
        for term in self.distiller.terms.values():
            if getattr(term, "level", None) == "logits" and stages != {not getattr(term, "dense", False)}:
                found = " and ".join("two stages" if two else "one stage" for two in sorted(stages))
                raise UserError(
                    "Expected DenseKDLoss for the class logits of one-stage detectors, and another term, such as KDLoss, for two stages "
                    f"(got {type(term).__name__} for {found}). Set KD = @DenseKDLoss() or KD = @KDLoss(), or give the term the weight 0."
                )
        self._place()

    @property
    def student(self) -> Any:
        """The library's network that is trained."""
        return self.detector.model

    @property
    def score(self) -> str:
        """Number whose highest value makes the best checkpoint."""
        return "AP50" if self.data.metric == "voc" else "AP"

    def batches(self, split: str, batch_size: int, **options: Any) -> Iterator[tuple]:
        """Batches of a split by the back end; images that cannot be read are the user's to repair."""
        try:
            yield from self.backend.batches(self.data, split, batch_size, **self._sharing, **options)
        except UnreadableImageError as error:
            raise UserError(str(error)) from error

    @property
    def initial_weights(self) -> str | None:
        """File or name of the weights that the student started from."""
        return self.description.setting("weights", self.backend.name)

    def _fit(self, folder: RunFolder, resume: bool) -> Summary:
        job = Job(
            trainer=self.trainer,
            distiller=self.distiller,
            batches=partial(self.batches, "train", self._share(self.batch_size), seed=self.seed),
            steps_per_epoch=self.steps_per_epoch,
            samples_per_step=self.batch_size,
            evaluate=partial(self.evaluate, self.choice_split),
            describe=lambda batch: f"training images {batch[2].tolist()}",
            score=self.score,
            folder=folder,
            resume=resume,
        )
        return self.backend.fit(job)

    def evaluate(self, split: str = "test") -> dict[str, Any]:
        """Record of one evaluation of the student as it is."""
        batches = partial(self.batches, split, self._share(self.eval_batch_size))
        return self.backend.evaluate(self.detector, self.data, split, batches)

    def outputs(self, folder: RunFolder) -> list[Path]:
        """What a user takes from the folder after the training, the checkpoint in the library's own format first."""
        return [folder.path / self.backend.checkpoint_name, *super().outputs(folder)]

    def _finish(self, folder: RunFolder, summary: Summary) -> dict[str, Any]:
        figures = self._figures(folder, summary, self.student, None if self.teacher is None else self.teacher.model)
        figures["versions"].update(package_versions(("pycocotools", "detectron2")))
        results = {
            "student": f"{self.description.architecture} {self.description.config or self.description.backbone}",
            "backend": self.backend.name,
            "unreadable_images": len(self.data.unreadable),
            **figures,
        }
        if self.trainer.fabric.is_global_zero:
            described = {
                "architecture": self.description.architecture,
                "backbone": self.description.backbone,
                "config": self.description.config,
                "options": self.description.setting("options", self.backend.name),
                "backend": self.backend.name,
                "classes": list(self.data.classes),
                "category_ids": [int(number) for number in self.data.category_ids],
            }
            save_student(folder.student, self.student, described)
            self.detector.save(folder.path / self.backend.checkpoint_name)
            folder.write_results(results)
        return results
