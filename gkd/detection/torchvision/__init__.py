"""torchvision's detectors."""

from gkd.detection.torchvision.backend import TorchvisionBackend
from gkd.detection.torchvision.detector import TorchvisionDetector

__all__ = ["TorchvisionBackend", "TorchvisionDetector"]

BACKEND = TorchvisionBackend
