from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd.models.cifar.blocks import GlobalPool, conv1x1, conv3x3, shuffle_channels


class BasicUnit(nn.Module):
    """Passes half of the channels on, sends the others through 1x1, depthwise 3x3 and 1x1, and shuffles the halves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv3x3(half, half, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.preact = nn.Identity()  # a place to tap

    def forward(self, x: Tensor) -> Tensor:
        """Returns the shuffled halves."""
        kept, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)), inplace=True)
        out = self.bn2(self.conv2(out))
        out = self.preact(torch.cat([kept, self.bn3(self.conv3(out))], dim=1))
        # The half that is kept was activated by the unit before: a second time changes neither it nor its gradient.
        return shuffle_channels(F.relu(out, inplace=True), 2)


class DownUnit(nn.Module):
    """Halves the size: all the channels go through both branches, each of which gives half of the output's channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = conv3x3(in_channels, in_channels, stride=2, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv1x1(in_channels, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(in_channels, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv3x3(half, half, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the shuffled branches."""
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return shuffle_channels(torch.cat([left, right], dim=1), 2)


def _stage(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(in_channels, out_channels), *(BasicUnit(out_channels) for _ in range(depth)))


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 for 32x32 images with a 1x1 first convolution, and the parameter names of the CRD zoo.

    Stages: `layer1`, `layer2`, `layer3` give the activated maps at 1/2, 1/4 and 1/8 of the image's size, `layer1.-1.preact`, ... the
    same before activation (with channels in another order), `relu` the map of the last 1x1 convolution, `avgpool` its pooled
    features [B, D].

    Args:
        widths: Channels of the three stages and of the last convolution.
        depths: Number of units of the three stages after the one that halves the size.
        num_classes: Number of classes.

    Shapes:
        - **images** [B, 3, H, W]; **output** [B, num_classes]

    References:
        Ma, Zhang, Zheng, Sun: ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(self, widths: Sequence[int], depths: Sequence[int], num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = conv1x1(3, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _stage(24, widths[0], depths[0])
        self.layer2 = _stage(widths[0], widths[1], depths[1])
        self.layer3 = _stage(widths[1], widths[2], depths[2])
        self.conv2 = conv1x1(widths[2], widths[3])
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = GlobalPool()
        self.linear = nn.Linear(widths[3], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of the images."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(self.relu(self.bn2(self.conv2(x)))))


ShuffleV2 = partial(ShuffleNetV2, (116, 232, 464, 1024), (3, 7, 3))
