from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

NAMES = ("logits", "out")


def read_logits(output: Any) -> Tensor:
    """Finds the logits in what a network returned.

    A tensor is the logits. In a dictionary, a named tuple or an output of transformers they are the entry `logits`, or else `out`, as
    torchvision's segmentation networks call them, or else the first tensor; in a tuple or list the first tensor.

    Args:
        output: What the network returned.

    Raises:
        ValueError: If there is no tensor in it.

    Examples:
        >>> import torch
        >>> read_logits({"features": torch.zeros(2, 8), "logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    names = output if isinstance(output, Mapping) else {name: getattr(output, name, None) for name in NAMES}
    entries = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    for entry in (*(names.get(name) for name in NAMES), *entries):
        if isinstance(entry, Tensor):
            return entry
    content = f" of {', '.join(map(str, output)) or 'nothing'}" if isinstance(output, Mapping) else ""
    raise ValueError(
        "Expected a network that returns its logits: a tensor, or a dict, tuple or ModelOutput that holds them as 'logits', as 'out' or "
        f"as its first tensor (got {type(output).__name__}{content})"
    )
