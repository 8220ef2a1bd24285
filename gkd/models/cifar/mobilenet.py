from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from gkd.models.cifar.blocks import GlobalPool, conv1x1, conv3x3, initialize, stack

# Channels at full width, number of blocks and stride of the seven groups of blocks. The second group keeps the size,
# unlike on ImageNet.
GROUPS = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


def _activated(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True)]


class InvertedResidual(nn.Module):
    """Widens, filters channel by channel and narrows, without activation at the end; adds the input where it fits."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int = 6) -> None:
        super().__init__()
        channels = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *_activated(conv1x1(in_channels, channels)),
            *_activated(conv3x3(channels, channels, stride, groups=channels)),
            conv1x1(channels, out_channels),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the narrow map, with x added where stride and width allow it."""
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2Cifar(nn.Module):
    """MobileNetV2 for 32x32 images as the CRD zoo has it, with its parameter names.

    Unlike the paper's network: ReLU for ReLU6, an expansion convolution in the first block too, no dropout, widths
    truncated rather than rounded to multiples of 8.

    Stages: `blocks.1`, `blocks.2`, `blocks.4`, `blocks.6` give the linear (not activated) maps at 1/2, 1/4, 1/8 and 1/16 of
    the image's size; `conv2` gives the last, activated map of 1280 channels, `avgpool` the pooled features [B, 1280].

    Args:
        width: Factor of the widths.
        num_classes: Number of classes.

    Shapes:
        - **images** [B, 3, H, W]; **output** [B, num_classes]

    References:
        Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018.
    """

    stages = ("blocks.1", "blocks.2", "blocks.4", "blocks.6")

    def __init__(self, width: float, num_classes: int = 100) -> None:
        super().__init__()
        in_channels = int(32 * width)
        self.conv1 = nn.Sequential(*_activated(conv3x3(3, in_channels, stride=2)))
        groups = []
        for group, (full_width, depth, stride) in enumerate(GROUPS):
            out_channels = int(full_width * width)
            block = partial(InvertedResidual, expansion=6 if group else 1)
            groups.append(stack(block, in_channels, out_channels, depth, stride))
            in_channels = out_channels
        self.blocks = nn.Sequential(*groups)
        features = int(1280 * max(width, 1.0))
        self.conv2 = nn.Sequential(*_activated(conv1x1(in_channels, features)))
        self.avgpool = GlobalPool()
        self.classifier = nn.Sequential(nn.Linear(features, num_classes))
        initialize(self, linear_std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of the images."""
        x = self.conv2(self.blocks(self.conv1(images)))
        return self.classifier(self.avgpool(x))


MobileNetV2 = partial(MobileNetV2Cifar, 0.5)
