"""Detectors of several libraries behind one interface, distilled by the terms of gkd. Imported on request only."""

from gkd.detection.backend import Backend, Job, choose_backend
from gkd.detection.interface import Detections, Detector, DetectorNetwork, Output
from gkd.detection.levels import LevelGraphLoss
from gkd.detection.regions import BoxNodes, Regions
from gkd.detection.task import Detection

__all__ = [
    "Backend",
    "BoxNodes",
    "Detection",
    "Detections",
    "Detector",
    "DetectorNetwork",
    "Job",
    "LevelGraphLoss",
    "Output",
    "Regions",
    "choose_backend",
]
