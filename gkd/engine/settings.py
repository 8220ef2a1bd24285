"""How a training goes, whatever is trained: its length, optimiser and precision, and the machine it runs on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from inspect import signature
from typing import Any, Literal, get_args

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gkd.engine.average import EMA
from gkd.engine.callbacks import EarlyStopping
from gkd.engine.checks import check_flag, check_integer, check_number
from gkd.engine.log import say
from gkd.engine.loggers import MakeLogger, TensorBoardLogger
from gkd.engine.optim import SGD, Flat, LRSchedule
from gkd.errors import UserError

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class Autocast(MixedPrecision):
    """Autocast that leaves the inputs in float32: a teacher normalises its images before anything is rounded."""

    def convert_input(self, data: Any) -> Any:
        """Returns the data as they are."""
        return data


class Settings:
    """The settings of a training, and the processes and devices that carry it out.

    Args:
        epochs: Length of the training.
        steps: Length in optimiser steps, where that is how the recipe counts; replaces `epochs`.
        optimizer: Called with the module; `SGD` or `AdamW`.
        schedule: Factor of the learning rate as a function of the step.
        precision: ``'32-true'``, ``'bf16-mixed'`` or ``'16-mixed'`` (with loss scaling, which waits for the device every step).
        device: ``'auto'`` (a GPU where there is one), ``'cpu'``, ``'cuda'`` or ``'cuda:1'``.
        accumulate: Parts into which each batch is cut, one after the other, where it does not fit into memory. The gradient is that of the
            whole batch, but batch norm and terms between samples see one part at a time.
        clip_norm: Largest norm of the gradient.
        channels_last: Memory format of the module and its images.
        compile: True, or a mode of `torch.compile`.
        cudnn_benchmark: Let cuDNN try its convolutions for every new size of images and keep the fastest; None: unless the task says that
            their sizes vary, as `Detection` does.
        log_every: Steps between two records.
        evaluate_every: Epochs between two evaluations; the last step is always followed by one.
        checkpoint_every: Steps between two checkpoints, besides the one after each evaluation.
        max_steps: Stop after this step with a checkpoint, to go on later. The schedule keeps the full length.
        loggers: Where records go beside metrics.jsonl: any of `TensorBoardLogger`, `CSVLogger`, `WandbLogger` and `MLFlowLogger`; None is
            TensorBoard, and an empty list nothing.
        callbacks: Objects with the methods of `Callback`, or some of them.
        ema: Average of the weights that is evaluated and exported in their place.
        early_stopping: When to end before the last step.
        dry_pass: Try every term and every evaluation on one batch before the first step, and evaluate the teacher.
        check_teacher: Refuse, in that pass, a teacher that is no better than guessing.
        find_unused_parameters: For several processes: look in every step for parameters that the losses do not reach. The distiller
            leaves none.
    """

    def __init__(
        self,
        epochs: float = 1,
        steps: int | None = None,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        schedule: LRSchedule | None = None,
        precision: Precision = "32-true",
        device: str = "auto",
        accumulate: int = 1,
        clip_norm: float | None = None,
        channels_last: bool = False,
        compile: bool | str = False,
        cudnn_benchmark: bool | None = None,
        log_every: int = 50,
        evaluate_every: float = 1,
        checkpoint_every: int | None = None,
        max_steps: int | None = None,
        loggers: Sequence[MakeLogger] | None = None,
        callbacks: Sequence[Any] = (),
        ema: EMA | None = None,
        early_stopping: EarlyStopping | None = None,
        dry_pass: bool = True,
        check_teacher: bool = True,
        find_unused_parameters: bool = False,
    ) -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"Expected the precision {', '.join(map(repr, get_args(Precision)))} (got {precision!r})")
        check_number("epochs", epochs, above=0)
        check_number("evaluate_every", evaluate_every, above=0)
        check_number("clip_norm", clip_norm, above=0, optional=True)
        check_integer("accumulate", accumulate, least=1)
        check_integer("log_every", log_every, least=1)
        for name, count in (("steps", steps), ("checkpoint_every", checkpoint_every), ("max_steps", max_steps)):
            check_integer(name, count, least=1, optional=True)
        flags = {
            "channels_last": channels_last,
            "dry_pass": dry_pass,
            "check_teacher": check_teacher,
            "find_unused_parameters": find_unused_parameters,
        }
        if cudnn_benchmark is not None:
            flags["cudnn_benchmark"] = cudnn_benchmark
        for name, flag in flags.items():
            check_flag(name, flag)
        for name, members in (("loggers", loggers or ()), ("callbacks", callbacks)):
            if isinstance(members, str) or not isinstance(members, Sequence):
                raise ValueError(f"Expected {name} to be a list (got {members!r})")
        if not isinstance(compile, bool) and compile not in COMPILE_MODES:
            raise ValueError(f"Expected compile to be True, False or one of {', '.join(COMPILE_MODES)} (got {compile!r})")
        self.epochs, self.steps = epochs, steps
        self.optimizer = SGD() if optimizer is None else optimizer
        self.schedule = Flat() if schedule is None else schedule
        self.precision, self.accumulate, self.clip_norm = precision, accumulate, clip_norm
        self.channels_last, self.compile, self.cudnn_benchmark = channels_last, compile, cudnn_benchmark
        self.log_every, self.evaluate_every = log_every, evaluate_every
        self.checkpoint_every, self.max_steps = checkpoint_every, max_steps
        self.loggers = (TensorBoardLogger(),) if loggers is None else tuple(loggers)
        self.callbacks, self.ema, self.early_stopping = tuple(callbacks), ema, early_stopping
        self.dry_pass, self.check_teacher, self.find_unused_parameters = dry_pass, check_teacher, find_unused_parameters
        self._accelerator, self._index = resolve_device(device)
        self.autocast = None if precision == "32-true" else Autocast(precision, self._accelerator)

    @cached_property
    def fabric(self) -> Fabric:
        """The processes and their devices; made, and under `torchrun` connected, when first asked for."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        world = int(os.environ.get("WORLD_SIZE", "1"))
        # Buffers stay each process's own (a memory of samples must not be overwritten); the evaluator takes care of running statistics.
        buffers = next(
            name for name in ("forward_sync_buffers", "broadcast_buffers") if name in signature(DistributedDataParallel).parameters
        )
        options: dict[str, Any] = {"find_unused_parameters": self.find_unused_parameters, buffers: False}
        strategy = "auto" if world == 1 else DDPStrategy(**options)
        fabric = Fabric(
            accelerator=self._accelerator,
            devices=local if self._index is None else [self._index],
            num_nodes=max(1, world // local),
            strategy=strategy,
            plugins=self.autocast,
            callbacks=list(self.callbacks),
        )
        fabric.launch()
        return fabric

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.fabric.device

    def say(self, text: str) -> None:
        """Prints a line on the first process."""
        if self.fabric.is_global_zero:
            say(text)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Length of the training in optimiser steps."""
        return max(1, round(self.epochs * steps_per_epoch)) if self.steps is None else self.steps


def resolve_device(device: str) -> tuple[str, int | None]:
    """Accelerator and, where one is named, the index of the device.

    Raises:
        UserError: If there is no such device.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
        raise UserError(f"Expected the device 'auto', 'cpu', 'cuda' or 'cuda:N' (got {device!r}). Check --device.")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("Expected a CUDA device (got none that torch can see). Use --device cpu, or install a CUDA build of torch.")
    if index and int(index) >= torch.cuda.device_count():
        raise UserError(f"Expected one of {torch.cuda.device_count()} CUDA devices, counted from 0 (got {device!r}). Check --device.")
    return kind, int(index) if index else None
