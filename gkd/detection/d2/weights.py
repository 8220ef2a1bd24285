"""Weights for Detectron2's models: its own files and names, torchvision's ImageNet weights, and what gkd wrote."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor, nn

from gkd.detection.d2.config import backbone_name
from gkd.errors import UserError
from gkd.models import build_classifier
from gkd.models.checkpoints import read_weights

_log = logging.getLogger(__name__)

CLASS_LAYERS = ("cls_score", "bbox_pred", "mask_head.predictor", "keypoint_head.score_lowres", "sem_seg_head.predictor")

# Names inside torchvision's resnets, and what Detectron2 calls the same.
_RENAMED = (
    (r"^(conv1\.)", r"stem.\1"),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


def convert_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of a torchvision ResNet to Detectron2's names; those of a MobileNet keep theirs. The classifier is left out.

    Examples:
        >>> import torch
        >>> names = ["bn1.bias", "layer1.0.conv2.weight", "layer2.0.downsample.1.weight", "fc.weight"]
        >>> list(convert_torchvision({name: torch.zeros(1) for name in names}))
        ['stem.conv1.norm.bias', 'res2.0.conv2.weight', 'res3.0.shortcut.norm.weight']
    """
    converted = {}
    for name, tensor in state.items():
        if name.startswith(("fc.", "classifier.")):
            continue
        for pattern, new in _RENAMED:
            name = re.sub(pattern, new, name)
        converted[name] = tensor
    return converted


def is_of_detectron2(weights: str) -> bool:
    """Whether weights were trained in Detectron2's own layout (BGR, strides in the 1x1 convolutions), as its model zoo's are.

    Examples:
        >>> is_of_detectron2("detectron2://ImageNetPretrained/MSRA/R-50.pkl"), is_of_detectron2("resnet18-f37072fd.pth")
        (True, False)
    """
    if "ImageNetPretrained/torchvision" in weights:
        return False
    return "://" in weights or weights.endswith((".pkl", ".yaml", ".py"))


def config_of_weights(weights: str) -> str | None:
    """The configuration that weights belong to, if they say so: model-zoo weights by their address, gkd's by a file beside: that of
    gkd, or the ``config.yaml`` that Detectron2's own trainer writes into its output folder.

    Examples:
        >>> config_of_weights("detectron2://COCO-Detection/faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl")
        'COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml'
    """
    if weights.endswith((".yaml", ".py")):
        return weights
    if "://" in weights:
        parts = PurePosixPath(weights.partition("://")[2]).parts
        folders = [
            index for index, part in enumerate(parts) if part in ("COCO-Detection", "PascalVOC-Detection", "COCO-InstanceSegmentation")
        ]
        return f"{parts[folders[0]]}/{parts[folders[0] + 1]}.yaml" if folders and len(parts) > folders[0] + 1 else None
    beside = (Path(weights).with_suffix(".yaml"), Path(weights).with_name("config.yaml"))
    return next((str(file) for file in beside if file.is_file()), None)


def load_detector(model: nn.Module, weights: str, partial: bool = False) -> None:
    """Loads the weights of a whole detector.

    Args:
        model: A model of Detectron2.
        weights: ``detectron2://..`` or another address that Detectron2 knows, a name of its model zoo, or a file: ``.pkl``, ``.pth``,
            ``.safetensors``.
        partial: Leave layers alone that have another number of classes, which the log says, to go on training from there.

    Raises:
        UserError: If the weights cannot be read, or are not those of the model.
    """
    if "://" in weights or weights.endswith((".pkl", ".yaml", ".py")):
        missing, shapes = _load_with_detectron2(model, _address(weights))
    else:
        missing, shapes = _load(model, _read(weights))
    if partial and shapes and all(any(part in name for part in CLASS_LAYERS) for name in shapes):
        _log.warning("%s has other classes: all its weights are taken but those of %s, which start anew", weights, ", ".join(shapes))
        shapes = {}
    _check(model, missing, shapes, weights)


def load_backbone(model: nn.Module, weights: str, config: Any) -> None:
    """Loads ImageNet weights into the network under the pyramid.

    Args:
        model: A model of Detectron2.
        weights: The name of weights that torchvision publishes (``'DEFAULT'``, ``'IMAGENET1K_V1'``), a file of them, or an address or
            ``.pkl`` file of Detectron2.
        config: The model's configuration.

    Raises:
        UserError: If the weights cannot be read, or are not those of the backbone.
    """
    inner, prefix = _bottom_up(model)
    if "://" in weights or weights.endswith(".pkl"):
        missing, shapes = _load_with_detectron2(model, weights)
        missing, shapes = [name for name in missing if name.startswith(prefix)], {k: v for k, v in shapes.items() if k.startswith(prefix)}
    else:
        if Path(weights).suffix or Path(weights).exists():
            state = _read(weights)
        else:
            try:
                state = build_classifier(backbone_name(config), weights=weights).state_dict()
            except (OSError, ValueError) as error:
                raise UserError(str(error)) from error
        converted = convert_torchvision(state)
        missing, shapes = _load(inner, converted)
        heads: Any = getattr(model, "roi_heads", None)
        if hasattr(heads, "res5"):  # without a pyramid, the last stage is a part of the box head
            further, unequal = _load(heads.res5, {name[5:]: tensor for name, tensor in converted.items() if name.startswith("res5.")})
            missing, shapes = missing + further, {**shapes, **unequal}
    _check(inner, missing, shapes, weights)


def _bottom_up(model: Any) -> tuple[nn.Module, str]:
    backbone = model.backbone
    return (backbone.bottom_up, "backbone.bottom_up.") if hasattr(backbone, "bottom_up") else (backbone, "backbone.")


def _read(weights: str) -> Mapping[str, Any]:
    try:
        return read_weights(weights)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error


def _load(model: nn.Module, state: Mapping[str, Any]) -> tuple[list[str], dict[str, tuple]]:
    own = model.state_dict()
    shapes = {name: (own[name].shape, state[name].shape) for name in own if name in state and own[name].shape != state[name].shape}
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in own and name not in shapes}, strict=False)
    return [name for name in own if name not in state], shapes


def _load_with_detectron2(model: nn.Module, path: str) -> tuple[list[str], dict[str, tuple]]:
    """Loads by Detectron2's own reader, which knows addresses and the names of older formats."""
    from detectron2.checkpoint import DetectionCheckpointer

    class Reader(DetectionCheckpointer):
        """Keeps what did not fit, which the original logs only."""

        def _load_model(self, checkpoint: Any) -> Any:
            self.found = super()._load_model(checkpoint)
            return self.found

    if "://" not in path and not Path(path).is_file():
        raise UserError(f"Expected a file of weights at {path} (got no such file, seen from {Path.cwd()}). Correct the path.")
    reader = Reader(model, save_to_disk=False)
    try:
        reader.load(path, checkpointables=[])
    except Exception as error:  # networks and pickles fail in any way
        if "://" in path:
            raise UserError(
                f"Expected to download {path} (got {type(error).__name__}: {error}). Where this machine has no access, download the file "
                "elsewhere and give its path as weights."
            ) from error
        raise UserError(f"Expected weights that Detectron2 reads at {path} (got {type(error).__name__}: {error})") from error
    shapes = {name: (tuple(ours), tuple(theirs)) for name, theirs, ours in reader.found.incorrect_shapes}
    return [name for name in reader.found.missing_keys if name not in shapes], shapes


def _address(weights: str) -> str:
    """Address of the trained weights of a configuration in the model zoo."""
    if not weights.endswith((".yaml", ".py")):
        return weights
    try:
        from detectron2.model_zoo import get_checkpoint_url

        return str(get_checkpoint_url(weights))
    except ImportError as error:
        raise UserError(f"Expected Detectron2's model zoo to import (got: {error}). Try: pip install 'setuptools<81'") from error
    except RuntimeError as error:
        raise UserError(f"Expected the name of a configuration with published weights (got {weights!r}: {error})") from error


def _check(model: nn.Module, missing: list[str], shapes: Mapping[str, tuple], weights: str) -> None:
    """Raises where a parameter or a statistic was not given; counters, and what follows from the configuration, may lack."""
    missing = [
        name for name in missing if not name.endswith(("num_batches_tracked", "pixel_mean", "pixel_std")) and "cell_anchors" not in name
    ]
    if not missing and not shapes:
        return
    found = [f"nothing for {len(missing)} of {len(model.state_dict())}, such as {', '.join(missing[:3])}"] if missing else []
    found += [f"{list(theirs)} where {name} has {list(ours)}" for name, (ours, theirs) in list(shapes.items())[:3]]
    raise UserError(
        f"Expected the weights of the {type(model).__name__} that the configuration builds in {weights} (got {'; '.join(found)}). "
        "Check config, architecture, backbone, options, and num_classes where the weights are for other classes than the data."
    )
