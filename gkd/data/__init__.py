"""Images for training, in memory or read by workers; every draw is a pure function of (seed, epoch)."""

from gkd.data.augment import CropFlip, Normalize
from gkd.data.classification import CIFAR10, CIFAR100, ImageFolder, ImageNet
from gkd.data.digits import Digits
from gkd.data.memory import InMemoryImages
from gkd.data.synthetic import RandomImages

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "CropFlip",
    "Digits",
    "ImageFolder",
    "ImageNet",
    "InMemoryImages",
    "Normalize",
    "RandomImages",
]
