"""Where else the records of a training go: loggers of Lightning, made when the run folder is known."""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gkd.engine.folder import RunFolder
from gkd.engine.log import Record, read_metrics
from gkd.errors import UserError
from gkd.files import to_json, write_atomic

MakeLogger = Callable[[RunFolder, int], Any]


class LoggerWriter:
    """Gives records to a logger of Lightning, named kind/name or split/name. One that fails is left out from there on.

    Args:
        logger: Any `lightning.fabric.loggers.Logger`.
    """

    def __init__(self, logger: Any) -> None:
        self._logger: Any = logger

    def write(self, record: Record) -> None:
        """Logs every number of the record."""
        if self._logger is not None:
            self._attempt(lambda: self._logger.log_metrics({**scalars(record)}, step=record["step"]))

    def advance(self, step: int) -> None:
        """Steps leave no point."""

    def close(self) -> None:
        """Writes what is pending."""
        if self._logger is not None:
            self._attempt(lambda: self._logger.finalize("success"))

    def _attempt(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # a full disk, a server that is away: metrics.jsonl is the record that counts
            warnings.warn(f"{type(self._logger).__name__} failed and gets no further records: {error}", stacklevel=2)
            self._logger = None


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record by their names.

    Examples:
        >>> scalars({"kind": "eval", "split": "test", "epoch": 1, "step": 4, "top1": 50.0})
        {'test/top1': 50.0}
    """
    prefix = record.get("split", record["kind"])
    numbers = {name: value for name, value in record.items() if isinstance(value, float | int) and name not in ("step", "epoch")}
    return {f"{prefix}/{name}": value for name, value in numbers.items()}


@dataclass(frozen=True)
class TensorBoardLogger:
    """Event files in the run folder's ``tensorboard/``. The default."""

    def __call__(self, folder: RunFolder, step: int) -> Any:
        """The logger; on resuming, what an earlier run wrote after `step` is dropped."""
        from lightning.fabric.loggers import TensorBoardLogger as Logger

        return Logger(folder.tensorboard, name="", version="", purge_step=step + 1 if step else None)


@dataclass(frozen=True)
class CSVLogger:
    """A table, ``csv/metrics.csv`` in the run folder; on resuming it is written anew from metrics.jsonl."""

    def __call__(self, folder: RunFolder, step: int) -> Any:
        """The logger."""
        from lightning.fabric.loggers import CSVLogger as Logger

        path = folder.path / "csv"
        shutil.rmtree(path, ignore_errors=True)
        logger = Logger(path, name="", version="", flush_logs_every_n_steps=1)
        for record in read_metrics(folder.metrics):
            logger.log_metrics({**scalars(record)}, step=record["step"])
        return logger


@dataclass(frozen=True)
class WandbLogger:
    """A run of Weights & Biases, which a resumed training continues.

    Args:
        project: Name of the project.
        options: Further arguments of `lightning.pytorch.loggers.WandbLogger`.
    """

    project: str = "gkd"
    options: Mapping[str, Any] | None = None

    def __call__(self, folder: RunFolder, step: int) -> Any:
        """The logger.

        Raises:
            UserError: If the package wandb is not installed.
        """
        identity = _identities(folder).get("wandb") or uuid.uuid4().hex[:8]
        settings = {"project": self.project, "name": folder.path.name, "save_dir": str(folder.path), "id": identity, "resume": "allow"}
        logger = _make("WandbLogger", "wandb", {**settings, **(self.options or {})})
        _remember(folder, "wandb", identity)
        return logger


@dataclass(frozen=True)
class MLFlowLogger:
    """A run of MLflow, which a resumed training continues.

    Args:
        experiment: Name of the experiment.
        options: Further arguments of `lightning.pytorch.loggers.MLFlowLogger`, such as ``{'tracking_uri': 'http://host:5000'}``.
    """

    experiment: str = "gkd"
    options: Mapping[str, Any] | None = None

    def __call__(self, folder: RunFolder, step: int) -> Any:
        """The logger.

        Raises:
            UserError: If the package mlflow is not installed.
        """
        settings = {"experiment_name": self.experiment, "run_name": folder.path.name, "save_dir": str(folder.path / "mlruns")}
        logger = _make("MLFlowLogger", "mlflow", {**settings, "run_id": _identities(folder).get("mlflow"), **(self.options or {})})
        _remember(folder, "mlflow", logger.run_id)
        return logger


def _make(name: str, package: str, settings: Mapping[str, Any]) -> Any:
    from lightning.pytorch import loggers  # takes seconds to import

    try:
        return getattr(loggers, name)(**settings)
    except ModuleNotFoundError as error:
        raise UserError(f"Expected the package {package} for @{name}() (got: {error}). Install it with: pip install {package}") from error


def _identities(folder: RunFolder) -> dict[str, str]:
    """Names that the run has at services, as `_remember` kept them."""
    return json.loads(folder.loggers.read_text()) if folder.loggers.is_file() else {}


def _remember(folder: RunFolder, service: str, identity: str) -> None:
    content = to_json({**_identities(folder), service: identity}).encode()
    write_atomic(folder.loggers, lambda file: file.write(content))
