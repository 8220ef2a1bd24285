"""What a library of detectors does: it builds networks, trains and evaluates them."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gkd.detection.evaluate import evaluate_detector
from gkd.detection.interface import LIBRARIES, Detector, DetectorNetwork
from gkd.errors import UserError

if TYPE_CHECKING:
    from gkd.engine import RunFolder, Summary, Trainer


@dataclass(frozen=True)
class Job:
    """Everything that a training needs: the arguments of `Trainer.fit`, and the trainer."""

    trainer: Trainer
    distiller: nn.Module
    batches: Callable[..., Iterator[tuple]]
    steps_per_epoch: int
    samples_per_step: int
    evaluate: Callable[[], Mapping[str, Any]]
    describe: Callable[[tuple], str]
    score: str
    folder: RunFolder
    resume: bool = False


class Backend(ABC):
    """A library of detectors: builds networks, trains and evaluates them.

    The methods that are not abstract do it in gkd's own way, which is the same for all libraries: batches by `gkd.data`, steps by
    `Trainer.fit`, numbers by `gkd.detection.evaluate`. A back end replaces them where its library has a way of its own. A back end is
    constructed by gin without arguments, or with options of its own: ``Detection.backend = @Detectron2Backend()``.

    Attributes:
        name: ``'torchvision'`` or ``'detectron2'``.
        antialias: How the data resize images: with a smoothing filter (as PIL does) or without (as torchvision's detectors do).
        checkpoint_name: File name of the student in the library's own format, in the run folder.
    """

    name: str
    antialias: bool = False
    checkpoint_name: str = "student.pth"

    @abstractmethod
    def build_student(self, network: DetectorNetwork, data: Any) -> Detector:
        """Builds the network to train, on the CPU.

        Args:
            network: What to build.
            data: A `gkd.data.DetectionData`: ``num_classes``, ``classes``, and ``category_ids``, the number of each class in its
                annotations.

        Raises:
            UserError, ValueError, FileNotFoundError: If it cannot be built or its weights do not fit; the message says what to do.
        """

    @abstractmethod
    def build_teacher(self, network: DetectorNetwork, data: Any) -> Detector:
        """Builds the network to learn from: with weights, or a UserError; frozen and in eval mode (`gkd.models.Teacher` keeps it so)."""

    def batches(
        self, data: Any, split: str, batch_size: int, **options: Any
    ) -> Iterator[tuple[list[Tensor], list[dict[str, Any]], Tensor]]:
        """Batches (images, targets, index) of a split, by ``data.batches``, which documents the options: epoch, start, seed, rank,
        world_size, device."""
        return data.batches(split, batch_size, antialias=self.antialias, **options)

    def fit(self, job: Job) -> Summary:
        """Trains to the end, or to ``Trainer.max_steps``; checkpoints such that ``job.resume`` continues."""
        return job.trainer.fit(
            job.distiller,
            job.batches,
            steps_per_epoch=job.steps_per_epoch,
            samples_per_step=job.samples_per_step,
            evaluate=job.evaluate,
            describe=job.describe,
            score=job.score,
            folder=job.folder,
            resume=job.resume,
        )

    def evaluate(self, detector: Detector, data: Any, split: str, batches: Callable[[], Iterator[tuple]]) -> dict[str, Any]:
        """Record of one evaluation; see `gkd.detection.evaluate.evaluate_detector`.

        Args:
            detector: The student; its model is back in the mode it was in afterwards.
            data: Gives the true boxes (``data.annotations(split)``, in COCO's form) and ``data.metric``, ``'coco'`` or ``'voc'``.
            split: Name of the split.
            batches: Gives this process's batches of the split, the same each time.

        Returns:
            ``split`` and, in percent, for COCO ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl`` and ``AP/CLASS`` of every class; for
            VOC ``AP50`` and ``AP50/CLASS``. What there are no true boxes for is None.
        """
        return evaluate_detector(detector, data, split, batches)


def choose_backend(backend: str | Backend | None = None) -> tuple[Backend, str | None]:
    """Finds the back end: the one named, or else Detectron2 where it can be imported, or else torchvision.

    Returns:
        The back end, and a line for the user where the choice was not asked for.

    Raises:
        UserError: If the name is unknown, or the library that was asked for is absent.
    """
    if isinstance(backend, Backend):
        return backend, None
    if backend is not None:
        if backend not in LIBRARIES:
            raise UserError(f"Expected the back end {' or '.join(map(repr, LIBRARIES))} (got {backend!r}). Correct Detection.backend.")
        return _load(backend), None
    try:
        importlib.import_module("detectron2")
    except ImportError:
        note = "Detectron2 is not installed: using torchvision's detectors. Choose with Detection.backend = 'torchvision' or 'detectron2'."
        return _load("torchvision"), note
    return _load("detectron2"), "Using Detectron2's detectors. Choose with Detection.backend = 'torchvision' or 'detectron2'."


def _load(name: str) -> Backend:
    try:
        module = importlib.import_module(f"gkd.detection.{name}")
    except ImportError as error:
        if name != "detectron2":
            raise
        raise UserError(
            f"Expected Detectron2 to be installed for Detection.backend = 'detectron2' (got: {error}). Install it as "
            "https://detectron2.readthedocs.io/en/latest/tutorials/install.html says, or set Detection.backend = 'torchvision'."
        ) from error
    return module.BACKEND()
