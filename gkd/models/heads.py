"""The last layer of a classifier, found by what it computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd.models.modes import evaluating
from gkd.models.outputs import read_logits
from gkd.models.teacher import Teacher
from gkd.models.watch import watched
from gkd.models.wrappers import layers

TOLERANCE = 0.1  # in units of the largest logit: what half precision may round, and far below what another map makes of it


class ClassHead:
    """The linear layer that gives a classifier's logits. It holds the layer and not its weights, which may be trained and moved.

    Args:
        model: The network, for messages.
        num_classes: Number of its logits.
        name: Path of the layer in the network without its wrappers; None where no linear layer gives the logits.
        layer: The layer itself, likewise.
        teacher: What puts the logits into another order, see :class:`Teacher`.
    """

    def __init__(
        self, model: nn.Module, num_classes: int, name: str | None, layer: nn.Module | None, teacher: Teacher | None = None
    ) -> None:
        self.model, self.num_classes, self.name, self.layer, self.teacher = model, num_classes, name, layer, teacher
        self._checked = False

    @property
    def weight(self) -> Tensor:
        """Weights [K, C], their rows in the order of the logits.

        Raises:
            ValueError: If no linear layer gives the logits.
        """
        return self._ordered(self._read("weight").flatten(1))

    @property
    def bias(self) -> Tensor | None:
        """Biases [K], or None."""
        bias = self._read("bias")
        return None if bias is None else self._ordered(bias)

    @torch.no_grad()
    def check_map(self, features: Tensor, logits: Tensor) -> None:
        """Makes sure, once, that the layer sees the mean of a map: that this mean gives the logits.

        Where dropout is on, only the number of channels is checked.

        Args:
            features: The map.
            logits: What the network made of the same images.

        Shapes:
            - **features** [B, C, h, w], **logits** [B, K]

        Raises:
            ValueError: If it does not.
        """
        if self._checked or torch.compiler.is_compiling():
            return
        weight, bias = self.weight, self.bias
        fits = features.dim() == 4 and features.shape[1] == weight.shape[1]
        if fits and any(_drops(module) for module in self.model.modules()):
            return
        answer = F.linear(features.mean((2, 3)).to(weight.dtype), weight, bias) if fits else logits
        spread = (logits - logits.mean(1, keepdim=True)).abs().max()
        if not fits or (answer - logits).abs().max() > TOLERANCE * spread:
            raise ValueError(
                f"Expected the map whose mean the last layer of {type(self.model).__name__} sees (got a map {list(features.shape)} "
                "whose mean does not give the logits). Tap that map; a network with hidden layers, a norm or a class token in between "
                "has none"
            )
        self._checked = True

    def _read(self, name: str) -> Tensor:
        if self.layer is None:
            raise ValueError(
                f"Expected a network whose logits are the output of a linear layer (got {type(self.model).__name__}, where something "
                "follows the last one)"
            )
        return getattr(self.layer, name)

    def _ordered(self, rows: Tensor) -> Tensor:
        order = None if self.teacher is None else self.teacher.logit_order
        return rows if order is None else rows.index_select(0, order)


def find_head(model: nn.Module, input_size: Sequence[int]) -> ClassHead:
    """Finds the linear layer, or 1x1 convolution, whose output is the logits, by one pass of random images that leaves no trace.

    Args:
        model: The classifier, also inside :class:`Teacher` and other wrappers.
        input_size: [C, H, W] of an image; a teacher's own size replaces it.

    Raises:
        ValueError: If the network returns no logits.

    Examples:
        >>> find_head(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 2, 2)).name
        '1'
    """
    wrapped = list(layers(model))
    network, teacher = wrapped[-1], next((layer for layer in wrapped if isinstance(layer, Teacher)), None)
    size = input_size[1:] if teacher is None else teacher.image_size(input_size[1:])
    outputs: dict[str, Tensor] = {}
    linear = {name: module for name, module in network.named_modules() if _is_linear(module)}
    like = next((parameter for parameter in network.parameters() if parameter.is_floating_point()), torch.empty(0))
    images = torch.randn(2, input_size[0], *size, generator=torch.Generator().manual_seed(0)).to(like)
    devices = [like.device] if like.is_cuda else []
    with evaluating(network), torch.no_grad(), torch.random.fork_rng(devices=devices), watched(linear, outputs):
        logits = read_logits(network(images))
    matches = [
        name for name, output in outputs.items() if output.numel() == logits.numel() and torch.equal(output.flatten(), logits.flatten())
    ]
    name = matches[-1] if matches else None
    return ClassHead(network, logits.shape[1], name, linear[name] if name is not None else None, teacher)


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1)
