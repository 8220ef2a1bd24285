"""Checkpoints that a crash cannot spoil, and the random states that go into them."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from gkd.errors import UserError


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file so that a reader finds the old content or the new one, never a part, whenever the process is killed.

    The content goes to a temporary name in the same folder, is flushed to the disk and takes the place of `path` in one step.

    Args:
        path: File to write.
        write: Called with the open binary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    # The rename itself is on the disk only once the folder is; systems that cannot sync a folder raise.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
