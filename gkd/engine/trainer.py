"""The trainer: settings, and `fit`, which trains a task by them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from gkd.engine.folder import RunFolder
from gkd.engine.loop import Loop
from gkd.engine.position import Summary
from gkd.engine.settings import Settings
from gkd.engine.trainable import Trainable


class Trainer(Settings):
    """Trains a task on the CPU, a GPU, or several of either by `torchrun`.

    No step waits for the device: sums stay there and are read every `log_every` steps. The arguments are those of `Settings`.
    """

    def fit(self, task: Trainable, folder: RunFolder | None = None, resume: bool = False, config: str | None = None) -> Summary:
        """Trains to the end, or to `max_steps`.

        Args:
            task: What is trained, on what, and how it is judged.
            folder: Where records and checkpoints go; None keeps nothing.
            resume: Go on from the folder's last checkpoint; from the start where it holds none.
            config: Operative configuration, written to the folder once the checkpoint has turned out to fit it.

        Raises:
            NonFiniteLossError: If a loss is NaN or infinite.
            Interrupted: If a signal asked to stop; the checkpoint is written.
            UserError: If the checkpoint does not fit, or another process writes to the folder.
        """
        loop = Loop(self, task, folder)
        if folder is None or not self.fabric.is_global_zero:
            lock: AbstractContextManager[object] = nullcontext()
        else:
            folder.path.mkdir(parents=True, exist_ok=True)
            lock = folder.lock
        with lock:
            if resume:
                loop.restore()
            if config is not None and folder is not None and self.fabric.is_global_zero:
                folder.write_config(config)
            return loop.run()
