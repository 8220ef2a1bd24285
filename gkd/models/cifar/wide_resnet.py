from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from gkd.models.cifar.blocks import GlobalPool, conv1x1, conv3x3, initialize, stack


class PreActivationBlock(nn.Module):
    """Norm and activation before each of two 3x3 convolutions; where the width changes, the shortcut is activated too."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(out_channels, out_channels)
        # The name is that of the published checkpoints.
        self.convShortcut = None if in_channels == out_channels else conv1x1(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the sum of the convolutions and the shortcut, not activated."""
        out = self.relu1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return shortcut + self.conv2(self.relu2(self.bn2(self.conv1(out))))


class Stage(nn.Module):
    """The blocks of one size, under the name `layer` of the published checkpoints."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, stride: int) -> None:
        super().__init__()
        self.layer = stack(PreActivationBlock, in_channels, out_channels, depth, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the blocks in turn."""
        return self.layer(x)


class WideResNet(nn.Module):
    """The wide residual network for 32x32 images, with the parameter names of the CRD zoo.

    Stages: `block1`, `block2`, `block3` give the maps at 1, 1/2 and 1/4 of the image's size *before* activation, as
    published feature losses use them. The same maps after the norm are at `block2.layer.0.bn1`, `block3.layer.0.bn1` and `bn1`, after
    the ReLU too at `block2.layer.0.relu1`, `block3.layer.0.relu1` and `relu`; `avgpool` gives the pooled features [B, D].

    Args:
        depth: Number of layers, 6 n + 4.
        width: Factor of the widths 16, 32, 64.
        num_classes: Number of classes.

    Shapes:
        - **images** [B, 3, H, W]; **output** [B, num_classes]

    References:
        Zagoruyko, Komodakis: Wide Residual Networks, BMVC 2016.
    """

    stages = ("block1", "block2", "block3")

    def __init__(self, depth: int, width: int, num_classes: int = 100) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"Expected a depth of 6 n + 4 (got {depth})")
        blocks = (depth - 4) // 6
        self.conv1 = conv3x3(3, 16)
        self.block1 = Stage(16, 16 * width, blocks, stride=1)
        self.block2 = Stage(16 * width, 32 * width, blocks, stride=2)
        self.block3 = Stage(32 * width, 64 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = GlobalPool()
        self.fc = nn.Linear(64 * width, num_classes)
        initialize(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of the images."""
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(self.avgpool(self.relu(self.bn1(x))))


wrn_16_1 = partial(WideResNet, 16, 1)
wrn_16_2 = partial(WideResNet, 16, 2)
wrn_40_1 = partial(WideResNet, 40, 1)
wrn_40_2 = partial(WideResNet, 40, 2)
