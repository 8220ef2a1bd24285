"""The records of one training and all the places that they go to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gkd.engine.folder import RunFolder
from gkd.engine.log import MetricsFile, TerminalLog, Writer
from gkd.engine.loggers import LoggerWriter, MakeLogger
from gkd.engine.position import Clock, Position
from gkd.engine.window import Window


class Records:
    """Writes records on the first process, to the terminal, to metrics.jsonl and to the loggers.

    Args:
        position: Where the training is.
        total_steps: Steps of the whole training.
        steps_per_epoch: Steps in an epoch.
    """

    def __init__(self, position: Position, total_steps: int, steps_per_epoch: int) -> None:
        self.position, self.total_steps, self.steps_per_epoch = position, total_steps, steps_per_epoch
        self.kept_length = 0  # bytes of metrics.jsonl that the checkpoint knows of
        self._file: MetricsFile | None = None
        self._writers: list[Writer] = []
        self._logged = (0.0, position.samples)  # time and samples at the last record of the training

    def open(self, folder: RunFolder | None, loggers: Sequence[MakeLogger]) -> None:
        """Begins to write.

        Args:
            folder: Run folder; None shows the records in the terminal only.
            loggers: Called with the folder and the step.
        """
        step = self.position.step
        self._logged = (0.0, self.position.samples)
        self._writers = [TerminalLog(self.total_steps, -(-self.total_steps // self.steps_per_epoch), step)]
        if folder is not None:
            self._file = MetricsFile(folder.metrics, self.kept_length)
            self._writers.append(self._file)
            self._writers += [LoggerWriter(make(folder, step)) for make in loggers]

    def write(self, kind: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a record and returns it."""
        step = self.position.step
        record = {"kind": kind, "epoch": -(-step // self.steps_per_epoch), "step": step, **numbers}
        for writer in self._writers:
            writer.write(record)
        return record

    def write_means(self, window: Window, lr: float, clock: Clock, reduce: Callable[[Any], Any] | None) -> None:
        """Writes the means since the last record of this kind, and the throughput.

        Args:
            window: Has the sums; it begins anew.
            lr: Learning rate of the last step.
            clock: Runs while the training does.
            reduce: Takes the mean over processes; None for a single one.
        """
        means = window.means(reduce)
        window.reset()
        seconds, samples = clock.read(), self.position.samples
        rate = (samples - self._logged[1]) / max(1e-9, seconds - self._logged[0])
        self._logged = (seconds, samples)
        self.write("train", {"lr": lr, **means, "images_per_second": rate})

    def advance(self) -> None:
        """Moves the progress bar."""
        for writer in self._writers:
            writer.advance(self.position.step)

    def length(self) -> int:
        """Bytes of metrics.jsonl, which are then on the disk."""
        return 0 if self._file is None else self._file.length()

    def close(self) -> None:
        """Closes every place."""
        for writer in self._writers:
            writer.close()
