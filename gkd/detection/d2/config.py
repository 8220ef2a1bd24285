"""Detectron2's configurations, YAML and LazyConfig alike: found by file or model-zoo name, changed, built."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gkd.detection.d2.backbones import MOBILENETS, MobileNetBackbone, register_backbones
from gkd.detection.d2.files import parse_config
from gkd.detection.starting import start_with_boxes
from gkd.errors import UserError, did_you_mean

INSTALL_PAGE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", *MOBILENETS)
# What torchvision's ImageNet weights were trained with, in grey levels.
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# Configurations of the model zoo that an architecture stands for.
ARCHITECTURES = {
    "faster_rcnn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "keypoint_rcnn": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "cascade_mask_rcnn": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "panoptic_fpn": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "fcos": "COCO-Detection/fcos_R_50_FPN_1x.py",
}
_ABSENT = object()
_MAPPER_FORMAT = "dataloader.train.mapper.image_format"


def is_available() -> bool:
    """Whether Detectron2 can be imported."""
    return importlib.util.find_spec("detectron2") is not None


def require_detectron2() -> None:
    """Makes sure that Detectron2 is there.

    Raises:
        UserError: If it is not, or does not import.
    """
    found = "none that is installed"
    if is_available():
        try:
            importlib.import_module("detectron2.modeling")
        except ImportError as error:  # one that was built for another torch, say
            found = f"one that does not import: {error}"
        else:
            return
    raise UserError(
        f"Expected Detectron2 for Detection.backend = 'detectron2' (got {found}). Install it as {INSTALL_PAGE} says, or set "
        "Detection.backend = 'torchvision'."
    )


def find_config(source: str) -> Path:
    """File of a configuration.

    Args:
        source: A file, the name of an architecture (``'faster_rcnn'``, ``'retinanet'``, ``'fcos'``), or a name of the model zoo such as
            ``'COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml'``.

    Raises:
        UserError: If there is none.
    """
    require_detectron2()
    path = Path(ARCHITECTURES.get(source, source))
    if path.is_file():
        return path
    folders = _zoo_folders()
    for folder in folders:
        if (folder / path).is_file():
            return folder / path
    known = [str(file.relative_to(folder)) for folder in folders for suffix in ("yaml", "py") for file in folder.glob(f"*/*.{suffix}")]
    near = difflib.get_close_matches(str(path), known, n=2)
    listed = did_you_mean(near)
    raise UserError(
        f"Expected a .yaml or LazyConfig .py file, {', '.join(ARCHITECTURES)}, or a name of its model zoo (got {source!r}).{listed}"
    )


def read_config(source: str, trusted: bool = True) -> Any:
    """The configuration in a file or under a name, see :func:`find_config`: a CfgNode, or a DictConfig for a LazyConfig.

    Args:
        source: As there.
        trusted: Whether code in it may run: that of a LazyConfig, or the tags by which Detectron2's own YAML files compute numbers. A file
            that merely lies beside weights is not.

    Raises:
        UserError: If there is none, or it cannot be read.
    """
    path = find_config(source)
    if path.suffix == ".py" and not trusted:
        raise UserError(f"Expected a YAML file beside the weights (got {path}, which is code). Name it as DetectorNetwork.config.")
    from detectron2.config import LazyConfig, get_cfg

    register_backbones()
    if path.suffix != ".py" and _is_saved_lazy(path):
        return parse_config(path.read_text(), str(path))
    try:
        if path.suffix == ".py":
            config = LazyConfig.load(str(path))
        else:
            config = get_cfg()
            config.merge_from_file(str(path), allow_unsafe=trusted)
    except Exception as error:  # a LazyConfig is code, which may fail in any way
        raise UserError(f"Expected a configuration that Detectron2 reads at {path} (got {type(error).__name__}: {error})") from error
    if is_lazy(config) and "model" not in config:
        raise UserError(f"Expected a LazyConfig with a 'model' at {path} (got {', '.join(map(str, config)) or 'nothing'})")
    return config


def is_lazy(config: Any) -> bool:
    """Whether it is a LazyConfig."""
    from omegaconf import DictConfig

    return isinstance(config, DictConfig)


def update_config(config: Any, settings: Mapping[str, Any]) -> None:
    """Changes values by their dotted names: ``{'MODEL.FPN.OUT_CHANNELS': 64}``, or ``{'model.backbone.out_channels': 64}`` of a LazyConfig.

    Raises:
        UserError: If a name does not exist, or a value is of another type.
    """
    from omegaconf import OmegaConf

    for name, value in settings.items():
        try:
            if is_lazy(config):
                if OmegaConf.select(config, name, default=_ABSENT) is _ABSENT:
                    raise KeyError(f"Non-existent config key: {name}")
                OmegaConf.update(config, name, value)
            else:
                config.merge_from_list([name, value])
        except (KeyError, AssertionError, ValueError) as error:
            raise UserError(f"Expected names and values that the Detectron2 configuration has (got {name} = {value!r}: {error})") from error


def set_num_classes(config: Any, num_classes: int) -> None:
    """Sets the number of classes wherever the model has one."""
    if not is_lazy(config):
        config.MODEL.ROI_HEADS.NUM_CLASSES = config.MODEL.RETINANET.NUM_CLASSES = num_classes
        return
    for part in (config.model, config.model.get("roi_heads")):
        if part is not None and "num_classes" in part:
            part.num_classes = num_classes


def num_classes_of(config: Any) -> int:
    """Number of classes of the model."""
    if not is_lazy(config):
        return int(
            config.MODEL.RETINANET.NUM_CLASSES if "RetinaNet" in config.MODEL.META_ARCHITECTURE else config.MODEL.ROI_HEADS.NUM_CLASSES
        )
    parts = (config.model, config.model.get("roi_heads"))
    return int(next((part.num_classes for part in parts if part is not None and "num_classes" in part), 80))


def set_num_keypoints(config: Any, number: int, is_of_weights: bool) -> None:
    """Sets the number of keypoints of a head for these, where the data say it and no weights do."""
    if is_of_weights or number == 0:
        return
    if not is_lazy(config):
        config.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = number
        return
    head = (config.model.get("roi_heads") or {}).get("keypoint_head")
    if head is not None:
        head.num_keypoints = number


def set_backbone(config: Any, name: str) -> None:
    """Puts another network under the feature pyramid; weights that the configuration names no longer fit and are dropped.

    Args:
        config: To be changed.
        name: One of ``resnet18`` to ``resnet152``, ``mobilenet_v2`` or ``mobilenet_v3_large``.

    Raises:
        UserError: If the name is unknown or the configuration has no pyramid.
    """
    if name not in BACKBONES:
        raise UserError(
            f"Expected the backbone {', '.join(BACKBONES)} (got {name!r}). Others need a Detectron2 configuration of their own."
        )
    (_set_lazy_backbone if is_lazy(config) else _set_yaml_backbone)(config, name)


def use_torchvision_layout(config: Any) -> None:
    """Fits the configuration to torchvision's ImageNet weights: strides in the 3x3 convolutions, RGB, ImageNet's statistics.

    The weights of Detectron2's model zoo want the opposite of all three.
    """
    if is_lazy(config):
        from omegaconf import OmegaConf

        config.model.pixel_mean, config.model.pixel_std = list(IMAGENET_MEAN), list(IMAGENET_STD)
        if "input_format" in config.model:
            config.model.input_format = "RGB"
        OmegaConf.update(config, _MAPPER_FORMAT, "RGB", force_add=True)
        stages = _bottom_up(config).get("stages")
        if stages is not None and "stride_in_1x1" in stages:
            stages.stride_in_1x1 = False
        return
    config.MODEL.PIXEL_MEAN, config.MODEL.PIXEL_STD = list(IMAGENET_MEAN), list(IMAGENET_STD)
    config.INPUT.FORMAT = "RGB"
    config.MODEL.RESNETS.STRIDE_IN_1X1 = False


def backbone_name(config: Any) -> str:
    """torchvision's name of the network under the pyramid.

    Raises:
        UserError: If it is none of :data:`BACKBONES`.
    """
    if is_lazy(config):
        bottom_up = _bottom_up(config)
        name = bottom_up.get("name") or f"resnet{bottom_up.get('stages', {}).get('depth', '?')}"
    else:
        builder = config.MODEL.BACKBONE.NAME
        name = next(
            (name for name in MOBILENETS if name in builder), f"resnet{config.MODEL.RESNETS.DEPTH}" if "resnet" in builder else builder
        )
    if name not in BACKBONES:
        raise UserError(
            f"Expected a backbone that torchvision publishes weights of, {', '.join(BACKBONES)} (got {name}). Give a file of weights."
        )
    return str(name)


def set_inference(config: Any, size: tuple[int, int] | None) -> None:
    """Tells the configuration the size of the images in inference, and takes out the names of data sets that others trained on."""
    if is_lazy(config):
        from omegaconf import OmegaConf

        format_ = input_format(config)
        config.pop("dataloader", None)
        OmegaConf.update(config, _MAPPER_FORMAT, format_, force_add=True)
        if size is not None:
            resize = {
                "_target_": "detectron2.data.transforms.ResizeShortestEdge",
                "short_edge_length": [size[0], size[0]],
                "max_size": size[1],
            }
            OmegaConf.update(config, "dataloader.test.mapper.augmentations", [resize], force_add=True)
        return
    config.DATASETS.TRAIN = config.DATASETS.TEST = ()
    config.MODEL.WEIGHTS = ""
    if size is not None:
        config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST = size


def set_norm(config: Any, norm: str, freeze_at: int | None = None) -> None:
    """Sets the norm layers of the backbone and, where given, how many of its stages are frozen."""
    if not is_lazy(config):
        config.MODEL.RESNETS.NORM = norm
        if freeze_at is not None:
            config.MODEL.BACKBONE.FREEZE_AT = freeze_at
        return
    bottom_up = _bottom_up(config)
    for part in (bottom_up, bottom_up.get("stem"), bottom_up.get("stages")):
        if part is not None and "norm" in part:
            part.norm = norm
    if freeze_at is not None:
        bottom_up.freeze_at = freeze_at


def norm_of(config: Any) -> str:
    """Norm layers of the backbone; empty where the configuration does not say."""
    if not is_lazy(config):
        return str(config.MODEL.RESNETS.NORM)
    bottom_up = _bottom_up(config)
    return str((bottom_up.get("stem") or bottom_up).get("norm", ""))


def input_format(config: Any) -> str:
    """Order of the channels that the model expects: ``'RGB'`` or ``'BGR'``.

    A LazyConfig may say it of the model or of the data's mapper; Detectron2's default is BGR.

    Raises:
        UserError: If it is another one.
    """
    if is_lazy(config):
        from omegaconf import OmegaConf

        places = ("model.input_format", _MAPPER_FORMAT)
        found = next((value for value in (OmegaConf.select(config, place) for place in places) if value), "BGR")
    else:
        found = config.INPUT.FORMAT
    if found not in ("RGB", "BGR"):
        raise UserError(f"Expected images in RGB or BGR in the Detectron2 configuration (got {found!r})")
    return str(found)


def own_weights(config: Any) -> str:
    """Weights that the configuration names; may be empty."""
    if is_lazy(config):
        return str(config.get("train", {}).get("init_checkpoint", "") or "")
    return str(config.MODEL.WEIGHTS)


def build_detector(config: Any) -> nn.Module:
    """Builds the model of a configuration, on the CPU, with weights drawn at random.

    Raises:
        UserError: If it cannot be built, or its backbone gives no feature maps by name.
    """
    from detectron2.config import instantiate
    from detectron2.modeling import build_model
    from detectron2.modeling.meta_arch.fcos import FCOS

    try:
        if is_lazy(config):
            model = instantiate(config.model)
        else:
            config = config.clone()
            config.defrost()
            config.MODEL.DEVICE = "cpu"
            model = build_model(config)
    except Exception as error:  # configurations name any code
        raise UserError(f"Expected a Detectron2 configuration that builds (got {type(error).__name__}: {error})") from error
    if not hasattr(getattr(model, "backbone", None), "output_shape"):
        raise UserError(
            f"Expected a model with a 'backbone' that gives feature maps by name, as GeneralizedRCNN has (got {type(model).__name__})"
        )
    if isinstance(model, FCOS):
        start_with_boxes(model.head.bbox_pred)
    return model


def _zoo_folders() -> Sequence[Path]:
    """Where the model zoo's configurations lie: in the installed package, or beside it in a source checkout."""
    spec = importlib.util.find_spec("detectron2")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    return [folder for folder in (package / "model_zoo" / "configs", package.parent / "configs") if folder.is_dir()]


def _bottom_up(config: Any) -> Any:
    backbone = config.model.backbone
    return backbone.get("bottom_up", backbone)


def _is_saved_lazy(path: Path) -> bool:
    """Whether a YAML file was written by `LazyConfig.save`; those of the older kind spell their sections in capitals."""
    return any(line.startswith("model:") for line in path.read_text().splitlines())


def _set_yaml_backbone(config: Any, name: str) -> None:
    model = config.MODEL
    if "fpn" not in model.BACKBONE.NAME:
        raise UserError(f"Expected a configuration with a feature pyramid to put {name} under (got {model.BACKBONE.NAME})")
    top = "retinanet_" if "retinanet" in model.BACKBONE.NAME else ""
    if name in MOBILENETS:
        model.BACKBONE.NAME = f"build_{top}{name}_fpn_backbone"
    else:
        depth = int(name.removeprefix("resnet"))
        model.BACKBONE.NAME = f"build_{top}resnet_fpn_backbone"
        model.RESNETS.DEPTH, model.RESNETS.RES2_OUT_CHANNELS = depth, 64 if depth < 50 else 256
        model.RESNETS.NUM_GROUPS, model.RESNETS.WIDTH_PER_GROUP = 1, 64
    model.WEIGHTS = ""


def _set_lazy_backbone(config: Any, name: str) -> None:
    from detectron2.config import LazyCall

    backbone = config.model.backbone
    bottom_up = backbone.get("bottom_up")
    if bottom_up is None or "stages" not in bottom_up:
        raise UserError(f"Expected a LazyConfig with a feature pyramid over a ResNet to put {name} under (got another backbone)")
    if name in MOBILENETS:
        channels = MOBILENETS[name]["res5"][1]
        backbone.bottom_up = LazyCall(MobileNetBackbone)(
            name=name, norm=bottom_up.stem.norm, out_features=list(bottom_up.out_features), freeze_at=bottom_up.get("freeze_at", 0)
        )
    else:
        depth = int(name.removeprefix("resnet"))
        channels = 512 if depth < 50 else 2048
        bottom_up.stages.depth = depth
        if depth < 50:  # blocks of two 3x3 convolutions have no such argument
            bottom_up.stages.pop("stride_in_1x1", None)
    top = backbone.get("top_block")
    if top is not None and "in_channels" in top and top.get("in_feature", "res5") == "res5":
        top.in_channels = channels
    if "train" in config and "init_checkpoint" in config.train:
        config.train.init_checkpoint = ""
