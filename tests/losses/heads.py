"""Last layers for tests of losses that ask for the networks' outputs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearHead(NamedTuple):
    """Weights without a network."""

    weight: Tensor
    bias: Tensor | None

    def check_map(self, features: Tensor, logits: Tensor) -> None:
        """Takes every map."""
