"""torchvision's detectors: Faster R-CNN, RetinaNet and FCOS with feature pyramids on residual networks and MobileNets."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from gkd.detection.backend import Backend
from gkd.detection.interface import Detections, Detector, DetectorNetwork, Images, Output, Targets
from gkd.errors import UserError
from gkd.files import write_atomic
from gkd.models.checkpoints import read_weights
from gkd.models.modes import evaluating
from gkd.models.names import near
from gkd.models.weights import load_weights

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
MOBILENETS = ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
# One residual block a stage: not published by anyone, for small images.
LIGHT = "resnet10"
PUBLISHED = {
    ("faster_rcnn", "resnet50"): "fasterrcnn_resnet50_fpn",
    ("faster_rcnn", "mobilenet_v3_large"): "fasterrcnn_mobilenet_v3_large_fpn",
    ("retinanet", "resnet50"): "retinanet_resnet50_fpn",
    ("fcos", "resnet50"): "fcos_resnet50_fpn",
}
CLASSES = {"faster_rcnn": detection.FasterRCNN, "retinanet": detection.RetinaNet, "fcos": detection.FCOS}
COCO_PLACES = 91  # torchvision's COCO weights have a place for each number up to 90, used or not
PROBE = 128


class PreparedTransform(GeneralizedRCNNTransform):
    """Normalises and pads as ever, and leaves the size to the data, so that student and teacher see the same boxes. It holds no weights."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Returns image and boxes as they are."""
        return image, target


class TorchvisionDetector(Detector):
    """A detector of torchvision; see `Detector`.

    Args:
        model: A Faster R-CNN, RetinaNet or FCOS. Its transform is replaced by one that does not resize.
        labels: The library's label of every class of the data, in their order; None if the network has other classes.
    """

    def __init__(self, model: nn.Module, labels: Sequence[int] | None) -> None:
        old: Any = model.transform
        model.transform = PreparedTransform(old.min_size, old.max_size, old.image_mean, old.image_std, size_divisible=old.size_divisible)
        self.model: Any = model
        self.two_stage = isinstance(model, detection.FasterRCNN)
        self._labels = None if labels is None else tuple(labels)
        self._keys = _level_names(model)
        self._tables: dict[torch.device, Tensor] = {}
        self.levels = tuple(self._keys)

    def image_size(self, images: Images) -> tuple[int, int]:
        """Height and width, rounded up to what the transform pads to."""
        step = self.model.transform.size_divisible
        height, width = (-(-max(image.shape[side] for image in images) // step) * step for side in (1, 2))
        return height, width

    def forward(self, images: Images, targets: Targets) -> Output:
        """Losses and maps of one pass."""
        labels = self._label_table(images[0].device)
        given = [{"boxes": target["boxes"], "labels": labels[target["labels"]]} for target in targets]
        seen: dict[str, Any] = {}
        modules = {"proposals": self.model.rpn} if self.two_stage else {"logits": self.model.head.classification_head}
        with _watched({"features": self.model.backbone, **modules}, seen):
            losses = self.model(_floats(images), given)
        output = Output(losses, self._named(seen["features"]), self.image_size(images))
        if self.two_stage:
            output.proposals = [boxes.detach() for boxes in seen["proposals"][0]]
        else:
            output.dense_logits = seen["logits"][..., labels]
        return output

    def features(self, images: Images) -> dict[str, Tensor]:
        """Transform, backbone and pyramid."""
        prepared, _ = self.model.transform(_floats(images))
        return self._named(self.model.backbone(prepared.tensors))

    def class_logits(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
        """Scores of the second stage."""
        if not self.two_stage:
            raise UserError(
                f"Expected a two-stage detector for terms of class logits (got {type(self.model).__name__}, which has no proposals)"
            )
        table = self._label_table(next(iter(features.values())).device)
        heads = self.model.roi_heads
        maps = OrderedDict((key, features[level]) for level, key in self._keys.items() if level in features)
        pooled = heads.box_roi_pool(maps, list(boxes), [image_size] * len(boxes))
        logits, _ = heads.box_predictor(heads.box_head(pooled))
        return logits[:, torch.cat((table, table.new_zeros(1)))]

    def dense_logits(self, features: Mapping[str, Tensor]) -> Tensor:
        """Scores of the classification head."""
        if self.two_stage:
            raise UserError(f"Expected a one-stage detector for class logits at all places (got {type(self.model).__name__})")
        table = self._label_table(next(iter(features.values())).device)
        return self.model.head.classification_head([features[level] for level in self._keys])[..., table]

    def detect(self, images: Images) -> list[Detections]:
        """The library's own inference."""
        table = self._label_table(images[0].device)
        size = max(COCO_PLACES, int(table.max()) + 1)
        own = torch.full((size,), -1, device=table.device).index_copy(0, table, torch.arange(len(table), device=table.device))
        with evaluating(self.model), torch.no_grad():
            found = self.model(_floats(images))
        detections = []
        for result in found:
            labels = own[result["labels"]]
            is_known = labels >= 0  # COCO's weights have places that no category uses
            detections.append(Detections(result["boxes"][is_known], result["scores"][is_known], labels[is_known]))
        return detections

    def save(self, path: Path) -> None:
        """A state_dict, as `torch.save` writes it."""
        state = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        write_atomic(path, lambda file: torch.save(state, file))

    def _named(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {level: features[key] for level, key in self._keys.items()}

    def _label_table(self, device: torch.device) -> Tensor:
        if self._labels is None:
            raise UserError("Expected a detector of the data's classes for its losses, scores and detections (got one of other classes)")
        if device not in self._tables:  # made once: a copy to a GPU would wait for it in every step
            self._tables[device] = torch.tensor(self._labels, device=device)
        return self._tables[device]


class TorchvisionBackend(Backend):
    """torchvision's detectors; see `Backend`.

    ``DetectorNetwork.options`` are arguments of torchvision's class (``box_score_thresh``, ``image_mean``, ..) and

    ==================== ==============================================================================================
    ``norm``             ``'batch'`` or ``'frozen'`` batch norm; frozen by default where there are weights to start from
    ``trainable_layers`` Stages of the backbone to train, from the deepest: by default 3 with weights, all without
    ``fpn_channels``     Channels of the pyramid, 256
    ``box_channels``     Channels of Faster R-CNN's box head, 1024
    ``anchor_sizes``     Smallest side of the anchors of each level
    ==================== ==============================================================================================
    """

    name = "torchvision"

    def build_student(self, network: DetectorNetwork, data: Any) -> Detector:
        """The network with its weights, or ImageNet's in the backbone, or random ones."""
        return _build(network, data)

    def build_teacher(self, network: DetectorNetwork, data: Any) -> Detector:
        """The network with its weights, frozen."""
        if network.setting("weights", self.name) is None:
            raise UserError(
                f"Expected weights of the teacher {network.architecture} on {network.backbone} for torchvision (got none). Set "
                "teacher/DetectorNetwork.weights to a file; a training with this network as its student makes one, student.pth in its "
                "run folder."
            )
        detector = _build(network, data, is_teacher=True)
        detector.model.requires_grad_(False).eval()
        return detector


BACKEND = TorchvisionBackend


def _build(network: DetectorNetwork, data: Any, is_teacher: bool = False) -> TorchvisionDetector:
    weights, imagenet = (network.setting(name, "torchvision") for name in ("weights", "backbone_weights"))
    options = network.setting("options", "torchvision")
    two_stage = network.architecture == "faster_rcnn"
    if weights is not None and not Path(weights).is_file() and Path(weights).suffix == "":
        return TorchvisionDetector(_published(network, weights, options), _coco_labels(data, is_teacher))
    places = data.num_classes + two_stage if network.num_classes is None else network.num_classes
    labels: Sequence[int] | None = range(int(two_stage), data.num_classes + two_stage)
    if network.num_classes == COCO_PLACES:
        labels = _coco_labels(data, is_teacher)
    elif network.num_classes not in (None, data.num_classes + two_stage):
        labels = None
    norm = _norm(options.pop("norm", "frozen" if weights is not None or imagenet is not None else "batch"))
    pyramid = _pyramid(network, norm, imagenet if weights is None else None, options, has_weights=weights is not None)
    channels = pyramid.out_channels
    if two_stage and "box_channels" in options:
        width = options.pop("box_channels")
        options.update(box_head=TwoMLPHead(channels * 49, width), box_predictor=FastRCNNPredictor(width, places))
    if "anchor_sizes" in options:
        sizes = options.pop("anchor_sizes")
        thirds = (0, 1 / 3, 2 / 3) if network.architecture == "retinanet" else (0,)
        ratios = (1.0,) if network.architecture == "fcos" else (0.5, 1.0, 2.0)
        generator = AnchorGenerator(tuple(tuple(int(size * 2**third) for third in thirds) for size in sizes), (ratios,) * len(sizes))
        options["rpn_anchor_generator" if two_stage else "anchor_generator"] = generator
    # The classes pass what they do not know on to their transform, which ignores it.
    known = [*inspect.signature(CLASSES[network.architecture].__init__).parameters, "size_divisible"]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(
            f"Expected options that torchvision's {CLASSES[network.architecture].__name__} takes, such as {near(unknown[0], known)} "
            f"(got {unknown[0]!r})"
        )
    model = CLASSES[network.architecture](pyramid, None if "box_predictor" in options else places, **options)
    if weights is not None:
        _load(model, weights)
    return TorchvisionDetector(model, labels)


def _pyramid(
    network: DetectorNetwork, norm: Callable[..., nn.Module], imagenet: str | None, options: dict[str, Any], has_weights: bool
) -> Any:
    """The backbone with its pyramid, named as torchvision names it."""
    backbone = _classifier(network.backbone, norm, imagenet)
    channels = options.pop("fpn_channels", 256)
    is_residual = network.backbone.startswith("resnet")
    trainable = options.pop("trainable_layers", None if has_weights or imagenet is not None else 5)
    if is_residual:
        stages = ["layer1", "layer2", "layer3", "layer4"]
        body: Any = backbone
        widths = [_width(backbone.get_submodule(stage)) for stage in stages]
    else:
        body = backbone.features
        strided = [i for i, block in enumerate(body) if getattr(block, "_is_cn", False)]
        # The last block before the next stride; the last of all would widen the map for a classifier.
        ends = [i - 1 for i in strided[1:]] + [len(body) - 2]
        stages, widths = [str(i) for i in ends], [body[i].out_channels for i in ends]
    frozen = 5 - (3 if trainable is None else trainable)
    if not 0 <= frozen <= 5:
        raise ValueError(f"Expected trainable_layers from 0 to 5 (got {trainable})")
    if frozen:  # the stem, then the stages
        limit = stages[frozen - 2] if frozen > 1 else ("bn1" if is_residual else "0")
        for name, module in body.named_children():
            module.requires_grad_(False)
            if name == limit:
                break
    if network.architecture == "faster_rcnn":
        extra: Any = LastLevelMaxPool()
    else:  # p2 makes too many anchors
        stages, widths, extra = stages[1:], widths[1:], LastLevelP6P7(channels, channels)
    return BackboneWithFPN(body, {stage: str(i) for i, stage in enumerate(stages)}, widths, channels, extra_blocks=extra)


def _classifier(name: str, norm: Callable[..., nn.Module], weights: str | None) -> Any:
    if name == LIGHT:
        model: nn.Module = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm)
        published: Mapping[str, Any] = {}
    elif name in RESNETS or name in MOBILENETS:
        published = models.get_model_weights(name).__members__
        if weights in published:
            return _downloaded(published[str(weights)], lambda: models.get_model(name, weights=published[str(weights)], norm_layer=norm))
        model = models.get_model(name, weights=None, norm_layer=norm)
    else:
        raise ValueError(f"Expected the backbone {near(name, [*RESNETS, *MOBILENETS, LIGHT])} (got {name!r})")
    if weights is not None:
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"Expected weights of the backbone {name} (got {weights!r}): a file that exists, or one of "
                f"{', '.join(published) or 'no published ones'}"
            )
        _load(model, weights)
    return model


def _published(network: DetectorNetwork, weights: str, options: dict[str, Any]) -> nn.Module:
    key = (network.architecture, network.backbone)
    if key not in PUBLISHED:
        listed = ", ".join(f"{architecture} on {backbone}" for architecture, backbone in PUBLISHED)
        raise FileNotFoundError(
            f"Expected a file of weights for {key[0]} on {key[1]} (got {weights!r}; torchvision publishes weights of {listed} only). "
            "Train the network without distillation to make one: student.pth in its run folder."
        )
    members = models.get_model_weights(PUBLISHED[key]).__members__
    if weights not in members:
        raise FileNotFoundError(
            f"Expected weights of {PUBLISHED[key]}: a file that exists, or one of {', '.join(members)} (got {weights!r})"
        )
    if "trainable_layers" in options:
        options["trainable_backbone_layers"] = options.pop("trainable_layers")
    return _downloaded(members[weights], lambda: models.get_model(PUBLISHED[key], weights=members[weights], **options))


def _downloaded(weights: Any, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except OSError as error:
        raise FileNotFoundError(
            f"Expected to download torchvision's {weights} (got: {error}). Where this machine has no access, put {weights.url} into "
            f"{torch.hub.get_dir()}/checkpoints, or give a file as weights."
        ) from error


def _load(model: nn.Module, weights: str) -> None:
    """Loads a file strictly; frozen norms have no counters of batches."""
    state, own = read_weights(weights), model.state_dict()
    load_weights(model, {name: value for name, value in state.items() if name in own or not name.endswith("num_batches_tracked")})


def _coco_labels(data: Any, is_teacher: bool) -> Sequence[int] | None:
    """Labels of weights that count as COCO does; a teacher on other data is asked for features alone."""
    if data.num_classes == 80 and max(data.category_ids) == COCO_PLACES - 1:
        return data.category_ids
    if is_teacher:
        return None
    raise UserError(
        f"Expected COCO's 80 categories for weights of {COCO_PLACES} places (got data of {data.num_classes} classes). Start the "
        "student from backbone_weights instead."
    )


def _norm(name: str) -> Callable[..., nn.Module]:
    norms: dict[str, Callable[..., nn.Module]] = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}
    if name not in norms:
        raise ValueError(f"Expected the norm 'batch' or 'frozen' (got {name!r})")
    return norms[name]


def _width(stage: nn.Module) -> int:
    return [module for module in stage.modules() if isinstance(module, nn.Conv2d)][-1].out_channels


def _level_names(model: nn.Module) -> dict[str, str]:
    """The library's key of each map by the name that its stride gives; a second map of a stride gets a 'b'."""
    backbone: Any = model.backbone
    with evaluating(backbone), torch.no_grad():
        maps = backbone(torch.zeros(1, 3, PROBE, PROBE))
    keys: dict[str, str] = {}
    for key, feature in maps.items():
        name = f"p{(PROBE // feature.shape[-1]).bit_length() - 1}"
        keys[name if name not in keys else f"{name}b"] = key
    return keys


def _floats(images: Images) -> list[Tensor]:
    return [image.float() / 255 for image in images]


@contextmanager
def _watched(modules: Mapping[str, nn.Module], seen: dict[str, Any]) -> Iterator[None]:
    """Keeps what modules return while the context lasts."""

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
