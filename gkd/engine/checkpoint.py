"""Checkpoints that a crash cannot spoil, and the random states that go into them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gkd.errors import UserError
from gkd.files import write_atomic


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Saves a nested dictionary of tensors and plain values, atomically."""
    write_atomic(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads what `save_checkpoint` saved, onto the CPU; nothing in the file is executed.

    Raises:
        UserError: If the file is absent or is not a checkpoint.
    """
    if not path.is_file():
        raise UserError(f"Expected a checkpoint at {path} (got no such file). Train first, or check --output.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"Expected a checkpoint that gkd wrote at {path} (got a file that does not load: {error}). "
            "Remove it, or start again with --overwrite."
        ) from error


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of every global random generator that a step may draw from: Python, NumPy, torch, and the device's own."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002  the state of the global one is wanted
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts every generator back to where `rng_state` found it; a device that was not there then is left alone."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
