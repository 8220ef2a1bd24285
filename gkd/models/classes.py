from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def class_order(network_classes: Sequence[str], data_classes: Sequence[str], source: str = "the teacher") -> list[int] | None:
    """Compares the classes of a network with those of the data.

    Args:
        network_classes: Names in the order of the network's logits.
        data_classes: Names in the order of the data's labels.
        source: What the network is called in the message.

    Returns:
        For every class of the data its position in the network's logits; None where the two agree.

    Raises:
        ValueError: If the names are not the same set; the first differences are listed.

    Examples:
        >>> class_order(["cat", "dog", "owl"], ["owl", "cat", "dog"])
        [2, 0, 1]
        >>> class_order(["cat", "dog"], ["cat", "dog"]) is None
        True
    """
    theirs, ours = [str(name) for name in network_classes], [str(name) for name in data_classes]
    if theirs == ours:
        return None
    if sorted(theirs) != sorted(ours) or len(set(ours)) < len(ours):
        only_theirs = [name for name in theirs if name not in set(ours)]
        only_ours = [name for name in ours if name not in set(theirs)]
        differences = [
            f"{owner} has {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for owner, names in (("it alone", only_theirs), ("the data alone", only_ours))
            if names
        ]
        raise ValueError(
            f"Expected the classes of {source} to be those of the data (got {len(theirs)} and {len(ours)} classes"
            f"{'; ' if differences else ''}{'; '.join(differences)})"
        )
    position = {name: place for place, name in enumerate(theirs)}
    return [position[name] for name in ours]


@torch.no_grad()
def reorder_logits(model: nn.Module, larger: nn.Module, order: Sequence[int]) -> None:
    """Puts the logits of a network into another order, in the weights of its last layer.

    Args:
        model: The network.
        larger: The same network with more classes: what has another shape in it belongs to the last layer.
        order: For every logit its former position.
    """
    entries = larger.state_dict()
    for name, value in model.state_dict().items():
        if value.shape != entries[name].shape:
            value.copy_(value[torch.tensor(order, device=value.device)])
