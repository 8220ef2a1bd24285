"""What a library of detectors does: it builds networks, and may judge them in its own way."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gkd.detection.interface import LIBRARIES, Detector, DetectorNetwork
from gkd.errors import UserError

MODULES = {"torchvision": "torchvision", "detectron2": "d2", "transformers": "transformers"}


class Backend(ABC):
    """A library of detectors: builds the networks.

    Batches come from `gkd.data`, steps from `Trainer.fit`, numbers from `gkd.tasks.precision`: these are the same for all libraries. A back
    end is constructed by gin without arguments, or with options of its own: ``Detection.backend = @Detectron2Backend()``.

    Attributes:
        name: ``'torchvision'``, ``'detectron2'`` or ``'transformers'``.
        antialias: How the data resize images: with a smoothing filter (as PIL does) or without (as torchvision's detectors do).
        checkpoint_name: File name of the student in the library's own format, in the run folder.
        evaluate: The library's own evaluation, where it was asked for: from (detector, data, split, batches) to a record as that of
            `gkd.tasks.precision.evaluate_detector`. None leaves it to gkd.
    """

    name: str
    antialias: bool = False
    checkpoint_name: str = "student.pth"
    evaluate: Callable[..., dict[str, Any]] | None = None

    @abstractmethod
    def build_student(self, network: DetectorNetwork, data: Any) -> Detector:
        """Builds the network to train, on the CPU.

        Args:
            network: What to build.
            data: A `gkd.data.DetectionData`: ``num_classes``, ``classes``, ``category_ids``, and the sizes of its images.

        Raises:
            UserError, ValueError, FileNotFoundError: If it cannot be built or its weights do not fit; the message says what to do.
        """

    @abstractmethod
    def build_teacher(self, network: DetectorNetwork, data: Any) -> Detector:
        """Builds the network to learn from: with weights, or a UserError; frozen and in eval mode (`gkd.models.Teacher` keeps it so)."""

    @abstractmethod
    def rebuild(self, description: Mapping[str, Any], weights: Path) -> Detector:
        """Builds a trained network again, in eval mode.

        Args:
            description: What `Detector.describe` said of it, and the ``classes`` of its data.
            weights: Its state_dict, as safetensors.
        """

    def export(self, detector: Detector, kind: str, folder: Path) -> Path:
        """Writes the network in another format, ``'onnx'`` or ``'torch'``, compares its boxes, and returns the file.

        Raises:
            UserError: If the library's detectors cannot be written so.
        """
        raise UserError(f"Expected a detector of torchvision for --export {kind} (got one of {self.name}, which has its own exporter)")


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
        module = importlib.import_module(f"gkd.detection.{MODULES[name]}")
    except ImportError as error:
        if name == "torchvision":
            raise
        raise UserError(f"Expected {name} to be installed for Detection.backend = {name!r} (got: {error}).") from error
    return module.BACKEND()
