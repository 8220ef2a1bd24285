"""A small distillation for the torture test: started as the real command in a process of its own, and compared with an undisturbed run."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gkd.cli.main import main

GIN = ("gin/base/classification.gin", "gin/methods/kd.gin")
BINDINGS = (
    "Classification.data = @RandomImages()",
    "RandomImages.num_classes = 4",
    "RandomImages.num_train = 48",
    "RandomImages.num_test = 8",
    "RandomImages.holdout = 8",
    "STUDENT = 'resnet8'",
    "BATCH_SIZE = 8",
    "EPOCHS = 3",
    "LR = 0.01",
    "WEIGHT_DECAY = 5e-4",
    "Trainer.device = 'cpu'",
    "Trainer.loggers = [@CSVLogger()]",
    "Trainer.ema = @EMA()",
    "Trainer.check_teacher = False",
    "Trainer.log_every = 2",
    "Trainer.checkpoint_every = 1",
    "EMA.decay = 0.9",
)
# Imported once, before anything is started: a process then starts in milliseconds.
MODULES = ("gkd.cli.train", "gkd.tasks", "gkd.engine", "gkd.viz", "lightning.fabric.loggers", "torchvision")
CLOCK = ("seconds", "images_per_second", "peak_memory", "cost")


class Process:
    """The command ``gkd train`` in a forked process. What it prints goes to a file.

    Args:
        arguments: Of the command.
        output: The file.
        before: Called in the process before the command.
    """

    def __init__(self, arguments: Sequence[str], output: Path, before: Callable[[], object] = lambda: None) -> None:
        self.output, self.code = output, None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            before()
            code = main(["train", *arguments])
            sys.stdout.flush()
        finally:
            os._exit(code)

    code: int | None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = 600.0) -> int | None:
        """The exit code; None if it has not ended in time."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        return self.code

    def send(self, signum: int) -> None:
        """Sends a signal, if the process is there."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def text(self) -> str:
        """What it printed."""
        return self.output.read_text(errors="replace")


class Bench:
    """Runs of one configuration, and what an undisturbed one gives.

    Args:
        root: Where the run folders go.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for module in MODULES:
            importlib.import_module(module)
        teacher = self.start(root / "teacher", "--set", "EPOCHS = 1", "--set", "Distiller.terms = {}", "--set", "Distiller.weights = {}")
        self._expect(teacher, 0)
        self._bindings = (
            "Classification.teacher = @teacher/Network()",
            "teacher/Network.name = 'resnet8'",
            f"teacher/Network.weights = {str(root / 'teacher' / 'student.safetensors')!r}",
        )
        since = time.monotonic()
        self._expect(self.start(root / "undisturbed"), 0)
        self.seconds = time.monotonic() - since
        self.result = self.read(root / "undisturbed")

    _bindings: tuple[str, ...] = ()

    def start(self, path: Path, *options: str, before: Callable[[], object] = lambda: None) -> Process:
        """Starts the training in a folder, or goes on with it."""
        gin = [word for file in GIN for word in ("--gin", file)]
        bindings = [word for binding in (*BINDINGS, *self._bindings) for word in ("--set", binding)]
        return Process([*gin, *bindings, *options, "--output", str(path), "--no-report"], self.root / f"{path.name}.txt", before)

    def finishes_alike(self, path: Path) -> bool:
        """Goes on with a disturbed run to its end, and tells whether it gives what the undisturbed one gave."""
        process = self.start(path, "--resume")
        return process.wait() == 0 and self.read(path) == self.result

    def read(self, path: Path) -> tuple[bytes, list, dict]:
        """Student, records and results of a run, without what depends on the clock."""
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        results = json.loads((path / "results.json").read_text())
        records, results = [_timeless(line) for line in lines], _timeless(results)
        return (path / "student.safetensors").read_bytes(), records, results

    def _expect(self, process: Process, code: int) -> None:
        if process.wait() != code:
            raise RuntimeError(f"Expected the exit code {code} (got {process.code}):\n{process.text()}")


def limit_file_size(size: int) -> None:
    """Lets no file of this process grow beyond a size, as a full disk would."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _timeless(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in CLOCK}
