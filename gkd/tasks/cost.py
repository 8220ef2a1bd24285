"""What a network costs when it is used: parameters, operations and time for one image."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gkd.engine.folder import count_parameters
from gkd.models.modes import evaluating

WARM_UP, RUNS = 3, 15
SECONDS = 3.0  # after which no further run is timed


def measure_cost(network: nn.Module, predict: Callable[[Any], Any], images: Any) -> dict[str, float | None]:
    """Parameters, floating point operations and milliseconds of one prediction.

    A multiplication and an addition count as two operations. The time is the median over some runs, on the device where the images are.

    Args:
        network: What predicts.
        predict: Called with the images.
        images: One image, as the network takes a batch of one.

    Returns:
        ``parameters``, ``flops`` and ``latency_ms``; the last two are None where they cannot be measured.
    """
    cost: dict[str, float | None] = {"parameters": count_parameters(network), "flops": None, "latency_ms": None}
    try:
        with torch.no_grad(), evaluating(network):
            with FlopCounterMode(display=False) as counter:
                predict(images)
            cost["flops"] = counter.get_total_flops()
            cost["latency_ms"] = 1000.0 * _median_seconds(lambda: predict(images))
    except Exception as error:  # the results of a training do not depend on it
        warnings.warn(f"The cost of {type(network).__name__} was not measured: {error}", stacklevel=2)
    return cost


def _median_seconds(work: Callable[[], object]) -> float:
    times: list[float] = []
    begin = time.perf_counter()
    for number in range(WARM_UP + RUNS):
        if times and time.perf_counter() - begin > SECONDS:
            break
        since = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= WARM_UP or time.perf_counter() - begin > SECONDS:
            times.append(time.perf_counter() - since)
    return statistics.median(times)
