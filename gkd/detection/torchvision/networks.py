"""torchvision's detectors by name: on a backbone of one's choice, as the library builds them, or by a function of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD

from gkd.detection.starting import start_with_boxes
from gkd.detection.torchvision.pyramids import build_pyramid, set_norm
from gkd.errors import UserError
from gkd.models.classifiers import import_factory
from gkd.models.names import near

CLASSES: dict[str, type[nn.Module]] = {
    "faster_rcnn": detection.FasterRCNN,
    "mask_rcnn": detection.MaskRCNN,
    "keypoint_rcnn": detection.KeypointRCNN,
    "retinanet": detection.RetinaNet,
    "fcos": detection.FCOS,
}
TWO_STAGES = ("faster_rcnn", "mask_rcnn", "keypoint_rcnn")
# By the start of the library's name of a network.
OF_BUILDERS = {
    "fasterrcnn": "faster_rcnn",
    "maskrcnn": "mask_rcnn",
    "keypointrcnn": "keypoint_rcnn",
    "retinanet": "retinanet",
    "fcos": "fcos",
}
SIZES = ("min_size", "max_size", "_skip_resize", "fixed_size")
COMMON = ("norm", "norm_eps", "trainable_layers")
OWN = (*COMMON, "fpn_channels", "anchor_sizes")
OF_TWO_STAGES = {
    "faster_rcnn": ("box_channels",),
    "mask_rcnn": ("box_channels", "mask_channels"),
    "keypoint_rcnn": ("box_channels", "keypoint_channels"),
}
PRESET = ("backbone", "num_classes", "num_keypoints", "weights", "weights_backbone", "progress", "self", "kwargs")


@dataclass(frozen=True)
class Plan:
    """What is built: see `gkd.detection.DetectorNetwork`.

    Attributes:
        places: Outputs of the class layers, a background included where the network has one.
    """

    architecture: str
    backbone: str | None
    places: int
    num_keypoints: int = 17
    imagenet: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_background(self) -> bool:
        """Whether the first place stands for the background."""
        return self.architecture in TWO_STAGES or self.architecture.startswith(("fasterrcnn", "maskrcnn", "keypointrcnn", "ssd"))


def build_network(plan: Plan) -> Any:
    """Builds the network, with weights drawn at random but for the backbone's.

    Raises:
        UserError, ValueError, FileNotFoundError: If there is no such network, option or file.
    """
    if ":" in plan.architecture:
        return _build_own(plan)
    model = _build_on_backbone(plan) if plan.architecture in CLASSES else _build_by_name(plan)
    if isinstance(model, detection.FCOS):
        start_with_boxes(model.head.regression_head.bbox_reg)
    return model


def _build_by_name(plan: Plan) -> nn.Module:
    known = models.list_models(module=detection)
    if plan.architecture not in known:
        raise UserError(
            f"Expected the architecture {', '.join(CLASSES)}, a detector of torchvision such as {near(plan.architecture, known)}, or "
            f"'package.module:factory' (got {plan.architecture!r}). Correct DetectorNetwork.architecture."
        )
    return build_builtin(plan, None)


def build_builtin(plan: Plan, weights: Any) -> Any:
    """Builds a detector of torchvision by the library's name of it; with published weights, it has their classes."""
    name, options = plan.architecture, dict(plan.options)
    builder, library = models.get_model_builder(name), CLASSES.get(OF_BUILDERS.get(name.split("_")[0], ""), SSD)
    check_options(options, [*_parameters(builder), *_parameters(library.__init__), "size_divisible"], COMMON, name)
    norm, eps = options.pop("norm", None), options.pop("norm_eps", None)
    if "trainable_layers" in options:
        options["trainable_backbone_layers"] = options.pop("trainable_layers")
    if name.startswith("keypointrcnn"):
        options["num_keypoints"] = plan.num_keypoints
    number = {} if weights is not None else {"num_classes": plan.places, "weights_backbone": _backbone_weights(builder, plan.imagenet)}
    model = models.get_model(name, weights=weights, **number, **options)
    if norm is not None:
        set_norm(model.backbone, norm, eps)
    return model


def check_options(options: Mapping[str, Any], known: Sequence[str], own: Sequence[str], name: str) -> None:
    """Raises for options that the network does not have; near names come from all levels that an option may belong to."""
    if sizes := [option for option in options if option in SIZES]:
        raise UserError(
            f"Expected the size of the images from the data (got the option {sizes[0]!r}). Set min_size and max_size of the data set: "
            "student and teacher see the same images."
        )
    taken = [*own, *(option for option in known if option not in PRESET and option not in SIZES)]
    if unknown := [option for option in options if option not in taken]:
        raise ValueError(f"Expected options that torchvision's {name} takes, such as {near(unknown[0], taken)} (got {unknown[0]!r})")


def _build_on_backbone(plan: Plan) -> nn.Module:
    name, library = plan.architecture, CLASSES[plan.architecture]
    options = dict(plan.options)
    heads = OF_TWO_STAGES.get(name, ())
    check_options(options, [*_parameters(library.__init__), "size_divisible"], (*OWN, *heads), library.__name__)
    norm, eps = options.pop("norm", "frozen" if plan.imagenet else "batch"), options.pop("norm_eps", None)
    channels, trainable = options.pop("fpn_channels", 256), options.pop("trainable_layers", 3 if plan.imagenet else 5)
    pyramid = build_pyramid(plan.backbone or "resnet50", norm, plan.imagenet, channels, trainable, with_p2=name in TWO_STAGES)
    if eps is not None:
        set_eps(pyramid, eps)
    if "anchor_sizes" in options:
        key = "rpn_anchor_generator" if name in TWO_STAGES else "anchor_generator"
        options[key] = _anchors(name, options.pop("anchor_sizes"))
    if name not in TWO_STAGES:
        return library(pyramid, plan.places, **options)
    width = options.pop("box_channels", 1024)
    options.update(box_head=TwoMLPHead(channels * 49, width), box_predictor=FastRCNNPredictor(width, plan.places))
    if name == "mask_rcnn":
        width = options.pop("mask_channels", 256)
        predictor = MaskRCNNPredictor(width, width, plan.places)
        options.update(mask_head=MaskRCNNHeads(channels, [width] * 4, 1), mask_predictor=predictor)
    if name == "keypoint_rcnn":
        width = options.pop("keypoint_channels", 512)
        predictor = KeypointRCNNPredictor(width, plan.num_keypoints)
        options.update(keypoint_head=KeypointRCNNHeads(channels, [width] * 8), keypoint_predictor=predictor)
    return library(pyramid, None, **options)


def set_eps(model: nn.Module, eps: float) -> None:
    """Sets what frozen norms add to the variance."""
    for module in model.modules():
        if type(module).__name__ == "FrozenBatchNorm2d":
            module.eps = eps  # type: ignore[assignment]


def _build_own(plan: Plan) -> nn.Module:
    module, _, attribute = plan.architecture.partition(":")
    factory = import_factory(module, attribute)
    try:
        model = factory(num_classes=plan.places, **plan.options)
    except TypeError as error:
        raise UserError(
            f"Expected {plan.architecture} to take num_classes{''.join(f', {option}' for option in plan.options)} (got: {error})"
        ) from error
    lacking = [part for part in ("backbone", "transform") if not isinstance(getattr(model, part, None), nn.Module)]
    if lacking or not (hasattr(model, "roi_heads") or hasattr(model, "head")):
        raise UserError(
            f"Expected {plan.architecture} to return a detector made as torchvision's, with transform, backbone, and roi_heads or head "
            f"(got {type(model).__name__})"
        )
    return model


def _anchors(architecture: str, sizes: Sequence[int]) -> AnchorGenerator:
    thirds = (0, 1 / 3, 2 / 3) if architecture == "retinanet" else (0,)
    ratios = (1.0,) if architecture == "fcos" else (0.5, 1.0, 2.0)
    return AnchorGenerator(tuple(tuple(int(size * 2**third) for third in thirds) for size in sizes), (ratios,) * len(sizes))


def _backbone_weights(builder: Callable[..., Any], imagenet: str | None) -> Any:
    if imagenet is None:
        return None
    annotation = inspect.signature(builder).parameters["weights_backbone"].default
    published = {} if annotation is None else type(annotation).__members__
    if imagenet not in published:
        raise UserError(f"Expected one of {', '.join(published)} as backbone_weights of a network by the library's name (got {imagenet!r})")
    return published[imagenet]


def _parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in PRESET]
