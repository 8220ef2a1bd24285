"""Detectron2's detectors. What a configuration may bind is imported with it; Detectron2 itself only when one of them is built."""

from gkd.detection.d2.backend import Detectron2Backend
from gkd.detection.d2.data import Detectron2Data
from gkd.detection.d2.solver import Detectron2Optimizer, Detectron2Schedule

__all__ = ["Detectron2Backend", "Detectron2Data", "Detectron2Optimizer", "Detectron2Schedule"]

BACKEND = Detectron2Backend
