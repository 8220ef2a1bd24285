"""Detectors of several libraries behind one interface, distilled by the terms of gkd. Imported on request only."""

from gkd.detection.interface import Backend, Detections, Detector, DetectorNetwork, Job, Output, choose_backend

__all__ = ["Backend", "Detections", "Detector", "DetectorNetwork", "Job", "Output", "choose_backend"]
