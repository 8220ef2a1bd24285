"""Files of weights, read so that nothing in them runs, and what the files are that hold none."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Where checkpoints keep the weights of the network. Averaged weights are taken where there are no others.
CONTAINERS = ("model", "state_dict", "student", "model_state_dict", "net", "network", "backbone", "model_ema", "state_dict_ema", "ema")

# What public checkpoints keep beside the weights: command line options, paths and NumPy's numbers. None of these can run anything.
_core: Any = getattr(np, "_core", None) or np.core
_scalar = _core.multiarray.scalar
_DTYPES = tuple(getattr(np.dtypes, name) for name in ("Float64DType", "Float32DType", "Int64DType", "Int32DType", "BoolDType"))
HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    Namespace,
    PosixPath,
    np.dtype,
    *_DTYPES,
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


def read_weights(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Reads the state_dict in a file, onto the CPU.

    Args:
        path: A `.safetensors` file, or any that `torch.save` wrote: a state_dict, alone or in one of the wrappings that training programs
            use (`model`, `state_dict`, `model_state_dict`, `state_dict_ema`, ...). `~` is the home folder.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no weights; it says what the file is instead.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(
            f"Expected a file of weights at {path} (got {kind}, seen from {Path.cwd()}); correct the path, download the "
            "file, or train the network without distillation to make one"
        )
    with path.open("rb") as file:
        head = file.read(512)
    _refuse_what_is_no_checkpoint(path, head)
    return find_state(_read_safetensors(path) if _is_safetensors(path, head) else _read_pickle(path), str(path))


def find_state(content: object, source: str) -> Mapping[str, Any]:
    """Finds the state_dict in what a checkpoint holds: itself, what one of the usual names holds, or the only state_dict in it."""
    state = content
    while isinstance(state, Mapping) and not _is_state(state):
        inner = next((state[name] for name in CONTAINERS if isinstance(state.get(name), Mapping)), None)
        candidates = [value for value in state.values() if _is_state(value)]
        if inner is None and len(candidates) == 1:
            inner = candidates[0]
        if inner is None:
            break
        state = inner
    if not isinstance(state, Mapping) or not _is_state(state):
        got = f"the entries {', '.join(map(str, list(state)[:8]))}" if isinstance(state, Mapping) else type(content).__name__
        raise ValueError(f"Expected a state_dict, alone or as one of {', '.join(CONTAINERS)}, in {source} (got {got})")
    return state


def _refuse_what_is_no_checkpoint(path: Path, head: bytes) -> None:
    start = head.lstrip().lower()
    kinds = {
        "an empty file; the download or the copy failed": not head,
        "a pointer of Git LFS; run git lfs pull where it came from": start.startswith(b"version https://git-lfs"),
        "a web page; download the file itself, from its raw link": start.startswith((b"<!doctype html", b"<html", b"<?xml")),
    }
    for kind, applies in kinds.items():
        if applies:
            raise ValueError(f"Expected a file of weights at {path} (got {kind})")


def _is_safetensors(path: Path, head: bytes) -> bool:
    return path.suffix == ".safetensors" or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size)


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"Expected a safetensors file at {path} (got: {error})") from error


def _read_pickle(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what is no checkpoint fails in any way
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"Expected tensors and plain values only, as torch.save(model.state_dict(), ...) writes, in {path} (got: {reason}); "
            "if you trust the file, read it with torch.load(..., weights_only=False) and save its state_dict alone"
        ) from error


def _is_state(content: object) -> bool:
    """Tells whether content is a state_dict: named tensors, and extra states of any type."""
    return (
        isinstance(content, Mapping)
        and any(isinstance(value, Tensor) for value in content.values())
        and all(isinstance(name, str) for name in content)
        and all(isinstance(value, Tensor) or name.endswith("_extra_state") for name, value in content.items())
    )
