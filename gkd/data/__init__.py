"""Images for training, in memory or read by workers; every draw is a pure function of (seed, epoch)."""

from gkd.data.augment import CropFlip, Normalize
from gkd.data.box_augment import BoxAugment
from gkd.data.cifar import CIFAR10, CIFAR100
from gkd.data.coco import COCO
from gkd.data.detection import DetectionData
from gkd.data.digits import Digits
from gkd.data.folders import ImageFolder, ImageNet
from gkd.data.memory import InMemoryImages
from gkd.data.mixing import Mix
from gkd.data.scenes import DigitScenes
from gkd.data.segmentation import DigitSceneMasks, SegmentationFolder, VOCSegmentation
from gkd.data.synthetic import RandomImages
from gkd.data.voc import VOC
from gkd.data.workers import UnreadableImageError
from gkd.data.yolo import YOLO

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "COCO",
    "VOC",
    "YOLO",
    "BoxAugment",
    "CropFlip",
    "DetectionData",
    "DigitSceneMasks",
    "DigitScenes",
    "Digits",
    "ImageFolder",
    "ImageNet",
    "InMemoryImages",
    "Mix",
    "Normalize",
    "RandomImages",
    "SegmentationFolder",
    "UnreadableImageError",
    "VOCSegmentation",
]
