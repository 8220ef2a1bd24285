"""Builds Detectron2's models from its own configurations."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gkd.detection.backend import Backend
from gkd.detection.classes import class_positions, match_classes
from gkd.detection.d2.config import (
    build_detector,
    norm_of,
    num_classes_of,
    read_config,
    require_detectron2,
    set_backbone,
    set_inference,
    set_norm,
    set_num_classes,
    set_num_keypoints,
    update_config,
    use_torchvision_layout,
)
from gkd.detection.d2.data import class_names
from gkd.detection.d2.detector import Detectron2Detector
from gkd.detection.d2.evaluation import evaluate_with_detectron2
from gkd.detection.d2.files import parse_config
from gkd.detection.d2.weights import config_of_weights, is_of_detectron2, load_backbone, load_detector
from gkd.detection.description import described_weights, inference_size
from gkd.detection.interface import Detector, DetectorNetwork
from gkd.errors import UserError

_log = logging.getLogger(__name__)

# Trained networks of the model zoo, for weights = 'DEFAULT'.
PUBLISHED = {
    ("faster_rcnn", "resnet50"): "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
    ("faster_rcnn", "resnet101"): "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
    ("mask_rcnn", "resnet50"): "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
    ("mask_rcnn", "resnet101"): "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml",
    ("keypoint_rcnn", "resnet50"): "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x.yaml",
    ("cascade_mask_rcnn", "resnet50"): "Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml",
    ("panoptic_fpn", "resnet50"): "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml",
    ("retinanet", "resnet50"): "COCO-Detection/retinanet_R_50_FPN_3x.yaml",
    ("retinanet", "resnet101"): "COCO-Detection/retinanet_R_101_FPN_3x.yaml",
    ("fcos", "resnet50"): "COCO-Detection/fcos_R_50_FPN_1x.py",
}


class Detectron2Backend(Backend):
    """Builds Detectron2's models from its own configurations, for training by gkd.

    ============================ ===============================================================================================
    ``DetectorNetwork``          what is built
    ============================ ===============================================================================================
    ``config``                   that file or entry of the model zoo, with its own channel order and statistics
    ``weights`` of the zoo       their entry of the model zoo; ``'DEFAULT'`` is the published one of the architecture and the backbone
    ``weights`` that gkd wrote   what the file says
    ``weights`` of Detectron2    ``config.yaml`` beside the file, as `DefaultTrainer` writes it
    a ``.pkl`` file alone        architecture and backbone in the layout of the model zoo: BGR, strides in the 1x1 convolutions (logged)
    any other file alone         refused: nobody says which layout it has
    no ``weights``               architecture and backbone in torchvision's layout, which its ImageNet weights have: RGB, strides in the 3x3
                                 convolutions
    ============================ ===============================================================================================

    A network that starts from random weights gets trainable BatchNorm and no frozen stage, whatever the configuration says, for a norm
    frozen at random weights cannot be trained; ``options`` have the last word. Masks and keypoints are learned where the configuration has
    them.

    Training is gkd's, not `DefaultTrainer`'s: one run folder, one command line, one way to resume for both libraries, and that bit for bit,
    which Detectron2's endless sampler does not offer. Detectron2's optimisers and learning rates go into the trainer as
    `Detectron2Optimizer` and `Detectron2Schedule`, its data sets into the task as `Detectron2Data`.

    Args:
        evaluator: ``'gkd'``, the same numbers for all libraries; or ``'detectron2'``: `COCOEvaluator`, `PascalVOCDetectionEvaluator`.
    """

    name = "detectron2"
    antialias = True  # Detectron2 resizes with PIL

    def __init__(self, evaluator: Literal["gkd", "detectron2"] = "gkd") -> None:
        require_detectron2()
        if evaluator not in ("gkd", "detectron2"):
            raise UserError(f"Expected the evaluator 'gkd' or 'detectron2' (got {evaluator!r}). Correct Detectron2Backend.evaluator.")
        if evaluator == "detectron2":
            self.evaluate = evaluate_with_detectron2

    def build_student(self, network: DetectorNetwork, data: Any) -> Detectron2Detector:
        """Builds the network to train."""
        return self._build(network, data, is_teacher=False)

    def build_teacher(self, network: DetectorNetwork, data: Any) -> Detectron2Detector:
        """Builds the network to learn from."""
        if network.setting("weights", self.name) is None:
            raise UserError(
                "Expected weights of the teacher (got none). Set teacher/DetectorNetwork.weights to a file, a name of the model zoo or "
                "detectron2://..; a training with this network as its student makes one, student.pth in its run folder."
            )
        detector = self._build(network, data, is_teacher=True)
        detector.model.requires_grad_(False)
        detector.model.eval()
        return detector

    def rebuild(self, description: Mapping[str, Any], weights: Path) -> Detectron2Detector:
        """Builds the network of a description; its configuration runs nothing."""
        if description["config"] is None:
            raise UserError(
                f"Expected the configuration of the network in {weights} (got none: it was a LazyConfig with functions). Build it from "
                "your LazyConfig, and load student.pth."
            )
        config = parse_config(description["config"], str(weights))
        model = build_detector(config)
        load_detector(model, str(weights))
        size = None if description["size"] is None else (description["size"][0], description["size"][1])
        return Detectron2Detector(model.eval(), config, description["labels"], description["names"], size)

    def export(self, detector: Detector, kind: str, folder: Path) -> Path:
        """Detectron2 exports its models itself."""
        raise UserError(
            f"Expected Detectron2's own exporter for --export {kind} (got a model of Detectron2): run its tools/deploy/export_model.py "
            f"with --config-file {folder / 'student.yaml'} MODEL.WEIGHTS {folder / 'student.pth'}"
        )

    def _build(self, network: DetectorNetwork, data: Any, is_teacher: bool) -> Detectron2Detector:
        weights, backbone_weights = self._weights(network)
        config, is_of_weights = read_layout(network, weights, backbone_weights)
        described = described_weights(weights)
        names = described.get("names") or (class_names(config) if is_of_weights else None)
        number = num_classes_of(config) if is_of_weights else network.num_classes or data.num_classes
        labels: Sequence[int] | None = range(data.num_classes) if number == data.num_classes else None
        if names is not None and len(names) == number:
            match = match_classes if is_teacher else lambda classes, names, whose: class_positions(classes, names)
            labels = match(data.classes, names, str(weights))
        elif labels is None and is_teacher:
            _log.warning("%s: weights of %d classes for data of %d; only its feature maps can be used", weights, number, data.num_classes)
        if labels is None and not is_teacher:
            number, names, labels = data.num_classes, None, range(data.num_classes)
        size = inference_size(data)
        finish(config, network, number, weights or backbone_weights)
        set_num_keypoints(config, len(getattr(data, "keypoints", ())), is_of_weights)
        set_inference(config, size)
        model = build_detector(config)
        if weights is not None:
            load_detector(model, weights, partial=not is_teacher)
        elif backbone_weights is not None:
            load_backbone(model, backbone_weights, config)
        if names is None and labels is not None:
            names = data.classes
        return Detectron2Detector(model, config, labels, names, size)

    def _weights(self, network: DetectorNetwork) -> tuple[str | None, str | None]:
        weights = network.setting("weights", self.name)
        if weights == "DEFAULT":
            key = (network.architecture or "faster_rcnn", network.backbone or "resnet50")
            if network.config is None and key not in PUBLISHED:
                known = ", ".join(f"{architecture} on {backbone}" for architecture, backbone in PUBLISHED)
                raise UserError(f"Expected a network that Detectron2 publishes, {known}, for weights = 'DEFAULT' (got {' on '.join(key)})")
            weights = network.config or PUBLISHED[key]
        return weights, None if weights else network.setting("backbone_weights", self.name)


def read_layout(network: DetectorNetwork, weights: str | None, backbone_weights: str | None) -> tuple[Any, bool]:
    """The configuration of a network before options and classes, and whether it is that of the weights; see `Detectron2Backend`.

    Raises:
        UserError: If there is no such configuration or backbone, or nobody says which layout the weights have.
    """
    described = described_weights(weights)
    if described:
        if described["backend"] != "detectron2":
            raise UserError(
                f"Expected weights of a detector of Detectron2 (got one of {described['backend']}). Set Detection.backend to it."
            )
        if described["config"] is not None and network.config is None:
            return parse_config(described["config"], str(weights)), True
    of_weights = config_of_weights(weights) if weights else None
    source = network.config or of_weights
    # What lies beside weights came with them, from anywhere; a name of the model zoo is Detectron2's own.
    is_beside = network.config is None and of_weights is not None and Path(of_weights).is_file()
    config = read_config(source or network.architecture or "faster_rcnn", trusted=not is_beside)
    if source is not None:
        if backbone_weights and not is_of_detectron2(backbone_weights):
            use_torchvision_layout(config)
        return config, network.config is None
    set_backbone(config, network.backbone or "resnet50")
    if weights is None:
        if not is_of_detectron2(backbone_weights or ""):
            use_torchvision_layout(config)
    elif not is_of_detectron2(weights):
        raise UserError(
            f"Expected the configuration of the weights {weights} (got no config.yaml beside them). Put the file there that their training "
            "wrote, or name it as DetectorNetwork.config: channel order, statistics and strides are not guessed."
        )
    else:
        _log.warning(
            "%s has no config.yaml beside it: read as a network of the model zoo, in BGR and with strides in the 1x1 convolutions", weights
        )
    return config, False


def finish(config: Any, network: DetectorNetwork, num_classes: int, start: str | None) -> None:
    """Sets classes, norms and options.

    Args:
        config: To be changed.
        network: Says the options.
        num_classes: Of the model.
        start: Weights that training starts from, if there are any.
    """
    set_num_classes(config, num_classes)
    if not start and norm_of(config) == "FrozenBN":
        set_norm(config, "BN", freeze_at=0)
    update_config(config, network.setting("options", "detectron2"))


def configure(network: DetectorNetwork, weights: str | None, backbone_weights: str | None, num_classes: int) -> Any:
    """The configuration of a network, see `Detectron2Backend`."""
    config, _ = read_layout(network, weights, backbone_weights)
    finish(config, network, num_classes, weights or backbone_weights)
    return config
