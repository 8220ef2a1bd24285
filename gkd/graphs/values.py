from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def readable(value: Tensor) -> bool:
    """Whether a look at the values is for free: on the CPU, where nobody waits for a device, and where there are values at all.

    There are none under torch.compile, a FakeTensorMode or another mode, or a transform of torch.func.
    """
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not under_a_mode()


def under_a_mode() -> bool:
    """Whether tensors are made by a mode, such as FakeTensorMode, or a transform of torch.func, and mean nothing outside it."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """The values with the type and on the device of a tensor. Unlike ``like.new_tensor(values)``, it does not wait for a GPU.

    Shapes:
        - **values** n numbers; **output** [n]

    Examples:
        >>> constant((1.0, 2.0), like=torch.zeros(3, dtype=torch.float64))
        tensor([1., 2.], dtype=torch.float64)
    """
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)
