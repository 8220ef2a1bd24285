"""The networks for 32x32 images that knowledge distillation is compared on, with the CRD zoo's names and parameter names.

Every network takes `num_classes`, works for any image of at least 8 pixels, and names in its class attribute `stages` the
module paths of its feature maps from shallow to deep, those whose maps published feature losses use.

Examples:
    >>> from gkd.models.cifar import resnet20
    >>> model = resnet20(num_classes=10)
    >>> model.stages
    ('layer1', 'layer2', 'layer3')
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from gkd.models.cifar.mobilenet import MobileNetV2
from gkd.models.cifar.resnet import (
    ResNet50,
    resnet8,
    resnet8x4,
    resnet14,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from gkd.models.cifar.shufflenet_v1 import ShuffleV1
from gkd.models.cifar.shufflenet_v2 import ShuffleV2
from gkd.models.cifar.vgg import vgg8, vgg11, vgg13, vgg16, vgg19
from gkd.models.cifar.wide_resnet import wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

CIFAR_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": resnet8,
    "resnet14": resnet14,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet8x4": resnet8x4,
    "resnet32x4": resnet32x4,
    "ResNet50": ResNet50,
    "wrn_16_1": wrn_16_1,
    "wrn_16_2": wrn_16_2,
    "wrn_40_1": wrn_40_1,
    "wrn_40_2": wrn_40_2,
    "vgg8": vgg8,
    "vgg11": vgg11,
    "vgg13": vgg13,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": ShuffleV1,
    "ShuffleV2": ShuffleV2,
}

__all__ = ["CIFAR_MODELS", *CIFAR_MODELS]
