"""Backbones that Detectron2 lacks, known to its registry by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

# Last block of each resolution, its channels and its stride; and the epsilon of the norms. What torchvision has behind these blocks serves
# its classifier alone.
MOBILENETS: dict[str, dict[str, tuple[int, int, int]]] = {
    "mobilenet_v2": {"res2": (3, 24, 4), "res3": (6, 32, 8), "res4": (13, 96, 16), "res5": (17, 320, 32)},
    "mobilenet_v3_large": {"res2": (3, 24, 4), "res3": (6, 40, 8), "res4": (12, 112, 16), "res5": (15, 160, 32)},
}
_EPSILON = {"mobilenet_v2": 1e-5, "mobilenet_v3_large": 1e-3}


class MobileNetBackbone(nn.Module):
    """The convolutions of one of torchvision's MobileNets, as a bottom-up network of Detectron2.

    Its parameters have torchvision's names, so torchvision's ImageNet weights fit. Stages are named as Detectron2 names those of a ResNet.

    Args:
        name: ``'mobilenet_v2'`` or ``'mobilenet_v3_large'``.
        norm: Detectron2's name of a norm: ``'FrozenBN'``, ``'BN'``, ``'SyncBN'``.
        out_features: Stages to return; all by default.
        freeze_at: Stages that are not trained: 1 is the stem, 2 the stem and res2, and so on.

    Shapes:
        - **images** [B, 3, H, W]; **output** {stage: [B, c, H / s, W / s]}, s = 4, 8, 16, 32 for res2 to res5

    Raises:
        ValueError: If there is no such network or stage.

    References:
        Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018.
        Howard et al.: Searching for MobileNetV3, ICCV 2019.
    """

    size_divisibility = 0
    padding_constraints: Mapping[str, int] = {}

    def __init__(
        self, name: str = "mobilenet_v2", norm: str = "FrozenBN", out_features: Sequence[str] | None = None, freeze_at: int = 0
    ) -> None:
        super().__init__()
        from detectron2.layers import FrozenBatchNorm2d, get_norm
        from detectron2.modeling import Backbone
        from torchvision import models

        if name not in MOBILENETS:
            raise ValueError(f"Expected one of {', '.join(MOBILENETS)} (got {name!r})")
        self.stages = MOBILENETS[name]
        self.out_features = tuple(self.stages if out_features is None else out_features)
        if not self.out_features or any(stage not in self.stages for stage in self.out_features):
            raise ValueError(f"Expected out_features among {', '.join(self.stages)} (got {list(self.out_features)})")
        # Detectron2 asks for its base class; to register this one as a subclass of it lets the module be imported without Detectron2.
        Backbone.register(MobileNetBackbone)

        def norm_layer(channels: int) -> nn.Module:
            layer = get_norm(norm, channels)
            layer.eps = _EPSILON[name]
            return layer

        layers = models.get_model(name, weights=None, norm_layer=norm_layer).features
        self.features = nn.Sequential(*layers[: max(self.stages[stage][0] for stage in self.out_features) + 1])
        ends = [1, *(block for block, _, _ in self.stages.values())]  # the stem is all that comes before the stride of 4
        for number in range(ends[min(freeze_at, len(ends)) - 1] + 1 if freeze_at > 0 else 0):
            self.features[number].requires_grad_(False)
            self.features[number] = FrozenBatchNorm2d.convert_frozen_batchnorm(self.features[number])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the maps of the stages that were asked for."""
        ends = {self.stages[stage][0]: stage for stage in self.out_features}
        maps, x = {}, images
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in ends:
                maps[ends[number]] = x
        return maps

    def output_shape(self) -> dict[str, Any]:
        """Channels and stride of every stage that is returned."""
        from detectron2.layers import ShapeSpec

        return {stage: ShapeSpec(channels=self.stages[stage][1], stride=self.stages[stage][2]) for stage in self.out_features}


def register_backbones() -> None:
    """Makes MobileNets under a pyramid known to Detectron2, for ``cfg.MODEL.BACKBONE.NAME``; a second call does nothing.

    The names are ``build_mobilenet_v2_fpn_backbone`` for Faster R-CNN, ``build_retinanet_mobilenet_v2_fpn_backbone`` for RetinaNet, and the
    same with ``mobilenet_v3_large``.
    """
    from detectron2.modeling import BACKBONE_REGISTRY
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7

    def max_pool(cfg: Any, channels: int) -> nn.Module:
        return LastLevelMaxPool()

    def convolutions(cfg: Any, channels: int) -> nn.Module:
        return LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS)

    tops = {"": max_pool, "retinanet_": convolutions}
    for name in MOBILENETS:
        for prefix, top in tops.items():
            builder = _pyramid_builder(name, top)
            builder.__name__ = f"build_{prefix}{name}_fpn_backbone"
            if builder.__name__ not in BACKBONE_REGISTRY:
                BACKBONE_REGISTRY.register(builder)


def _pyramid_builder(name: str, top: Callable[[Any, int], nn.Module]) -> Callable[[Any, Any], nn.Module]:
    def build(cfg: Any, input_shape: Any) -> nn.Module:
        from detectron2.modeling import FPN

        settings = cfg.MODEL.FPN
        bottom_up = MobileNetBackbone(name, cfg.MODEL.RESNETS.NORM, tuple(settings.IN_FEATURES), cfg.MODEL.BACKBONE.FREEZE_AT)
        return FPN(
            bottom_up=bottom_up,
            in_features=settings.IN_FEATURES,
            out_channels=settings.OUT_CHANNELS,
            norm=settings.NORM,
            top_block=top(cfg, MOBILENETS[name][settings.IN_FEATURES[-1]][1]),
            fuse_type=settings.FUSE_TYPE,
        )

    return build
