"""What a checkpoint holds: everything that a training needs to go on as if it had never been stopped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gkd.engine.average import Average
from gkd.engine.checkpoint import load_checkpoint, rng_state, set_rng_state
from gkd.engine.folder import package_versions
from gkd.engine.position import Position
from gkd.engine.window import Window
from gkd.errors import UserError


class TrainingState:
    """Model, optimiser, loss scale, position and running means of one training.

    Args:
        model: What is trained.
        optimizer: Its optimiser, with the configured hyperparameters.
        scaler: Scales the loss; None in full precision.
        average: Of the student's weights; None keeps none.
        steps_per_epoch: Batches in an epoch.
        device: Of this process.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        average: Average | None,
        steps_per_epoch: int,
        device: torch.device,
    ) -> None:
        self.model, self.optimizer, self.scaler, self.average = model, optimizer, scaler, average
        self.steps_per_epoch, self.device = steps_per_epoch, device
        self.position, self.window = Position(), Window(device)
        self._unset: frozenset[str] = frozenset()
        self._unset = frozenset(self.non_finite())

    def of_process(self) -> dict[str, Any]:
        """What each process has of its own."""
        return {"rng": rng_state(self.device), "window": self.window.state_dict()}

    def of_run(self, seconds: float) -> dict[str, Any]:
        """What all processes share.

        Args:
            seconds: Time of this process's training, which the position does not have yet.
        """
        position = asdict(self.position)
        position["seconds"] += seconds
        return {
            "position": position,
            "steps_per_epoch": self.steps_per_epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": type(self.optimizer).__name__,
            "scaler": {} if self.scaler is None else self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "versions": package_versions(),
        }

    def load(self, path: Path, rank: int) -> dict[str, Any]:
        """Goes back to a checkpoint, whose content is returned. Hyperparameters of the optimiser stay the configured ones.

        Args:
            path: The checkpoint.
            rank: Number of this process.

        Raises:
            UserError: If it is of another model, optimiser or data set.
        """
        state = load_checkpoint(path)
        try:
            self._check_kind(state, path)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(self._with_configured_groups(state["optimizer"]))
            if self.scaler is not None and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            if self.average is not None and state.get("average") is not None:
                self.average.load_state_dict(state["average"])
            vars(self.position).update(vars(Position(**state["position"])))
            of_process = state["ranks"][rank % len(state["ranks"])]
            self.window.load_state_dict(of_process["window"])
            set_rng_state(of_process["rng"], self.device)
        except UserError:
            raise
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"Expected the model that {path} was saved from (got another: {error}). "
                "Resume with the configuration of the run, or start again with --overwrite."
            ) from error
        return state

    def non_finite(self) -> list[str]:
        """Names of the weights, buffers and moments that got a NaN or an infinity; waits for the device.

        What has one before the first step means it: a constant that a term takes from its first batch, say.
        """
        names, flags = [], []
        for name, tensor in self._tensors():
            if tensor.is_floating_point() and name not in self._unset:
                names.append(name)
                flags.append(tensor.isfinite().all().to(self.device))
        fine = torch.stack(flags).tolist() if flags else []
        return [name for name, is_fine in zip(names, fine, strict=True) if not is_fine]

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():
                if isinstance(value, Tensor):
                    yield f"{key} of {names.get(parameter, 'a parameter')}", value

    def _check_kind(self, state: dict[str, Any], path: Path) -> None:
        kinds = (
            ("steps in an epoch", state["steps_per_epoch"], self.steps_per_epoch, "the data and the batch size"),
            ("as the optimiser", state.get("optimizer_name"), type(self.optimizer).__name__, "the optimiser"),
        )
        for what, before, now, cause in kinds:
            if before is not None and before != now:
                raise UserError(
                    f"Expected {before} {what}, as in {path} (got {now}). Resume with {cause} of the run, or start again with --overwrite."
                )

    def _with_configured_groups(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The saved moments under the hyperparameters of the configuration: what was changed for the rest of a run counts."""
        groups, configured = saved["param_groups"], self.optimizer.state_dict()["param_groups"]
        if len(groups) != len(configured):
            raise ValueError(f"{len(configured)} groups of parameters in place of {len(groups)}; check decay_norm_and_bias")
        merged = [{**group, **now, "params": group["params"]} for group, now in zip(groups, configured, strict=True)]
        return {**saved, "param_groups": merged}
