"""Detectors of several libraries behind one interface. Imported on request only."""

from gkd.detection.backend import Backend, choose_backend
from gkd.detection.description import load_detector, read_detector
from gkd.detection.interface import Detections, Detector, DetectorNetwork, Output
from gkd.detection.networks import DetectorPair
from gkd.detection.regions import BoxNodes, Regions

__all__ = [
    "Backend",
    "BoxNodes",
    "Detections",
    "Detector",
    "DetectorNetwork",
    "DetectorPair",
    "Output",
    "Regions",
    "choose_backend",
    "load_detector",
    "read_detector",
]
