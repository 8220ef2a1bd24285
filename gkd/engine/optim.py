"""Optimisers, and learning rates that are pure functions of the step: there is no scheduler state to save or to restore."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from gkd.engine.checks import check_flag, check_number

Unit = Literal["epoch", "step"]


class LRSchedule(Protocol):
    """What the trainer multiplies the base learning rate with at a step."""

    def __call__(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """Factor for the optimiser step number `step`, counted from 0."""


def warmup_factor(step: int, warmup_steps: float, start: float = 0.0) -> float:
    """Linear from `start` at step 0 to 1 at `warmup_steps`, then 1.

    Examples:
        >>> [warmup_factor(step, 4) for step in (0, 1, 2, 4, 9)]
        [0.0, 0.25, 0.5, 1.0, 1.0]
    """
    if step >= warmup_steps:
        return 1.0
    return start + (1.0 - start) * step / warmup_steps


@dataclass(frozen=True)
class Flat:
    """The base learning rate throughout, after a linear warm-up where asked.

    Args:
        warmup: Length of the warm-up, in `unit`.
        warmup_start: Factor at step 0 of the warm-up.
        unit: Whether lengths are given in epochs or in steps.
    """

    warmup: float = 0.0
    warmup_start: float = 0.0
    unit: Unit = "epoch"

    def __post_init__(self) -> None:
        _check_warmup(self.warmup, self.warmup_start, self.unit)

    def __call__(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """Factor at `step`."""
        return warmup_factor(step, self.warmup * _steps_per(self.unit, steps_per_epoch), self.warmup_start)


@dataclass(frozen=True)
class MultiStep:
    """Multiplies the learning rate by `factor` at every milestone.

    Args:
        milestones: When to lower it, ascending, in `unit`.
        factor: What each milestone multiplies with.
        warmup: Length of a linear warm-up, in `unit`.
        warmup_start: Factor at step 0 of the warm-up.
        unit: Whether milestones and warm-up are given in epochs or in steps.

    Examples:
        >>> crd = MultiStep(milestones=(150, 180, 210))
        >>> [round(crd(epoch * 782, 240 * 782, 782), 4) for epoch in (0, 149, 150, 180, 239)]
        [1.0, 1.0, 0.1, 0.01, 0.001]
    """

    milestones: Sequence[float]
    factor: float = 0.1
    warmup: float = 0.0
    warmup_start: float = 0.0
    unit: Unit = "epoch"

    def __post_init__(self) -> None:
        _check_warmup(self.warmup, self.warmup_start, self.unit)
        check_number("factor", self.factor, least=0)
        for milestone in self.milestones:
            check_number("a milestone", milestone, least=0)
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"Expected milestones in ascending order (got {list(self.milestones)})")

    def __call__(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """Factor at `step`."""
        per_unit = _steps_per(self.unit, steps_per_epoch)
        passed = sum(step >= milestone * per_unit for milestone in self.milestones)
        return self.factor**passed * warmup_factor(step, self.warmup * per_unit, self.warmup_start)


@dataclass(frozen=True)
class Cosine:
    r"""Half a cosine from 1 down to `final`, after a linear warm-up where asked.

    .. math:: f + \tfrac{1 - f}{2} \left(1 + \cos \pi \tfrac{step - warmup}{total - warmup}\right)

    Args:
        final: Factor f that the last step approaches.
        warmup: Length of the warm-up, in `unit`.
        warmup_start: Factor at step 0 of the warm-up.
        unit: Whether the warm-up is given in epochs or in steps.
    """

    final: float = 0.0
    warmup: float = 0.0
    warmup_start: float = 0.0
    unit: Unit = "epoch"

    def __post_init__(self) -> None:
        _check_warmup(self.warmup, self.warmup_start, self.unit)
        check_number("final", self.final, least=0, most=1)

    def __call__(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """Factor at `step`."""
        warmup = self.warmup * _steps_per(self.unit, steps_per_epoch)
        if step < warmup:
            return warmup_factor(step, warmup, self.warmup_start)
        done = min(1.0, (step - warmup) / max(1.0, total_steps - warmup))
        return _cosine(1.0, self.final, done)


@dataclass(frozen=True)
class OneCycle:
    """Cosine rise to the base learning rate, then a cosine fall to almost nothing: the short-budget schedule.

    The optimiser's `lr` is the peak. The momentum is not cycled.

    Args:
        rise: Share of the steps that rise.
        start: Factor at step 0.
        final: Factor at the last step.

    References:
        Smith, Topin: Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates, 2018.
    """

    rise: float = 0.3
    start: float = 1.0 / 25.0
    final: float = 1.0 / 25.0e4

    def __post_init__(self) -> None:
        check_number("rise", self.rise, above=0, below=1)
        check_number("start", self.start, least=0, most=1)
        check_number("final", self.final, least=0, most=1)

    def __call__(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """Factor at `step`."""
        peak, last = self.rise * total_steps - 1.0, total_steps - 1.0
        if step < peak:
            return _cosine(self.start, 1.0, step / peak)
        return _cosine(1.0, self.final, min(1.0, (step - peak) / max(1.0, last - peak)))


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum; call it with a module to get the optimiser.

    Args:
        lr: Base learning rate, which the schedule multiplies.
        momentum: Momentum.
        weight_decay: Weight decay.
        nesterov: Nesterov's momentum.
        decay_norm_and_bias: Whether vectors (norm scales and shifts, biases) decay too, as they do in the CRD recipe.
    """

    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    decay_norm_and_bias: bool = True

    def __post_init__(self) -> None:
        check_number("lr", self.lr, above=0)
        check_number("momentum", self.momentum, least=0, below=1)
        check_number("weight_decay", self.weight_decay, least=0)
        check_flag("nesterov", self.nesterov)
        check_flag("decay_norm_and_bias", self.decay_norm_and_bias)
        if self.nesterov and self.momentum == 0:
            raise ValueError("Expected a momentum above 0 for nesterov = True (got 0)")

    def __call__(self, module: nn.Module) -> torch.optim.Optimizer:
        """Optimiser of the parameters of `module` that require a gradient."""
        groups = parameter_groups(module, self.weight_decay, self.decay_norm_and_bias)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay; call it with a module to get the optimiser.

    Args:
        lr: Base learning rate, which the schedule multiplies.
        betas: Decay rates of the two moments.
        weight_decay: Weight decay.
        decay_norm_and_bias: Whether vectors (norm scales and shifts, biases) decay too.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    decay_norm_and_bias: bool = False

    def __post_init__(self) -> None:
        check_number("lr", self.lr, above=0)
        check_number("weight_decay", self.weight_decay, least=0)
        check_flag("decay_norm_and_bias", self.decay_norm_and_bias)
        if len(self.betas) != 2:
            raise ValueError(f"Expected betas to be two numbers (got {self.betas!r})")
        for beta in self.betas:
            check_number("a beta", beta, least=0, below=1)

    def __call__(self, module: nn.Module) -> torch.optim.Optimizer:
        """Optimiser of the parameters of `module` that require a gradient."""
        groups = parameter_groups(module, self.weight_decay, self.decay_norm_and_bias)
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]))


def parameter_groups(module: nn.Module, weight_decay: float, decay_norm_and_bias: bool = True) -> list[dict]:
    """Parameters that require a gradient, in one group, or vectors and scalars in a second group without weight decay.

    Raises:
        ValueError: If no parameter requires a gradient.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(f"Expected at least one parameter that requires a gradient (got none in {type(module).__name__})")
    if decay_norm_and_bias:
        return [{"params": parameters, "weight_decay": weight_decay}]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))


def _steps_per(unit: Unit, steps_per_epoch: int) -> int:
    return steps_per_epoch if unit == "epoch" else 1


def _check_warmup(warmup: float, start: float, unit: str) -> None:
    check_number("warmup", warmup, least=0)
    check_number("warmup_start", start, least=0, most=1)
    if unit not in ("epoch", "step"):
        raise ValueError(f"Expected the unit 'epoch' or 'step' (got {unit!r})")
