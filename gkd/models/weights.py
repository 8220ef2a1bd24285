from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gkd.models.wrappers import unwrap

# Where checkpoints keep the weights of the network, and what wrappers put before every name.
CONTAINERS = ("model", "state_dict", "student")
PREFIXES = ("module.", "_orig_mod.")


def load_weights(model: nn.Module, weights: str | os.PathLike[str] | Mapping[str, Any]) -> None:
    """Loads weights into a model: all of them, of equal names and shapes, or none.

    Args:
        model: The network; one inside `torch.compile` or `DistributedDataParallel` is found.
        weights: A file (`.safetensors`, or any that `torch.save` wrote) or what such a file holds: a plain state_dict, or one
            under the name `model`, `state_dict` or `student`. The prefixes of `DataParallel` and `torch.compile` are dropped.
            Files are read with `weights_only=True`, so that none can run code.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no weights, or others than the model's: missing and unexpected names and unequal shapes
            are listed, and the model stays as it was.
    """
    if isinstance(weights, (str, os.PathLike)):
        source, state = os.fspath(weights), read_weights(weights)
    else:
        source, state = "a dict", _find_state(weights, "the dict of weights")
    target = unwrap(model)
    own = target.state_dict()
    state = _strip(state, own)
    # Checkpoints older than this counter lack it; it only matters to norms without momentum.
    norms = [name.removesuffix("running_var") for name in state if name.endswith("running_var")]
    counters = [f"{norm}num_batches_tracked" for norm in norms]
    lacking = {name: own[name] for name in counters if name in own and name not in state}
    if lacking:
        state = {**state, **lacking}
    _check(own, state, f"Expected the weights of {type(target).__name__} (got, from {source}, ")
    target.load_state_dict(state)


def read_weights(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Reads the state_dict in a file, onto the CPU; see load_weights."""
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(
            f"Expected a file of weights at {path} (got {found}, seen from {Path.cwd()}); correct the path, download the "
            "file, or train the network without distillation to make one"
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content: object = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"Expected a safetensors file at {path} (got: {error})") from error
        return _find_state(content, str(path))
    try:
        # The CRD zoo keeps its command line options, an argparse.Namespace of plain values, beside the weights.
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what is no checkpoint fails in any way
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"Expected tensors and plain values only, as torch.save(model.state_dict(), ...) writes, in {path} (got: {reason}); "
            "if you trust the file, read it with torch.load(..., weights_only=False) and save its state_dict alone"
        ) from error
    return _find_state(content, str(path))


def _is_state(content: object) -> bool:
    """Tells whether content is a state_dict: named tensors, and extra states of any type."""
    return (
        isinstance(content, Mapping)
        and any(isinstance(value, Tensor) for value in content.values())
        and all(isinstance(name, str) for name in content)
        and all(isinstance(value, Tensor) or name.endswith("_extra_state") for name, value in content.items())
    )


def _find_state(content: object, source: str) -> Mapping[str, Any]:
    state = content
    while isinstance(state, Mapping) and not _is_state(state):
        inner = next((state[name] for name in CONTAINERS if isinstance(state.get(name), Mapping)), None)
        if inner is None:
            break
        state = inner
    if not isinstance(state, Mapping) or not _is_state(state):
        got = f"the entries {', '.join(map(str, list(state)[:8]))}" if isinstance(state, Mapping) else type(content).__name__
        raise ValueError(f"Expected a state_dict, alone or as one of {', '.join(CONTAINERS)}, in {source} (got {got})")
    return state


def _strip(state: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Drops what wrappers put before every name, as long as no name is the model's."""
    while state.keys().isdisjoint(own):
        prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _some(names: list[str], count: int = 6) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _check(own: Mapping[str, Any], state: Mapping[str, Any], expected: str) -> None:
    """Raises ValueError where names or shapes differ."""
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = {
        name: (tuple(state[name].shape), tuple(own[name].shape))
        for name in own
        if isinstance(own[name], Tensor) and isinstance(state.get(name), Tensor) and state[name].shape != own[name].shape
    }
    if not (missing or unexpected or shapes):
        return
    found = [f"{len(names)} {kind}: {_some(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names]
    if shapes:
        pairs = [f"{name} {list(theirs)} where the model has {list(ours)}" for name, (theirs, ours) in shapes.items()]
        found.append(f"{len(pairs)} of another shape: {_some(pairs)}")
    advice = ""
    heads = {(theirs[:1], ours[:1]) for theirs, ours in shapes.values()}
    if not missing and not unexpected and len(heads) == 1 and all(theirs[1:] == ours[1:] for theirs, ours in shapes.values()):
        ((theirs, _),) = heads
        advice = f"; the weights are for {theirs[0]} classes: build the network with num_classes={theirs[0]}"
    elif len(missing) == len(own):
        advice = "; no name agrees: these are the weights of another network"
    raise ValueError(f"{expected}{'; '.join(found)}){advice}")
