"""One training on its way: steps, records, evaluations, checkpoints, and the exact continuation of all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gkd.engine.checkpoint import rng_state, save_checkpoint, set_rng_state
from gkd.engine.folder import RunFolder
from gkd.engine.interrupt import Agreement, Interrupted, Interrupts
from gkd.engine.position import Clock, Summary
from gkd.engine.records import Records
from gkd.engine.settings import Settings
from gkd.engine.state import TrainingState
from gkd.engine.trainable import Trainable


class NonFiniteLossError(ArithmeticError):
    """A loss became NaN or infinite; the message names the step, the terms and the samples."""


class Loop:
    """The loop behind `Trainer.fit`, which documents the arguments."""

    def __init__(self, settings: Settings, task: Trainable, folder: RunFolder | None) -> None:
        self.settings, self.fabric, self.task, self.folder = settings, settings.fabric, task, folder
        self.model, self.steps_per_epoch, self.device = task.distiller, task.steps_per_epoch, self.fabric.device
        model, steps_per_epoch = self.model, self.steps_per_epoch
        if steps_per_epoch < 1:
            raise ValueError(f"Expected at least one step in an epoch (got {steps_per_epoch})")
        self.total = settings.total_steps(steps_per_epoch)
        self.evaluation_period = max(1, round(settings.evaluate_every * steps_per_epoch))

        if settings.channels_last:
            model.to(memory_format=torch.channels_last)
        self.raw_optimizer = settings.optimizer(model)
        self.base_lrs = [group["lr"] for group in self.raw_optimizer.param_groups]
        compiled = model
        if settings.compile:
            compiled = torch.compile(model, mode=settings.compile if isinstance(settings.compile, str) else None)  # type: ignore[assignment]
        self.module, self.optimizer = self.fabric.setup(compiled, self.raw_optimizer)
        vary = getattr(task, "sizes_vary", False)
        torch.backends.cudnn.benchmark = not vary if settings.cudnn_benchmark is None else settings.cudnn_benchmark

        self.average = None if settings.ema is None else settings.ema(task.student)
        self.state = TrainingState(model, self.raw_optimizer, settings.autocast, self.average, steps_per_epoch, self.device)
        self.position, self.window = self.state.position, self.state.window
        self.interrupts, self.clock = Interrupts(), Clock()
        self.records = Records(self.position, self.total, steps_per_epoch)
        self.agreement = Agreement(self.device)

    # ---------------------------------------------------------------- the loop

    def run(self) -> Summary:
        """Trains from where the position is."""
        stop = min(self.total, self.settings.max_steps or self.total)
        with self.interrupts:
            if self.fabric.is_global_zero:
                self.records.open(self.folder, self.settings.loggers)
            try:
                self.fabric.call("on_train_start", task=self.task, step=self.position.step)
                self._evaluate_if_due()  # an evaluation that an interruption came before
                self.clock.start()
                for batch in self._stream(stop):
                    self._step(batch)
                    self._after_step(stop)
                self.clock.stop()
            finally:
                self.records.close()
        summary = self._summary()
        if summary.finished and self.average is not None:
            self.average.apply()
        self.fabric.call("on_train_end", task=self.task, summary=summary)
        return summary

    def _summary(self) -> Summary:
        position = self.position
        seconds = position.seconds + self.clock.seconds
        return Summary(
            step=position.step,
            finished=position.stopped or position.step >= self.total,
            last=position.last,
            best=position.best,
            seconds=seconds,
            images_per_second=position.samples / seconds if seconds > 0 else 0.0,
        )

    def _stream(self, stop: int) -> Iterator[tuple]:
        """Batches up to step `stop`, or to an early stop; whoever takes one moves the position on."""
        while self.position.step < stop and not self.position.stopped:
            epoch, start = divmod(self.position.step, self.steps_per_epoch)
            try:
                for batch in self.task.train_batches(epoch=epoch, start=start):
                    yield batch
                    if self.position.step >= stop or self.position.step % self.steps_per_epoch == 0 or self.position.stopped:
                        break
            except RuntimeError:
                # Ctrl-C reaches the workers of a data loader too, and the next batch fails because they are gone.
                if self.interrupts.signum is None:
                    raise
                self._stop(self.interrupts.signum)
            if self.position.step < stop and self.position.step % self.steps_per_epoch and not self.position.stopped:
                given = self.position.step - epoch * self.steps_per_epoch
                raise ValueError(f"Expected {self.steps_per_epoch} batches in epoch {epoch} (got {given})")
            if self.position.step == epoch * self.steps_per_epoch + start:
                raise ValueError(f"Expected batches from step {start} of epoch {epoch} on (got none)")

    def _step(self, batch: tuple) -> None:
        step, settings = self.position.step, self.settings
        progress: Any = getattr(self.model, "progress", None)
        if progress is not None:
            progress(step / self.steps_per_epoch)
        factor = settings.schedule(step, self.total, self.steps_per_epoch)
        for group, base in zip(self.raw_optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        self.module.train()

        values: dict[str, Tensor] = {}
        parts = split_batch(self._place(batch), settings.accumulate)
        for number, part in enumerate(parts, start=1):
            with self.fabric.no_backward_sync(self.module, enabled=number < len(parts) and self.fabric.world_size > 1):
                losses = self._losses(part)
                total = torch.stack([loss.float() for loss in losses.values()]).sum()
                self.fabric.backward(total / len(parts))
            scalars = {"loss": total, **{f"loss/{name}": loss for name, loss in losses.items()}}
            scalars.update(self.task.metrics(part))
            for name, scalar in scalars.items():
                share = scalar.detach() if len(parts) == 1 else scalar.detach() / len(parts)
                values[name] = values[name] + share if name in values else share
        if settings.clip_norm is not None:
            self.fabric.clip_gradients(self.module, self.optimizer, max_norm=settings.clip_norm, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        self.position.step += 1
        self.position.samples += self.task.batch_size
        self.window.add(self.position.step, values)
        if self.average is not None:
            self.average.update()
        self.fabric.call("on_step_end", task=self.task, step=self.position.step, losses=values)

    def _losses(self, part: tuple) -> dict[str, Tensor]:
        try:
            return self.module(*part)
        except (ValueError, RuntimeError) as error:
            # Graphs refuse features that are not finite: in the middle of a training that is a divergence, not a wrong setting.
            diverged = bool(self.state.non_finite()) or (isinstance(error, ValueError) and "finite" in str(error))
            if not diverged:
                raise
            raise self._divergence(f"losses (got: {str(error).rstrip('.')}", self.position.step + 1, "the forward pass") from error

    def _after_step(self, stop: int) -> None:
        step = self.position.step
        if self.device.type == "cpu":
            self._check_finite()
        self.records.advance()
        if step % self.settings.log_every == 0 or step == self.total:
            self._log()
        signum = self.interrupts.signum or 0
        if self.fabric.world_size > 1:
            signum = self.agreement.ask(signum, step)
        if signum:
            self._stop(signum)
        if not self._evaluate_if_due():
            every = self.settings.checkpoint_every
            if step == stop or (every is not None and step % every == 0):
                self._save()

    def _place(self, batch: tuple) -> tuple:
        batch = self.fabric.to_device(batch)
        if not self.settings.channels_last:
            return batch
        return tuple(
            value.contiguous(memory_format=torch.channels_last) if isinstance(value, Tensor) and value.ndim == 4 else value
            for value in batch
        )

    # ---------------------------------------------------------------- records

    def _log(self) -> None:
        self._check_finite()
        reduce = (lambda means: self.fabric.all_reduce(means, reduce_op="mean")) if self.fabric.world_size > 1 else None
        self.records.write_means(self.window, self.raw_optimizer.param_groups[0]["lr"], self.clock, reduce)

    def _check_finite(self) -> None:
        """Raises if a loss was not finite. This waits for the device: on an accelerator it is asked at log points and before saving."""
        bad = self.window.first_bad()
        if bad is None:
            return
        step, names = bad
        terms = [name.removeprefix("loss/") for name in names if name != "loss"] or ["their sum"]
        epoch, start = divmod(step - 1, self.steps_per_epoch)
        # The batches are a function of (epoch, step), so the culprit can be read again and nothing had to be kept of it.
        samples = self.task.describe(next(iter(self.task.train_batches(epoch=epoch, start=start))))
        raise self._divergence(f"losses (got NaN or infinity in {', '.join(terms)}", step, samples)

    def _check_weights(self) -> None:
        """Raises if a weight, a buffer or a moment is not finite, before it replaces good ones on the disk."""
        names = self.state.non_finite()
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise self._divergence(f"weights (got NaN or infinity in {names[0]}{more}", self.position.step, "after the update")

    def _divergence(self, problem: str, step: int, place: str) -> NonFiniteLossError:
        kept = ""
        if self.folder is not None and self.folder.last.is_file():
            kept = f" The last good checkpoint is {self.folder.last}."
        return NonFiniteLossError(
            f"Expected finite {problem} at step {step}, epoch {(step - 1) // self.steps_per_epoch + 1}, {place}). "
            f"Try a lower learning rate, a warm-up, Trainer.clip_norm or Trainer.precision = '32-true'.{kept}"
        )

    # ---------------------------------------------------------------- evaluation

    def _evaluate_if_due(self) -> bool:
        """Evaluates and keeps checkpoints, if this step asks for it and it was not done yet."""
        step, position = self.position.step, self.position
        is_due = step > 0 and (step % self.evaluation_period == 0 or step == self.total)
        if not self.task.splits or not is_due or position.evaluated == step:
            return False
        self._save()  # an evaluation that fails loses nothing
        self.clock.stop()
        random_state = rng_state(self.device)
        try:
            # Several processes must stay together: there, an evaluation is finished first.
            with (
                self.interrupts.immediate() if self.fabric.world_size == 1 else nullcontext(),
                nullcontext() if self.average is None else self.average.applied(),
            ):
                evaluations = [self.task.evaluate(split) for split in self.task.splits]
        except Interrupted as interrupted:
            set_rng_state(random_state, self.device)
            self._stop(interrupted.signum)
        records = [self.records.write("eval", numbers) for numbers in evaluations]
        for record in records:
            self.fabric.call("on_evaluation_end", task=self.task, step=step, record=record)
        record, score = records[0], self.task.score  # the first split chooses
        value = record.get(score)
        position.evaluated, position.last = step, record
        if self.settings.early_stopping is not None:
            self.settings.early_stopping.update(position, value)
        if value is not None and math.isfinite(value) and (position.best is None or value > position.best[score]):
            position.best = record
            self._save(is_best=True)
        self._save()
        if position.stopped:
            self.settings.say(
                f"Stopped early after step {step}: {position.stale} evaluations without a higher {score} than {position.peak}."
            )
        self.clock.start()
        return True

    # ---------------------------------------------------------------- checkpoints

    def _save(self, is_best: bool = False) -> None:
        if self.folder is None:
            return
        self._check_finite()
        self._check_weights()
        was_running = self.clock.is_running
        if was_running:
            self.clock.stop()
        of_process = self.state.of_process()
        ranks: list[Any] = [of_process]
        if self.fabric.world_size > 1:
            ranks = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(ranks, of_process)
        if self.fabric.is_global_zero:
            state = {**self.state.of_run(self.clock.seconds), "ranks": ranks, "log_length": self.records.length()}
            save_checkpoint(self.folder.best if is_best else self.folder.last, state)
        if self.fabric.world_size > 1:
            self.fabric.barrier()
        if was_running:
            self.clock.start()

    def restore(self) -> None:
        """Goes back to the last checkpoint of the folder; stays at the start where there is none."""
        if self.folder is None:
            raise ValueError("Expected a run folder to resume from (got None)")
        if not self.folder.last.is_file():
            self.settings.say(f"{self.folder.path} holds no checkpoint yet: starting from the beginning.")
            return
        state = self.state.load(self.folder.last, self.fabric.global_rank)
        if len(state["ranks"]) != self.fabric.world_size:
            self.settings.say(
                f"Resuming a run of {len(state['ranks'])} processes with {self.fabric.world_size}: exact up to random numbers."
            )
        self.records.kept_length = state["log_length"]
        self.settings.say(f"Resuming {self.folder.path} after step {self.position.step} of {self.total}.")

    def _stop(self, signum: int) -> None:
        self._save()
        if self.folder is None:
            message = f"Interrupted after step {self.position.step} of {self.total}; nothing was kept, as there is no run folder."
        else:
            message = f"Interrupted after step {self.position.step} of {self.total}. Go on with the same command and --resume."
        raise Interrupted(signum, message)


def split_batch(batch: tuple, parts: int) -> list[tuple]:
    """Cuts every tensor and list of a batch into equal parts; anything else goes into each part.

    Raises:
        ValueError: If a length is no multiple of `parts`.

    Examples:
        >>> split_batch((torch.arange(4), ["a", "b", "c", "d"], None), 2)
        [(tensor([0, 1]), ['a', 'b'], None), (tensor([2, 3]), ['c', 'd'], None)]
    """
    if parts == 1:
        return [batch]

    def cut(value: Any, part: int) -> Any:
        if not isinstance(value, Tensor | list):
            return value
        if len(value) % parts:
            raise ValueError(f"Expected a batch that can be cut into {parts} equal parts (got {len(value)} samples)")
        size = len(value) // parts
        return value[part * size : (part + 1) * size]

    return [tuple(cut(value, part) for value in batch) for part in range(parts)]
