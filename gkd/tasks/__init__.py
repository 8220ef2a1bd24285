"""What can be trained: each task is a student, its data, its losses and how it is judged."""

from gkd.tasks.accuracy import ClassifierEvaluator
from gkd.tasks.classification import Classification
from gkd.tasks.detection import Detection
from gkd.tasks.ensemble import TeacherEnsemble
from gkd.tasks.network import Network, load_student
from gkd.tasks.segmentation import Segmentation, SegmentationNetwork, load_segmenter
from gkd.tasks.task import Task

__all__ = [
    "Classification",
    "ClassifierEvaluator",
    "Detection",
    "Network",
    "Segmentation",
    "SegmentationNetwork",
    "Task",
    "TeacherEnsemble",
    "load_segmenter",
    "load_student",
]
