"""A KD step of mdistiller beside ours, in turns in one process: MDISTILLER names a checkout of https://github.com/megvii-research/mdistiller."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import Run, machine, time_in_turns, write_json
from steps import StepBenchmark, training_step

from gkd.errors import UserError

__all__ = ["RivalBenchmark"]

ROW = "mdistiller, KD"


def mdistiller_step(teacher: str, student: str, num_classes: int, batch_size: int, device: str) -> Run:
    """A function that takes a KD step as mdistiller's trainer does, in float32."""
    checkout = os.environ.get("MDISTILLER", "")
    if not (Path(checkout) / "mdistiller").is_dir():
        raise UserError(
            f"Expected MDISTILLER=/path/to/a/checkout that holds the package mdistiller (got '{os.environ.get('MDISTILLER', '')}')"
        )
    sys.path.insert(0, checkout)
    try:
        from mdistiller.distillers import distiller_dict
        from mdistiller.engine.cfg import CFG
        from mdistiller.models import cifar_model_dict
    except ImportError as error:
        raise UserError(f"Expected the packages that mdistiller imports (got: {error}). Install them.") from error
    networks = [cifar_model_dict[name][0](num_classes=num_classes) for name in (student, teacher)]
    distiller = distiller_dict["KD"](*networks, CFG).to(device).train()
    optimizer = torch.optim.SGD(distiller.get_learnable_parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    images, targets = torch.randn(batch_size, 3, 32, 32, device=device), torch.arange(batch_size, device=device) % num_classes

    def run() -> None:
        optimizer.zero_grad()
        _, losses = distiller(image=images, target=targets, epoch=1)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    return run


@dataclass(frozen=True)
class RivalBenchmark(StepBenchmark):
    """Times our steps and mdistiller's in turns.

    Args:
        student: Name of the student in the pair.
    """

    student: str = "resnet8x4"
    output: str | None = "runs/benchmark/rival.json"

    def run(self) -> dict[str, Any]:
        """Prints milliseconds and ratios, and writes the JSON file.

        Returns:
            ``machine``, ``options`` and ``ms`` by row.
        """
        with self.prepared() as rows:
            runs = {name: training_step(*row)[0] for name, row in rows.items()}
            runs[ROW] = mdistiller_step(self.teacher, self.student, self.num_classes, self.batch_size, self.device)
            ms = {name: 1000 * seconds for name, seconds in time_in_turns(runs, self.repeats, self.device).items()}
        for name, value in ms.items():
            print(f"{name:28} {value:9.1f} ms {ms[ROW] / value:6.2f}x as fast as mdistiller")
        result = {"machine": machine(self.device, self.threads), "options": asdict(self), "ms": ms}
        write_json(result, self.output)
        return result
