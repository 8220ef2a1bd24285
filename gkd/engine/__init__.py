"""Training: steps, records, checkpoints, and the run folder they end up in. It knows no task."""

from gkd.engine.average import EMA
from gkd.engine.callbacks import Callback, EarlyStopping
from gkd.engine.folder import RunFolder
from gkd.engine.interrupt import Interrupted
from gkd.engine.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from gkd.engine.loop import NonFiniteLossError
from gkd.engine.optim import SGD, AdamW, Cosine, Flat, MultiStep, OneCycle
from gkd.engine.position import Summary
from gkd.engine.trainer import Trainer

__all__ = [
    "EMA",
    "SGD",
    "AdamW",
    "CSVLogger",
    "Callback",
    "Cosine",
    "EarlyStopping",
    "Flat",
    "Interrupted",
    "MLFlowLogger",
    "MultiStep",
    "NonFiniteLossError",
    "OneCycle",
    "RunFolder",
    "Summary",
    "TensorBoardLogger",
    "Trainer",
    "WandbLogger",
]
