"""A dry pass before the training: what would fail after hours fails in the first seconds."""

from __future__ import annotations

import copy
import itertools
import traceback
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gkd.distill import Distiller
from gkd.engine import NonFiniteLossError
from gkd.engine.checkpoint import rng_state, set_rng_state
from gkd.engine.loop import split_batch
from gkd.errors import UserError, is_out_of_memory
from gkd.models.weights import broken_weights

if TYPE_CHECKING:
    from gkd.tasks.task import Task

MOST_LOOKS = 4000


def dry_pass(task: Task) -> None:
    """Tries all that a training will do, and leaves no trace: no weight, statistic, memory or random number of the run changes.

    The files of the data are looked for. Every term, also one that a ramp switches on later, sees one batch, forward and backward, on
    a copy of the networks. The student is evaluated on one batch of every split, and the teacher on all test images.

    Args:
        task: What is about to be trained.

    Raises:
        UserError: If a file is absent, or the teacher is no better than guessing.
        NonFiniteLossError: If a loss or a gradient is NaN or infinite.
    """
    check_files: Any = getattr(task.data, "check_files", None)
    if check_files is not None:
        check_files()
    random_state = rng_state(task.trainer.device)
    try:
        if task.teacher is not None and task.trainer.check_teacher:
            check_weights(task.teacher)
        try_losses(task)
        for split in dict.fromkeys((*task.splits, "test")):
            task.judge("student", split, partial(_first_batch, task, split))
        if task.teacher is not None:
            judge_teacher(task)
    finally:
        set_rng_state(random_state, task.trainer.device)


def check_weights(teacher: nn.Module) -> None:
    """Refuses a teacher with weights that `load_weights` would refuse in a file: NaN, or infinity in a parameter.

    Raises:
        UserError: If there are some.
    """
    bad = broken_weights(teacher, dict(itertools.chain(teacher.named_parameters(), teacher.named_buffers())))
    if bad:
        raise UserError(f"Expected finite weights of the teacher (got NaN or infinity in {', '.join(bad[:3])}). Use another file.")


def judge_teacher(task: Task) -> None:
    """Evaluates the teacher on the test images and says how good it is.

    Raises:
        UserError: If it is no better than guessing, and `Trainer.check_teacher` asks for more.
    """
    record = task.teacher_record()
    if record is None:
        return
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if isinstance(value, float | int) and "/" not in name)
    task.trainer.say(f"The teacher on the test images: {numbers}")
    score = record.get(task.score)
    if task.trainer.check_teacher and (score is None or not score > task.chance):
        raise UserError(
            f"Expected a teacher that is better than guessing, which gives a {task.score} of up to {task.chance:.4g} (got {score}). "
            "Check its weights, its classes and its normalisation, or set Trainer.check_teacher = False."
        )


def try_losses(task: Task) -> None:
    """One forward and backward pass for every set of terms that the training will have active.

    Raises:
        UserError: If a network or a term fails, as one does that was bound where another kind is meant.
        NonFiniteLossError: If a loss or a gradient is NaN or infinite.
    """
    fabric = task.trainer.fabric
    batch, *_ = split_batch(fabric.to_device(next(iter(task.train_batches(epoch=0)))), task.trainer.accumulate)
    distiller = copy.deepcopy(task.distiller).train()
    for epoch in first_epochs(distiller, task.trainer.total_steps(task.steps_per_epoch), task.steps_per_epoch):
        distiller.progress(epoch)
        try:
            with fabric.autocast():
                losses = distiller(*batch)
            torch.stack([loss.float() for loss in losses.values()]).sum().backward()
        except (TypeError, AttributeError, LookupError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"Expected the networks and all terms to take a step on one batch (got {type(error).__name__} in "
                f"{_place(error, distiller)}: {error}). Check what is bound there; --debug shows more."
            ) from error
        gradients = {name: parameter.grad for name, parameter in distiller.named_parameters() if parameter.grad is not None}
        for what, tensors in (("losses", losses), ("gradients", gradients)):
            bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
            if bad:
                raise NonFiniteLossError(
                    f"Expected finite {what} before the first step (got NaN or infinity in {', '.join(bad[:3])}, "
                    f"with the weights of epoch {epoch + 1:g}, {task.describe(batch)}). Check the student's weights and the images."
                )
        distiller.zero_grad(set_to_none=True)


def _place(error: BaseException, distiller: Distiller) -> str:
    """The innermost part of the distiller, or of a term, that an error came from."""
    names = {id(module): name for name, module in distiller.named_modules()}
    place: nn.Module = distiller
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        place = module if isinstance(module, nn.Module) else place
    name = names.get(id(place), "")
    return f"{type(place).__name__} ({name})" if name else type(place).__name__


def first_epochs(distiller: Distiller, steps: int, steps_per_epoch: int) -> Iterator[float]:
    """The epochs, counted from 0, at which terms are active for the first time; 0 is always one of them.

    Looked at are the beginning and the middle of every epoch, or of some thousand in a longer training, and the last step.

    Args:
        distiller: Knows the weights at an epoch.
        steps: Length of the training.
        steps_per_epoch: Steps in an epoch.
    """
    seen: set[str] = set()
    count = -(-2 * steps // steps_per_epoch)
    halves = (half / 2 for half in range(0, count, max(1, count // MOST_LOOKS)))
    for number, epoch in enumerate((*halves, (steps - 1) / steps_per_epoch)):
        distiller.progress(epoch)
        active = {name for name, weight in distiller.weights.items() if weight != 0}
        if number == 0 or not active <= seen:
            seen |= active
            yield epoch


def _first_batch(task: Task, split: str) -> Iterator[tuple]:
    yield from itertools.islice(task.eval_batches(split), 1)


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())
