"""Feature pyramids on residual networks and MobileNets, named as torchvision names its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from gkd.models.names import near
from gkd.models.weights import load_weights, read_weights

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
MOBILENETS = ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
# One residual block a stage: not published by anyone, for small images.
LIGHT = "resnet10"
NORMS = ("batch", "frozen")


def build_pyramid(
    name: str, norm: str, imagenet: str | None = None, channels: int = 256, trainable: int = 5, with_p2: bool = True
) -> BackboneWithFPN:
    """A backbone with its pyramid.

    Args:
        name: A residual network or MobileNet of torchvision, or ``'resnet10'``.
        norm: ``'batch'`` or ``'frozen'``.
        imagenet: ImageNet weights: a file, or the name of published ones.
        channels: Channels of the pyramid.
        trainable: Stages to train, from the deepest; 5 are all.
        with_p2: Whether the pyramid begins at stride 4 and ends with a pooled map, as for two stages; else it begins at stride 8 and ends
            with two further convolutions.

    Raises:
        ValueError: If there is no such backbone, or a number is out of range.
        FileNotFoundError: If there are no such weights.
    """
    if not 0 <= trainable <= 5:
        raise ValueError(f"Expected trainable_layers from 0 to 5 (got {trainable})")
    backbone = _classifier(name, imagenet)
    set_norm(backbone, norm)
    is_residual = name.startswith("resnet")
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
    frozen = 5 - trainable
    if frozen:  # the stem, then the stages
        limit = stages[frozen - 2] if frozen > 1 else ("bn1" if is_residual else "0")
        for part, module in body.named_children():
            module.requires_grad_(False)
            if part == limit:
                break
    extra: Any = LastLevelMaxPool()
    if not with_p2:  # it makes too many anchors
        stages, widths, extra = stages[1:], widths[1:], LastLevelP6P7(channels, channels)
    return BackboneWithFPN(body, {stage: str(i) for i, stage in enumerate(stages)}, widths, channels, extra_blocks=extra)


def set_norm(model: nn.Module, norm: str, eps: float | None = None) -> None:
    """Turns all batch norms into frozen ones, which take their statistics along, or leaves them.

    Args:
        model: To be changed in place.
        norm: ``'batch'`` or ``'frozen'``.
        eps: What frozen norms add to the variance; None: what the batch norms added.
    """
    if norm not in NORMS:
        raise ValueError(f"Expected the norm 'batch' or 'frozen' (got {norm!r})")
    if norm == "batch":
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(module.num_features, eps=module.eps if eps is None else eps)
            frozen.load_state_dict({key: value for key, value in module.state_dict().items() if key != "num_batches_tracked"})
            model.set_submodule(name, frozen)


def norm_of(model: nn.Module) -> dict[str, Any]:
    """What `set_norm` has to be told to make the norms of a network again."""
    eps = {module.eps for module in model.modules() if isinstance(module, FrozenBatchNorm2d)}
    return {"norm": "frozen", **({"norm_eps": eps.pop()} if len(eps) == 1 else {})} if eps else {"norm": "batch"}


def downloaded(weights: Any, get: Callable[[], Any]) -> Any:
    """What `get` downloads; a FileNotFoundError that says what to do where it cannot."""
    try:
        return get()
    except OSError as error:
        raise FileNotFoundError(
            f"Expected to download torchvision's {weights} (got: {error}). Where this machine has no access, put {weights.url} into "
            f"{torch.hub.get_dir()}/checkpoints, or give a file as weights."
        ) from error


def _classifier(name: str, weights: str | None) -> Any:
    if name == LIGHT:
        model: nn.Module = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
        published: Mapping[str, Any] = {}
    elif name in RESNETS or name in MOBILENETS:
        published = models.get_model_weights(name).__members__
        if weights in published:
            return downloaded(published[str(weights)], lambda: models.get_model(name, weights=published[str(weights)]))
        model = models.get_model(name, weights=None)
    else:
        raise ValueError(f"Expected the backbone {near(name, [*RESNETS, *MOBILENETS, LIGHT])} (got {name!r})")
    if weights is not None:
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"Expected weights of the backbone {name} (got {weights!r}): a file that exists, or one of "
                f"{', '.join(published) or 'no published ones'}"
            )
        load_weights(model, read_weights(weights))
    return model


def _width(stage: nn.Module) -> int:
    return [module for module in stage.modules() if isinstance(module, nn.Conv2d)][-1].out_channels
