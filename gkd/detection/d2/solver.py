"""Optimiser and learning rates as a Detectron2 configuration asks for them, in the words of gkd's trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from gkd.detection.d2.config import is_lazy, read_config, update_config
from gkd.errors import UserError


@dataclass(frozen=True)
class Detectron2Optimizer:
    """The optimiser of a configuration's ``SOLVER``, with its weight decays, bias factor and gradient clipping.

    For ``Trainer.optimizer``. The number of images in a step is the trainer's.

    Args:
        config: A YAML configuration, by file or model-zoo name.
        options: ``'SOLVER.NAME': value`` to change.
    """

    config: str = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, module: nn.Module) -> torch.optim.Optimizer:
        """Optimiser of the parameters of `module` that require a gradient."""
        from detectron2.solver import build_optimizer

        return build_optimizer(_solver(self.config, tuple(self.options.items())), module)


@dataclass(frozen=True)
class Detectron2Schedule:
    """The learning rates of a configuration's ``SOLVER``: warm-up and steps, or a cosine.

    For ``Trainer.schedule``. ``SOLVER.MAX_ITER`` is the length that the trainer has; where it differs from the configuration's, the
    milestones stay at their share of the training with ``rescale``, or at their iterations without.

    Args:
        config: A YAML configuration, by file or model-zoo name.
        options: ``'SOLVER.NAME': value`` to change.
        rescale: Move the milestones along with the length.
    """

    config: str = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    options: Mapping[str, Any] = field(default_factory=dict)
    rescale: bool = True

    def __call__(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """Factor at `step`."""
        scheduler = _scheduler(self.config, tuple(self.options.items()), self.rescale, total_steps)
        scheduler.last_epoch = step
        return float(scheduler.get_lr()[0])


def _solver(config: str, options: tuple[tuple[str, Any], ...]) -> Any:
    read = read_config(config)
    if is_lazy(read):
        raise UserError(
            f"Expected a YAML configuration with a SOLVER (got the LazyConfig {config}). Use gkd's SGD or AdamW, and MultiStep."
        )
    update_config(read, dict(options))
    return read


@lru_cache(maxsize=8)
def _scheduler(config: str, options: tuple[tuple[str, Any], ...], rescale: bool, total_steps: int) -> Any:
    from detectron2.solver import build_lr_scheduler

    read = _solver(config, options)
    solver = read.SOLVER
    scale = total_steps / solver.MAX_ITER if rescale else 1.0
    # Detectron2 takes no two milestones at once, nor one at the end, as a few steps would have them.
    solver.STEPS = tuple(sorted({step for step in (round(milestone * scale) for milestone in solver.STEPS) if 0 < step < total_steps}))
    solver.MAX_ITER = total_steps
    # A learning rate of 1, so that what comes out is the factor.
    return build_lr_scheduler(read, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))
