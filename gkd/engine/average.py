"""A running average of the student's weights, which is evaluated and exported in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gkd.engine.checks import check_number

PREFIX = "module."  # of the averaged tensors in the state of an AveragedModel


@dataclass(frozen=True)
class EMA:
    r"""Averages weights and running statistics exponentially.

    .. math:: \bar\theta \leftarrow d\, \bar\theta + (1 - d)\, \theta

    Args:
        decay: Share d of the average that a step keeps. 1 / (1 - d) steps are about what it remembers.

    References:
        Polyak, Juditsky: Acceleration of Stochastic Approximation by Averaging, 1992.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        check_number("decay", self.decay, least=0, below=1)

    def __call__(self, student: nn.Module) -> Average:
        """The average of a student, which starts with its weights after the first step."""
        return Average(student, AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(self.decay), use_buffers=True))


class Average:
    """The average of a student on its way.

    Args:
        student: The network that is trained.
        averaged: Its average.
    """

    def __init__(self, student: nn.Module, averaged: AveragedModel) -> None:
        self.student, self.averaged = student, averaged

    def update(self) -> None:
        """Takes the weights after a step into the average."""
        self.averaged.update_parameters(self.student)

    @torch.no_grad()
    def apply(self) -> None:
        """Gives the student the averaged weights."""
        for tensor, mean in zip(_tensors(self.student), _tensors(self.averaged.module), strict=True):
            tensor.copy_(mean)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the student has the averaged weights; afterwards its own again."""
        trained = [tensor.detach().clone() for tensor in _tensors(self.student)]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, weights in zip(_tensors(self.student), trained, strict=True):
                    tensor.copy_(weights)

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of steps in it."""
        return self.averaged.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.averaged.load_state_dict(state)


def load_average(student: nn.Module, state: Mapping[str, Any]) -> None:
    """Gives a student the averaged weights of a checkpoint.

    Args:
        student: The network.
        state: What `Average.state_dict` gave.
    """
    student.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)})


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
