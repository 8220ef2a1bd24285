"""What a file says of the detector whose weights it holds, and how such a detector is built again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gkd.detection.backend import choose_backend
from gkd.detection.interface import Detector, DetectorNetwork
from gkd.engine.folder import read_description
from gkd.errors import UserError

STUDENT = "student.safetensors"


def load_detector(path: Path | str, trust: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Builds the detector in a run folder as an ordinary network of its library, in eval mode, set up for inference.

    It takes images as they are stored, in the library's own way: a list of float images in [0, 1] for torchvision, a list of dictionaries
    for Detectron2 (see `gkd.detection.d2`). Its boxes are those that the evaluation saw.

    Args:
        path: The run folder, or its student.safetensors.
        trust: Whether a function of one's own that the file names may be imported and called.

    Returns:
        The network, and what the file says of it: classes, labels, size, mean, std, thresholds.

    Raises:
        UserError: If the file does not say what it holds.
    """
    detector, description = read_detector(path, trust)
    return detector.model, description


def read_detector(path: Path | str, trust: bool = False) -> tuple[Detector, dict[str, Any]]:
    """As `load_detector`, behind gkd's interface: ``detector.detect(images)`` takes RGB bytes and answers in the data's classes."""
    path = Path(path)
    file = path / STUDENT if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise UserError(f"Expected a run folder or its {STUDENT} (got {path}, which is neither)")
    description = read_description(file)
    if description.get("task") != "Detection" or "network" not in description:
        raise UserError(f"Expected a detector that gkd wrote at {file} (got {description.get('task', 'weights without a description')})")
    _check_trust(description, file, trust)
    backend, _ = choose_backend(description["backend"])
    return backend.rebuild(description["network"], file), description


def described_weights(weights: str | None) -> dict[str, Any]:
    """What gkd wrote of weights, in their file or in the one beside it in their run folder; empty for others."""
    if weights is None or "://" in weights or not Path(weights).is_file():
        return {}
    file = Path(weights).with_suffix(".safetensors")
    if not file.is_file():
        return {}
    description = read_description(file)
    return dict(description["network"], backend=description["backend"]) if "network" in description else {}


def resolved(network: DetectorNetwork, described: Mapping[str, Any], backend: str) -> tuple[str, str | None]:
    """Architecture and backbone: as they were asked for, as the weights say, or Faster R-CNN on ResNet-50.

    Raises:
        UserError: If both say something else.
    """
    if described and described["backend"] != backend:
        raise UserError(f"Expected weights of a detector of {backend} (got one of {described['backend']}). Set Detection.backend to it.")
    asked = {"architecture": network.architecture, "backbone": network.backbone}
    for name, value in asked.items():
        if described and value is not None and not _agree(described[name], value):
            raise UserError(
                f"Expected the weights of {value!r} as DetectorNetwork.{name} says (got {network.weights}, which says that it is "
                f"{described[name]!r}). Correct one of them, or leave {name} to the weights: None."
            )
    architecture = described.get("architecture") or network.architecture or "faster_rcnn"
    backbone = described.get("backbone") if described else network.backbone or "resnet50"
    return architecture, backbone


def _agree(described: str | None, asked: str) -> bool:
    """Whether a description is of what was asked for: the same, or the library's own network of it."""
    return described is None or described.replace("_", "").startswith(asked.replace("_", ""))


def inference_size(data: Any) -> tuple[int, int] | None:
    """Shorter and longest side that images of the data are resized to in an evaluation; None where they stay as they are, of many sizes."""
    if data.min_size:
        return data.min_size[-1], data.max_size
    sizes = {sample.size for sample in data.samples("test")}
    return (min(size := sizes.pop()), max(size)) if len(sizes) == 1 else None


def _check_trust(description: Mapping[str, Any], file: Path, trust: bool) -> None:
    architecture = str(description["network"].get("architecture"))
    if ":" in architecture and not trust:
        raise UserError(
            f"Expected trust = True to import and call {architecture}, which {file} names as its network. Build it yourself otherwise, and "
            "load the weights."
        )
