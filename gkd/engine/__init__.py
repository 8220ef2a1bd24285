"""Training: steps, records, checkpoints, evaluation, export, and the run folder they end up in."""

from gkd.engine.classification import Classification, Network, load_student
from gkd.engine.evaluate import ClassifierEvaluator
from gkd.engine.interrupt import Interrupted
from gkd.engine.loop import NonFiniteLossError
from gkd.engine.optim import SGD, AdamW, Cosine, Flat, MultiStep, OneCycle
from gkd.engine.position import Summary
from gkd.engine.run import RunFolder
from gkd.engine.trainer import Trainer

__all__ = [
    "SGD",
    "AdamW",
    "Classification",
    "ClassifierEvaluator",
    "Cosine",
    "Flat",
    "Interrupted",
    "MultiStep",
    "Network",
    "NonFiniteLossError",
    "OneCycle",
    "RunFolder",
    "Summary",
    "Trainer",
    "load_student",
]
