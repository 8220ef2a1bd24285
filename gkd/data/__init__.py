"""Images for training, in memory or read by workers; every draw is a pure function of (seed, epoch)."""

from gkd.data.augment import CropFlip, Normalize
from gkd.data.classification import CIFAR10, CIFAR100, ImageFolder, ImageNet
from gkd.data.coco import COCO
from gkd.data.detection import DetectionData, UnreadableImageError
from gkd.data.digits import Digits
from gkd.data.memory import InMemoryImages
from gkd.data.scenes import DigitScenes
from gkd.data.synthetic import RandomImages
from gkd.data.voc import VOC

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "COCO",
    "VOC",
    "CropFlip",
    "DetectionData",
    "DigitScenes",
    "Digits",
    "ImageFolder",
    "ImageNet",
    "InMemoryImages",
    "Normalize",
    "RandomImages",
    "UnreadableImageError",
]
