"""Training: steps, records, checkpoints, and the run folder they end up in. It knows no task."""

from gkd.engine.folder import RunFolder
from gkd.engine.interrupt import Interrupted
from gkd.engine.loop import NonFiniteLossError
from gkd.engine.optim import SGD, AdamW, Cosine, Flat, MultiStep, OneCycle
from gkd.engine.position import Summary
from gkd.engine.trainer import Trainer

__all__ = [
    "SGD",
    "AdamW",
    "Cosine",
    "Flat",
    "Interrupted",
    "MultiStep",
    "NonFiniteLossError",
    "OneCycle",
    "RunFolder",
    "Summary",
    "Trainer",
]
