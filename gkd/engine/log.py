"""Where the numbers of a training go: JSON lines and the terminal. Each takes the same records."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gkd.files import to_json, unwritable

Record = Mapping[str, Any]


class Writer(Protocol):
    """Takes records of ``{"kind": "train" | "eval", "epoch": .., "step": .., name: number}``."""

    def write(self, record: Record) -> None:
        """Takes one record."""

    def advance(self, step: int) -> None:
        """Takes the number of steps made."""

    def close(self) -> None:
        """Closes the place."""


class MetricsFile:
    """One JSON object a line; numbers that are not finite become null, so that every line is JSON.

    Args:
        path: File to append to.
        length: Bytes to keep of a file that is there: what a checkpoint knows of.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> metrics = MetricsFile(path)
        >>> metrics.write({"kind": "train", "step": 1, "loss": float("nan")})
        >>> metrics.close()
        >>> path.read_text()
        '{"kind": "train", "step": 1, "loss": null}\\n'
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        self._path = path
        try:
            self._file = path.open("ab", buffering=0)
            if path.stat().st_size > length:
                self._file.truncate(length)
        except OSError as error:
            raise unwritable(path, error) from error

    def write(self, record: Record) -> None:
        """Writes one line."""
        line = to_json(record).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise unwritable(self._path, error) from error

    def advance(self, step: int) -> None:
        """Steps leave no line."""

    def length(self) -> int:
        """Bytes so far, which are then on the disk."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a metrics file; a last line that a crash cut off is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def say(text: str) -> None:
    """Prints a line; once the terminal is gone, nothing."""
    with surviving_terminal():
        print(text, flush=True)


@contextmanager
def surviving_terminal() -> Iterator[None]:
    """Within, output that nobody takes any more (a closed pipe or terminal) does no harm, and from then on goes nowhere."""
    try:
        yield
    except OSError:
        # ValueError: standard output that is no file, as in a notebook. What is buffered has to go somewhere when Python ends.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


class _Console(Console):
    """A console that goes on without its terminal, also in the thread that moves the bar."""

    def print(self, *objects: Any, **options: Any) -> None:
        with surviving_terminal():
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the program


class TerminalLog:
    """A progress bar with the last numbers and the time left; plain lines where the output is no terminal. It survives its terminal.

    Args:
        total_steps: Steps of the whole training.
        total_epochs: Epochs of the whole training.
        step: Steps already made.
    """

    def __init__(self, total_steps: int, total_epochs: int, step: int = 0) -> None:
        self._total_steps, self._total_epochs = total_steps, total_epochs
        self._console = _Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total} steps"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
            )
            self._task = self._progress.add_task("training", total=total_steps, completed=step, numbers="")
            self._progress.start()

    def write(self, record: Record) -> None:
        """Shows training numbers beside the bar, and every evaluation on a line that stays."""
        line = format_record(record, self._total_steps, self._total_epochs)
        if self._progress is None:
            say(line)
        elif record["kind"] == "train":
            description = f"epoch {record['epoch']}/{self._total_epochs}"
            with surviving_terminal():
                self._progress.update(self._task, description=description, numbers=_numbers(record))
        else:
            self._console.print(line, markup=False)

    def advance(self, step: int) -> None:
        """Moves the bar."""
        if self._progress is not None:
            with surviving_terminal():
                self._progress.update(self._task, completed=step)

    def close(self) -> None:
        """Removes the bar."""
        if self._progress is not None:
            with surviving_terminal():
                self._progress.stop()


def format_record(record: Record, total_steps: int, total_epochs: int) -> str:
    """One line for people.

    Examples:
        >>> format_record({"kind": "eval", "split": "test", "epoch": 2, "step": 20, "top1": 71.5, "loss": 1.2}, 100, 10)
        'epoch 2/10  step 20/100  test  top1 71.50  loss 1.2'
    """
    head = f"epoch {record['epoch']}/{total_epochs}  step {record['step']}/{total_steps}"
    split = f"  {record['split']}" if "split" in record else ""
    return f"{head}{split}  {_numbers(record)}"


def _numbers(record: Record) -> str:
    """The numbers of a record. The files have parts of a term one by one, here they are added up, and numbers of single classes.

    Examples:
        >>> _numbers({"AP": 41.234, "AP/cat": 50.0, "loss/kd/p3": 1.0, "loss/kd/p4": 0.5, "images_per_second": 0.31})
        'AP 41.23  kd 1.5  0.31 images/s'
    """
    shown: dict[str, float] = {}
    for name, value in record.items():
        is_of_a_class = "/" in name and not name.startswith("loss/")
        if name in ("kind", "split", "epoch", "step") or is_of_a_class or not isinstance(value, float | int):
            continue
        head = name.split("/")[1] if name.startswith("loss/") else name
        shown[head] = shown.get(head, 0.0) + value
    formats = {"top1": "top1 {:.2f}", "top5": "top5 {:.2f}", "agreement": "agreement {:.2f}"}
    formats["images_per_second"] = "{:.0f} images/s" if shown.get("images_per_second", 0.0) >= 10 else "{:.2g} images/s"
    return "  ".join(formats.get(name, name + " {:.4g}").format(value) for name, value in shown.items())
