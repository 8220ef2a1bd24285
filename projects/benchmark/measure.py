"""How the benchmarks measure: warm-up, turns, medians, peak memory in a process of its own, and the machine named."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch_geometric

Run = Callable[[], Any]

_REST = 0.1  # seconds before a turn: the BLAS threads of the one before, SciPy's for instance, spin that long while they wait for more
_TURN = 0.2  # seconds that a turn lasts at least


def timed(run: Run, device: str) -> float:
    """Seconds of one run: device events on a GPU, the wall clock otherwise."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def time_in_turns(runs: Mapping[str, Run], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each after one warm-up; taking turns, so that whatever slows the machine slows all.

    Short runs are repeated in a turn, all of which count: one alone would measure how fast the cores wake up.
    """
    keep_memory()
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            time.sleep(_REST)
            end = time.perf_counter() + _TURN
            while time.perf_counter() < end:
                seconds[name].append(timed(run, device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def keep_memory() -> None:
    """Lets glibc keep what is freed, as other allocators do: what the kernel takes to hand out pages anew differs by machine and moment."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(parameter, value)


def peak_memory(run: Run, device: str) -> float:
    """MiB that one run needs at its peak beyond what was there before; call it in a process of its own."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with suppress(OSError):  # Linux: forget the peak so far
        Path("/proc/self/clear_refs").write_text("5")
    kib = 1 if platform.system() == "Linux" else 1024  # macOS counts bytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / kib / 1024


def in_child(function: Callable[..., float], *arguments: Any, preload: tuple[str, ...] = ()) -> float:
    """Calls a function in a child process that does nothing else."""
    context = multiprocessing.get_context("forkserver" if platform.system() == "Linux" else "spawn")
    context.set_forkserver_preload(list(preload))
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    named = {"cpu": cpu, "threads": threads, "python": platform.python_version()}
    if torch.device(device).type == "cuda":
        named["gpu"] = torch.cuda.get_device_name(device)
    return {**named, "torch": torch.__version__, "torch_geometric": torch_geometric.__version__}


def write_json(result: Mapping[str, Any], output: str | None) -> None:
    """Writes a result; None writes none."""
    if output is not None:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
