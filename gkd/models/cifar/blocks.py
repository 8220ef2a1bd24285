"""The pieces that several of the 32x32 networks share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Block = Callable[[int, int, int], nn.Module]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """Returns a 3x3 convolution that keeps the size, or halves it with stride 2."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=bias)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Returns a 1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, groups=groups, bias=False)


def stack(block: Block, in_channels: int, out_channels: int, depth: int, stride: int) -> nn.Sequential:
    """Chains `depth` blocks; the first one changes width and size."""
    blocks = [block(in_channels, out_channels, stride)]
    blocks += [block(out_channels, out_channels, 1) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Returns the shortcut of a residual block that changes width or size: a 1x1 convolution and its norm."""
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class GlobalPool(nn.Module):
    """Averages over space: [B, C, h, w] to [B, C], for every h and w."""

    def forward(self, x: Tensor) -> Tensor:
        """Averages x over its last two dimensions."""
        return x.mean(dim=(2, 3))


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleaves the channels of `groups` equal groups, so that the next grouped convolution sees all of them."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def initialize(model: nn.Module, linear_std: float | None = None) -> None:
    """Draws the convolutions as He et al. do (fan out) and, with `linear_std`, the linear layers from a narrow normal.

    Norms keep PyTorch's ones and zeros; every bias of a convolution, and of a linear layer drawn here, starts at zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
