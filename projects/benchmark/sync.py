"""Whether a training step waits for the GPU, which then has nothing to do while the host prepares the next operators."""

from __future__ import annotations

import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import Run, machine, write_json
from steps import StepBenchmark, training_step

__all__ = ["SyncCheck"]

WARM_UP = 2  # steps in which libraries start up and index tensors are made that are kept


def wait_of(run: Run, device: str) -> str | None:
    """The line of gkd, or else of torch, at which a run waits for the device, with torch's words; None where it does not."""
    for _ in range(WARM_UP):
        run()
    if torch.device(device).type != "cuda":
        run()
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((frame for frame in reversed(frames) if "gkd" in Path(frame.filename).parts), frames[-1])
        return f"{frame.filename}:{frame.lineno}: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


@dataclass(frozen=True)
class SyncCheck(StepBenchmark):
    """Takes a step of each method under ``torch.cuda.set_sync_debug_mode('error')``; the arguments are those of `StepBenchmark`."""

    output: str | None = "runs/benchmark/sync.json"

    def run(self) -> dict[str, Any]:
        """Prints and writes the lines that wait.

        Returns:
            ``machine``, ``options`` and ``waits``: the line by method, None where there is none.
        """
        with self.prepared() as rows:
            waits = {name: wait_of(training_step(*row)[0], self.device) for name, row in rows.items()}
        result = {"machine": machine(self.device, self.threads), "options": asdict(self), "waits": waits}
        for name, line in waits.items():
            print(f"{name}: {line or 'waits for nothing'}")
        write_json(result, self.output)
        return result
