from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd.models.cifar.blocks import GlobalPool, conv1x1, conv3x3, shuffle_channels, stack


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; with stride 2, the pooled input is appended rather than added."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        branch = out_channels - in_channels if stride == 2 else out_channels
        channels = branch // 4
        # The 24 channels of the first convolution are too few to be split.
        self.groups = 1 if in_channels == 24 else groups
        self.downsample = stride == 2
        self.conv1 = conv1x1(in_channels, channels, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride, groups=channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, branch, groups=groups)
        self.bn3 = nn.BatchNorm2d(branch)
        self.preact = nn.Identity()  # a place to tap

    def forward(self, x: Tensor) -> Tensor:
        """Returns the activated sum, or concatenation, of branch and input."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = shuffle_channels(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out = torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1) if self.downsample else out + x
        return F.relu(self.preact(out), inplace=True)


class ShuffleNetV1(nn.Module):
    """ShuffleNet for 32x32 images with a 1x1 first convolution, and the parameter names of the CRD zoo.

    Stages: `layer1`, `layer2`, `layer3` give the activated maps at 1/2, 1/4 and 1/8 of the image's size, `layer1.-1.preact`, ... the
    same before activation, `avgpool` the pooled features [B, D].

    Args:
        widths: Channels of the three stages.
        depths: Number of units of the three stages.
        groups: Groups of the 1x1 convolutions.
        num_classes: Number of classes.

    Shapes:
        - **images** [B, 3, H, W]; **output** [B, num_classes]

    References:
        Zhang, Zhou, Lin, Sun: ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices, CVPR 2018.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(self, widths: Sequence[int], depths: Sequence[int], groups: int, num_classes: int = 100) -> None:
        super().__init__()
        unit = partial(ShuffleUnit, groups=groups)
        self.conv1 = conv1x1(3, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = stack(unit, 24, widths[0], depths[0], stride=2)
        self.layer2 = stack(unit, widths[0], widths[1], depths[1], stride=2)
        self.layer3 = stack(unit, widths[1], widths[2], depths[2], stride=2)
        self.avgpool = GlobalPool()
        self.linear = nn.Linear(widths[2], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of the images."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x))


ShuffleV1 = partial(ShuffleNetV1, (240, 480, 960), (4, 8, 4), 3)
