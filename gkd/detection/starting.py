"""How the weights of a detector start where nothing is loaded."""

from __future__ import annotations

from torch import nn


def start_with_boxes(distances: nn.Module) -> None:
    """Lets every location of FCOS start with a box that reaches one stride to each side.

    Both libraries cut the four distances off at 0 and start them about there. A side that the random weights make negative everywhere gets
    no gradient and stays 0 for the whole training: one of 24 seeds started so on a pyramid of 64 channels, and AP stayed below 1.

    Args:
        distances: The convolution that gives left, top, right and bottom in strides.
    """
    nn.init.ones_(distances.bias)  # type: ignore[arg-type]
