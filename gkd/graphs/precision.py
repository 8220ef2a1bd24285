from __future__ import annotations

import torch
from torch import Tensor


def as_float(value: Tensor) -> Tensor:
    """Returns float64 as it is and everything else, half precision above all, as float32: what similarities and spectra are computed in."""
    return value if value.dtype == torch.float64 else value.float()


def full_precision(value: Tensor) -> torch.autocast:
    """Context in which products stay in the precision of their operands: half of it loses the small differences that graphs are made of."""
    return torch.autocast(value.device.type, enabled=False)
