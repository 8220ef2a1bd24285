from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelAdapter(nn.Module):
    r"""Brings a student's features to a teacher's number of channels and, where asked, to its map's size.

    A 1x1 convolution (for vectors: the linear layer that it then is) and batch norm. Along each axis a larger map is averaged
    down before the convolution and a smaller one enlarged bilinearly after the norm, so that the work is done at the smaller
    size. Weights start from a normal of variance 1 / in_channels (He et al. without a ReLU), which keeps the variance.

    Args:
        in_channels: Channels of the student.
        out_channels: Channels of the teacher.
        norm: Whether a batch norm follows; without it the convolution has a bias.
        size: Size of the output's map; None keeps the input's.

    Shapes:
        - **x** [B, in_channels, h, w] or [B, in_channels]; **output** [B, out_channels, H, W] or [B, out_channels]

    Raises:
        ValueError: If x has another number of channels or of dimensions, or a size is asked for vectors.

    Examples:
        >>> import torch
        >>> adapter = ChannelAdapter(16, 64)
        >>> adapter(torch.randn(2, 16, 8, 8), size=4).shape
        torch.Size([2, 64, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, norm: bool = True, size: int | tuple[int, int] | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.size = size
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="linear")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        """Adapts x; `size` goes before the size given to the constructor."""
        if x.dim() not in (2, 4) or x.size(1) != self.conv.in_channels:
            raise ValueError(f"Expected features [B, {self.conv.in_channels}, h, w] or [B, {self.conv.in_channels}] (got {list(x.shape)})")
        size = self.size if size is None else size
        if x.dim() == 2:
            if size is not None:
                raise ValueError(f"Expected a map [B, {self.conv.in_channels}, h, w] to bring to size {size} (got {list(x.shape)})")
            return self.norm(self.conv(x[:, :, None, None])).flatten(1)
        height, width = x.shape[-2:] if size is None else (size, size) if isinstance(size, int) else size
        smaller = (min(height, x.size(2)), min(width, x.size(3)))
        if smaller != tuple(x.shape[-2:]):
            x = F.adaptive_avg_pool2d(x, smaller)
        x = self.norm(self.conv(x))
        if smaller != (height, width):
            x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
        return x
