"""Detectron2 behind gkd's interface of detectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gkd.detection.backend import Backend
from gkd.detection.d2.config import (
    build_detector,
    input_format,
    norm_of,
    read_config,
    require_detectron2,
    save_config,
    set_backbone,
    set_norm,
    set_num_classes,
    update_config,
    use_torchvision_layout,
    without_masks,
)
from gkd.detection.d2.evaluation import evaluate_with_detectron2
from gkd.detection.d2.weights import config_of_weights, is_of_detectron2, load_backbone, load_detector
from gkd.detection.interface import Detections, Detector, DetectorNetwork, Images, Output, Targets
from gkd.errors import UserError
from gkd.files import write_atomic
from gkd.models.modes import evaluating

# Trained networks of the model zoo, for weights = 'DEFAULT'.
PUBLISHED = {
    ("faster_rcnn", "resnet50"): "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
    ("faster_rcnn", "resnet101"): "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
    ("retinanet", "resnet50"): "COCO-Detection/retinanet_R_50_FPN_3x.yaml",
    ("retinanet", "resnet101"): "COCO-Detection/retinanet_R_101_FPN_3x.yaml",
    ("fcos", "resnet50"): "COCO-Detection/fcos_R_50_FPN_1x.py",
}


class Detectron2Detector(Detector):
    """A model of Detectron2 whose backbone gives feature maps by name: GeneralizedRCNN, RetinaNet, FCOS and their like.

    Images come in RGB, and the model gets them in the channel order that its configuration asks for; it subtracts its own mean, divides
    by its own standard deviation and pads as its backbone wants. So two models of other habits see the same picture.

    Args:
        model: The model.
        config: What it was built from, a CfgNode or a LazyConfig.
        num_classes: Classes of the data; None where they are not the model's.
    """

    def __init__(self, model: nn.Module, config: Any, num_classes: int | None = None) -> None:
        self.model, self.config, self.num_classes = model, config, num_classes
        self.reverses_channels = input_format(config) == "BGR"
        shapes = self._network.backbone.output_shape()
        self.levels = tuple(sorted(shapes, key=lambda name: shapes[name].stride))
        self.two_stage = hasattr(model, "roi_heads") and getattr(model, "proposal_generator", None) is not None
        if hasattr(model, "_ema_update") and not hasattr(model, "loss_normalizer"):
            _keep_normalizer(model, 300.0 if type(model).__name__ == "FCOS" else 100.0)

    @property
    def _network(self) -> Any:
        """The model, whose attributes type checkers do not know."""
        return self.model

    def image_size(self, images: Images) -> tuple[int, int]:
        """Height and width that the images are padded to."""
        from detectron2.structures import ImageList

        backbone = self._network.backbone
        shapes = [torch.empty_like(image, device="meta") for image in images]
        padded = ImageList.from_tensors(shapes, backbone.size_divisibility, padding_constraints=backbone.padding_constraints)
        return padded.tensor.shape[-2], padded.tensor.shape[-1]

    def forward(self, images: Images, targets: Targets) -> Output:
        """Losses and maps of one pass in training mode."""
        from detectron2.utils.events import EventStorage

        network = self._network
        seen: dict[str, Any] = {}
        handles = [network.backbone.register_forward_hook(lambda module, inputs, output: seen.update(inputs=inputs, features=output))]
        if self.two_stage or hasattr(network, "head"):
            head = network.proposal_generator if self.two_stage else network.head
            handles.append(head.register_forward_hook(lambda module, inputs, output: seen.update(head=output[0])))
        try:
            with EventStorage():  # the heads insist on telling somebody how many anchors matched
                losses = network(self._inputs(images, targets))
        finally:
            for handle in handles:
                handle.remove()
        height, width = seen["inputs"][0].shape[-2:]
        output = Output(losses, self._sorted(seen["features"]), (height, width))
        if self.two_stage:
            output.proposals = [found.proposal_boxes.tensor.detach() for found in seen["head"]]
        elif "head" in seen:
            output.dense_logits = self._dense(seen["head"])
        return output

    def features(self, images: Images) -> dict[str, Tensor]:
        """Maps of all levels, by the model's own preprocessing, backbone and pyramid."""
        return self._sorted(self._network.backbone(self._network.preprocess_image(self._inputs(images)).tensor))

    def class_logits(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
        """Class scores of given boxes."""
        from detectron2.structures import Boxes

        heads: Any = getattr(self.model, "roi_heads", None)
        if not self.two_stage or isinstance(getattr(heads, "box_predictor", None), nn.ModuleList | None):
            raise UserError(f"Expected a two-stage detector with one box head for class logits (got {type(self.model).__name__})")
        self._check_classes(heads.num_classes)
        found = [Boxes(box) for box in boxes]
        if hasattr(heads, "box_pooler"):
            pooled = heads.box_head(heads.box_pooler([features[name] for name in heads.box_in_features], found))
        else:  # heads on a map of stride 16, without a pyramid
            pooled = heads._shared_roi_transform([features[name] for name in heads.in_features], found).mean(dim=(2, 3))
        return heads.box_predictor(pooled)[0]

    def dense_logits(self, features: Mapping[str, Tensor]) -> Tensor:
        """Class scores of the head, which computes its boxes along the way."""
        if self.two_stage or not hasattr(self.model, "head"):
            raise UserError(f"Expected a one-stage detector for class logits at all places (got {type(self.model).__name__})")
        self._check_classes(self._network.num_classes)
        return self._dense(self._network.head([features[name] for name in self._network.head_in_features])[0])

    @torch.no_grad()
    def detect(self, images: Images) -> list[Detections]:
        """What the model finds, best first."""
        with evaluating(self.model):
            outputs = self._network(self._inputs(images))
        found = []
        for output in outputs:
            instances = output["instances"]
            order = instances.scores.argsort(descending=True, stable=True)
            found.append(Detections(instances.pred_boxes.tensor[order], instances.scores[order], instances.pred_classes[order]))
        return found

    def save(self, path: Path) -> None:
        """Writes ``{'model': weights}``, which `DetectionCheckpointer` loads, and the configuration beside it, with the suffix .yaml."""
        state = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        write_atomic(path, lambda file: torch.save({"model": state}, file))
        save_config(self.config, path.with_suffix(".yaml"))

    def _dense(self, logits: Sequence[Tensor]) -> Tensor:
        """Joins the levels' maps [B, A * K, h, w] of class scores."""
        number = self._network.num_classes
        rows = [level.unflatten(1, (-1, number)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in logits]
        return torch.cat(rows, dim=1)

    def _check_classes(self, number: int) -> None:
        if number != self.num_classes:
            raise UserError(
                f"Expected a detector with the classes of the data for class logits (got {number} classes). "
                "Switch the term off, or choose a teacher of the same classes."
            )

    def _inputs(self, images: Images, targets: Targets | None = None) -> list[dict[str, Any]]:
        """What the model is called with: channels in its order, true boxes where there are."""
        inputs: list[dict[str, Any]] = [{"image": image.flip(0) if self.reverses_channels else image} for image in images]
        if targets is None:
            return inputs
        from detectron2.structures import Boxes, Instances

        for entry, image, target in zip(inputs, images, targets, strict=True):
            size = (image.shape[-2], image.shape[-1])
            entry["instances"] = Instances(size, gt_boxes=Boxes(target["boxes"]), gt_classes=target["labels"])
        return inputs

    def _sorted(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: features[name] for name in self.levels}


class Detectron2Backend(Backend):
    """Builds Detectron2's models from its own configurations, for training by gkd.

    ============================ ===============================================================================================
    ``DetectorNetwork``          what is built
    ============================ ===============================================================================================
    ``config``                   that file or entry of the model zoo, with its own channel order and statistics
    ``weights`` of the zoo       their entry of the model zoo; ``'DEFAULT'`` is the published one of the architecture and the backbone
    ``weights`` that gkd wrote   the configuration that lies beside the file
    a ``.pkl`` file              architecture and backbone in the layout of the model zoo: BGR, strides in the 1x1 convolutions
    anything else                architecture and backbone in torchvision's layout: RGB, strides in the 3x3 convolutions
    ============================ ===============================================================================================

    A network that starts from random weights gets trainable BatchNorm and no frozen stage, whatever the configuration says, for a norm
    frozen at random weights cannot be trained; ``options`` have the last word.

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
        return self._build(network, data, partial=True)

    def build_teacher(self, network: DetectorNetwork, data: Any) -> Detectron2Detector:
        """Builds the network to learn from."""
        if network.setting("weights", self.name) is None:
            raise UserError(
                "Expected weights of the teacher (got none). Set teacher/DetectorNetwork.weights to a file, a name of the model zoo or "
                "detectron2://..; a training with this network as its student makes one, student.pth in its run folder."
            )
        detector = self._build(network, data, partial=False)
        detector.model.requires_grad_(False)
        detector.model.eval()
        return detector

    def _build(self, network: DetectorNetwork, data: Any, partial: bool) -> Detectron2Detector:
        weights, backbone_weights = self._weights(network)
        num_classes = data.num_classes if network.num_classes is None else network.num_classes
        config = configure(network, weights, backbone_weights, num_classes)
        model = build_detector(config)
        if weights is not None:
            load_detector(model, weights, partial)
        elif backbone_weights is not None:
            load_backbone(model, backbone_weights, config)
        return Detectron2Detector(model, config, data.num_classes if num_classes == data.num_classes else None)

    def _weights(self, network: DetectorNetwork) -> tuple[str | None, str | None]:
        weights = network.setting("weights", self.name)
        if weights == "DEFAULT":
            key = (network.architecture, network.backbone)
            if network.config is None and key not in PUBLISHED:
                known = ", ".join(f"{architecture} on {backbone}" for architecture, backbone in PUBLISHED)
                raise UserError(f"Expected a network that Detectron2 publishes, {known}, for weights = 'DEFAULT' (got {' on '.join(key)})")
            weights = network.config or PUBLISHED[key]
        return weights, None if weights else network.setting("backbone_weights", self.name)


def configure(network: DetectorNetwork, weights: str | None, backbone_weights: str | None, num_classes: int) -> Any:
    """The configuration of a network, see :class:`Detectron2Backend`.

    Raises:
        UserError: If there is no such configuration, backbone or option.
    """
    source = network.config or (config_of_weights(weights) if weights else None)
    config = read_config(source or network.architecture)
    if source is None:
        set_backbone(config, network.backbone)
    start = weights or backbone_weights or ""
    if (source is None or (backbone_weights and not weights)) and not is_of_detectron2(start):
        use_torchvision_layout(config)
    set_num_classes(config, num_classes)
    without_masks(config)
    if not start and norm_of(config) == "FrozenBN":
        set_norm(config, "BN", freeze_at=0)
    update_config(config, network.setting("options", "detectron2"))
    return config


def _keep_normalizer(model: nn.Module, initial: float) -> None:
    """Lets checkpoints of a training have the running mean that one-stage detectors divide by, a plain number in Detectron2.

    The model's own `state_dict` stays as Detectron2 has it: the number is there only where the model is a part of something greater.

    Args:
        model: RetinaNet, FCOS or their like.
        initial: What Detectron2 starts from.
    """
    model.register_buffer("loss_normalizer", torch.tensor(initial))
    model.register_state_dict_post_hook(_leave_normalizer_out)
    model.register_load_state_dict_pre_hook(_fill_normalizer_in)


def _leave_normalizer_out(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    if not prefix:
        state.pop("loss_normalizer", None)


def _fill_normalizer_in(model: Any, state: dict[str, Any], prefix: str, *further: Any) -> None:
    state.setdefault(f"{prefix}loss_normalizer", model.loss_normalizer)
