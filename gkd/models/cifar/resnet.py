from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from gkd.models.cifar.blocks import GlobalPool, conv1x1, conv3x3, initialize, projection, stack


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a projection where width or size change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.downsample = nn.Identity() if same else projection(in_channels, out_channels, stride)
        self.preact = nn.Identity()  # a place to tap

    def forward(self, x: Tensor) -> Tensor:
        """Returns the activated sum of the convolutions and the shortcut."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(self.preact(out + self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 convolutions that narrow and widen by four, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        channels = out_channels // 4
        self.conv1 = conv1x1(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else projection(in_channels, out_channels, stride)
        self.preact = nn.Identity()  # a place to tap

    def forward(self, x: Tensor) -> Tensor:
        """Returns the activated sum of the convolutions and the shortcut."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(self.preact(out + self.shortcut(x)), inplace=True)


class ResNet(nn.Module):
    """The three-stage residual network for 32x32 images, with the parameter names of the CRD zoo.

    Stages: `layer1`, `layer2`, `layer3` give the activated maps at 1, 1/2 and 1/4 of the image's size, `layer1.-1.preact`, ... the
    same before activation, `avgpool` the pooled features [B, D].

    Args:
        depth: Number of layers, 6 n + 2.
        widths: Channels of the first convolution and of the three stages.
        num_classes: Number of classes.

    Shapes:
        - **images** [B, 3, H, W]; **output** [B, num_classes]

    References:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(self, depth: int, widths: Sequence[int] = (16, 16, 32, 64), num_classes: int = 100) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"Expected a depth of 6 n + 2 (got {depth})")
        blocks = (depth - 2) // 6
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = stack(BasicBlock, widths[0], widths[1], blocks, stride=1)
        self.layer2 = stack(BasicBlock, widths[1], widths[2], blocks, stride=2)
        self.layer3 = stack(BasicBlock, widths[2], widths[3], blocks, stride=2)
        self.avgpool = GlobalPool()
        self.fc = nn.Linear(widths[3], num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of the images."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x))


class BottleneckResNet(nn.Module):
    """The four-stage residual network of ImageNet with a 3x3 first convolution and no max-pooling, for 32x32 images.

    Stages: `layer1` to `layer4` give the activated maps at 1, 1/2, 1/4 and 1/8 of the image's size, with 256, 512, 1024
    and 2048 channels, `layer1.-1.preact`, ... the same before activation; `avgpool` gives the pooled features [B, 2048].

    Args:
        depths: Number of blocks of the four stages.
        num_classes: Number of classes.

    Shapes:
        - **images** [B, 3, H, W]; **output** [B, num_classes]

    References:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016.
    """

    stages = ("layer1", "layer2", "layer3", "layer4")

    def __init__(self, depths: Sequence[int], num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stack(Bottleneck, 64, 256, depths[0], stride=1)
        self.layer2 = stack(Bottleneck, 256, 512, depths[1], stride=2)
        self.layer3 = stack(Bottleneck, 512, 1024, depths[2], stride=2)
        self.layer4 = stack(Bottleneck, 1024, 2048, depths[3], stride=2)
        self.avgpool = GlobalPool()
        self.linear = nn.Linear(2048, num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of the images."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.avgpool(x))


resnet8 = partial(ResNet, 8)
resnet14 = partial(ResNet, 14)
resnet20 = partial(ResNet, 20)
resnet32 = partial(ResNet, 32)
resnet44 = partial(ResNet, 44)
resnet56 = partial(ResNet, 56)
resnet110 = partial(ResNet, 110)
resnet8x4 = partial(ResNet, 8, (32, 64, 128, 256))
resnet32x4 = partial(ResNet, 32, (32, 64, 128, 256))
ResNet50 = partial(BottleneckResNet, (3, 4, 6, 3))
