"""What a training step costs with every method, beside KD and the cheapest possible; what CRD's negatives cost, beside the usual way."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from measure import machine, time_in_turns, write_json
from steps import StepBenchmark, table

from gkd.losses import sample_negatives

__all__ = ["MethodBenchmark"]


def time_sampler(num_samples: int, num_classes: int, num_negatives: int, batch_size: int, repeats: int) -> dict[str, float]:
    """Milliseconds for the negatives of a batch on the CPU: one draw, and a draw of NumPy's for every image from the other classes."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(num_samples) % num_classes
    index = torch.randperm(num_samples, generator=generator)[:batch_size]
    others = [np.flatnonzero(targets.numpy() != label) for label in range(num_classes)]

    def one_by_one() -> None:
        drawn = [np.random.choice(others[label], num_negatives, replace=False) for label in targets[index].tolist()]  # noqa: NPY002  as published
        torch.from_numpy(np.stack(drawn))

    runs = {"gkd": lambda: sample_negatives(num_samples, num_negatives, index, targets), "numpy.random.choice": one_by_one}
    return {name: 1000 * seconds for name, seconds in time_in_turns(runs, repeats, "cpu").items()}


@dataclass(frozen=True)
class MethodBenchmark(StepBenchmark):
    """Times a step of each method, as `StepBenchmark` does, and CRD's sampler.

    Args:
        num_samples: Images of the data set that the sampler draws from.
        num_negatives: How many it draws.
    """

    num_samples: int = 50000
    num_negatives: int = 16384
    output: str | None = "runs/benchmark/methods.json"

    def run(self) -> dict[str, Any]:
        """Measures, prints the table and writes the JSON file.

        Returns:
            As of `StepBenchmark`, and ``sampler``: milliseconds by name.
        """
        torch.set_num_threads(self.threads)
        sampler = time_sampler(self.num_samples, self.num_classes, self.num_negatives, self.batch_size, self.repeats)
        result = {"machine": machine(self.device, self.threads), "options": asdict(self), "rows": self.measure(), "sampler": sampler}
        print(table(result))
        own, usual = sampler.values()
        print(
            f"CRD's negatives, {self.num_negatives} of {self.num_samples} for {self.batch_size} images: one draw {own:.2f} ms, "
            f"numpy.random.choice image by image {usual:.1f} ms, {usual / own:.0f}x"
        )
        write_json(result, self.output)
        return result
