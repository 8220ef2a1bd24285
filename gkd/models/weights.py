from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gkd.models.checkpoints import find_state, read_weights
from gkd.models.wrappers import unwrap


class OtherClasses(ValueError):
    """The weights fit in all but the last layer, which is for another number of classes."""

    def __init__(self, message: str, classes: int, layers: list[str]) -> None:
        super().__init__(message)
        self.classes, self.layers = classes, layers


def load_weights(model: nn.Module, weights: str | os.PathLike[str] | Mapping[str, Any], new_head: bool = False) -> list[str]:
    """Loads weights into a model: all of them, of equal names and shapes, or none.

    What wrappers put before every name (`module.`, `student.`, `model.`, `backbone.`, one inside another) is dropped, and with it the
    entries that stand elsewhere, such as the teacher's in a checkpoint of a distillation.

    Args:
        model: The network; one inside `torch.compile` or `DistributedDataParallel` is found.
        weights: A file (see read_weights), or what such a file holds. Nothing in a file is run.
        new_head: Whether a last layer for another number of classes stays as the model has it.

    Returns:
        Names of the entries that stayed as they were: those of the last layer, with new_head.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no weights, weights that are NaN, or others than the model's: missing and unexpected names and unequal
            shapes are listed, and the model stays as it was. An OtherClasses where only the number of classes differs.
    """
    if isinstance(weights, (str, os.PathLike)):
        source, state = os.fspath(weights), read_weights(weights)
    else:
        source, state = "a dict", find_state(weights, "the dict of weights")
    target = unwrap(model)
    current = target.state_dict()
    state = _strip(state, current)
    # Checkpoints older than this counter lack it; it only matters to norms without momentum.
    norms = [name.removesuffix("running_var") for name in state if name.endswith("running_var")]
    counters = [f"{norm}num_batches_tracked" for norm in norms]
    lacking = {name: current[name] for name in counters if name in current and name not in state}
    state = {**state, **lacking}
    kept: list[str] = []
    try:
        _check(current, state, f"Expected the weights of {type(target).__name__} (got, from {source}, ")
    except OtherClasses as error:
        if not new_head:
            raise
        kept = error.layers
        state |= {name: current[name] for name in kept}
    _check_finite(target, state, source)
    target.load_state_dict(state)
    return kept


def _strip(state: Mapping[str, Any], current: Mapping[str, Any]) -> Mapping[str, Any]:
    """Drops what stands before the model's names in a state_dict, and what does not stand behind it."""
    prefixes: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        prefixes.update(prefix for i in range(len(parts)) if ".".join(parts[i:]) in current for prefix in [".".join([*parts[:i], ""])])
    # Of several copies of one network: without a prefix, then the first that is neither a teacher nor an average.
    averaged = {prefix: any(word in prefix for word in ("teacher", "ema")) for prefix in prefixes}
    prefix = max(prefixes, key=lambda prefix: (prefixes[prefix], not prefix, not averaged[prefix]), default="")
    if 2 * prefixes[prefix] < len(current):  # another network, of which a few names agree
        return state
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)} if prefix else state


def _some(names: list[str], count: int = 6) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _check(current: Mapping[str, Any], state: Mapping[str, Any], expected: str) -> None:
    """Raises ValueError where names or shapes differ."""
    missing = [name for name in current if name not in state]
    unexpected = [name for name in state if name not in current]
    shapes = {
        name: (tuple(state[name].shape), tuple(current[name].shape))
        for name in current
        if isinstance(current[name], Tensor) and isinstance(state.get(name), Tensor) and state[name].shape != current[name].shape
    }
    if not (missing or unexpected or shapes):
        return
    differences = [f"{len(names)} {kind}: {_some(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names]
    if shapes:
        pairs = [f"{name} {list(theirs)} where the model has {list(ours)}" for name, (theirs, ours) in shapes.items()]
        differences.append(f"{len(pairs)} of another shape: {_some(pairs)}")
    message = f"{expected}{'; '.join(differences)})"
    heads = {(theirs[:1], ours[:1]) for theirs, ours in shapes.values()}
    if not missing and not unexpected and len(heads) == 1 and all(theirs[1:] == ours[1:] for theirs, ours in shapes.values()):
        ((theirs, _),) = heads
        message += f"; the weights are for {theirs[0]} classes: build the network with num_classes={theirs[0]}"
        raise OtherClasses(message, theirs[0], list(shapes))
    if len(missing) == len(current):
        message += "; no name agrees: these are the weights of another network"
    raise ValueError(message)


def broken_weights(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Names of a model's parameters in `state` that hold NaN or infinity, and of buffers that hold NaN: an infinite buffer is a mask."""
    parameters = {name for name, _ in model.named_parameters()}
    return [
        name
        for name, value in state.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and bool((~value.isfinite() if name in parameters else value.isnan()).any())
    ]


def _check_finite(model: nn.Module, state: Mapping[str, Any], source: str) -> None:
    broken = broken_weights(model, state)
    if broken:
        raise ValueError(
            f"Expected finite weights in {source} (got NaN or infinity in {len(broken)} of {len(state)} entries: {_some(broken)}); the "
            "training that made them diverged: take an earlier checkpoint"
        )
