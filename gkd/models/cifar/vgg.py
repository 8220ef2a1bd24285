from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from gkd.models.cifar.blocks import GlobalPool, conv3x3, initialize


def _block(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    """Chains convolution, norm and ReLU; the last ReLU is left to the network, which makes it a stage of its own."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [conv3x3(in_channels, out_channels, bias=True), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
        in_channels = out_channels
    return nn.Sequential(*layers[:-1])


class VGG(nn.Module):
    """VGG with batch norm and one linear layer for 32x32 images, with the parameter names of the CRD zoo.

    Stages: `relu1` to `relu4` give the activated maps at 1/2, 1/4, 1/8 and 1/8 of the image's size with 128, 256, 512 and
    512 channels (`relu0`: full size, 64 channels), `block1` to `block4` the same before activation, `avgpool` the pooled
    features [B, 512]. From 64 pixels on, one more pooling halves the last map.

    Args:
        depths: Number of convolutions of the five blocks.
        num_classes: Number of classes.

    Shapes:
        - **images** [B, 3, H, W]; **output** [B, num_classes]

    References:
        Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015.
    """

    stages = ("relu1", "relu2", "relu3", "relu4")

    def __init__(self, depths: Sequence[int], num_classes: int = 100) -> None:
        super().__init__()
        in_channels = 3
        for stage, (channels, depth) in enumerate(zip((64, 128, 256, 512, 512), depths, strict=True)):
            self.add_module(f"block{stage}", _block(in_channels, channels, depth))
            self.add_module(f"relu{stage}", nn.ReLU())
            in_channels = channels
        self.avgpool = GlobalPool()
        self.classifier = nn.Linear(512, num_classes)
        initialize(self, linear_std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of the images."""
        x, poolings = images, 4 if images.size(2) >= 64 else 3
        for stage in range(5):
            x = self.get_submodule(f"relu{stage}")(self.get_submodule(f"block{stage}")(x))
            if stage < poolings:
                x = F.max_pool2d(x, 2)
        return self.classifier(self.avgpool(x))


vgg8 = partial(VGG, (1, 1, 1, 1, 1))
vgg11 = partial(VGG, (1, 1, 2, 2, 2))
vgg13 = partial(VGG, (2, 2, 2, 2, 2))
vgg16 = partial(VGG, (2, 2, 3, 3, 3))
vgg19 = partial(VGG, (2, 2, 4, 4, 4))
