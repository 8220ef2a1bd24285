"""Training steps on fake CUDA tensors: shapes, devices and operators of a GPU, without one.

Fake tensors have no values, so whatever would read one fails as it would wait on a GPU. `Guard` sees every operator and notes those that a
GPU would wait for, or cannot run, with the line of gkd that asked for them.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).resolve().parent.parent
MODE = FakeTensorMode()  # one for all: tensors of two modes do not mix
aten = torch.ops.aten

READS = (
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.unique_dim,
    aten.bincount,
    aten.repeat_interleave.Tensor,
)
CHECKED = (aten._linalg_eigh, aten._linalg_svd, aten.linalg_eig)  # the host reads whether they converged
INDEXING = (aten.index, aten.index_put, aten.index_put_)
KEYS = ("CUDA", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")
HAS_CUDA_KERNELS = torch.backends.cuda.is_built()


class Guard(TorchDispatchMode):
    """Notes in `problems` what a GPU would wait for; put it around a step inside `FakeTensorMode`.

    Args:
        device: Type of the fake device.
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device, self.problems = device, []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        goal = kwargs.get("device")
        real = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        if len(real) == len(tensors) and (goal is None or torch.device(goal).type != self.device):
            with no_dispatch():  # what stays on the host has values
                return func(*args, **kwargs)
        if real:
            args, kwargs = tree_map_only(Tensor, fake, (args, kwargs))
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if problem := self._problem(func, tensors, args, kwargs):
            self._note(problem)
        try:
            return func(*args, **kwargs)
        except Exception as error:
            if not problem:
                self._note(f"{func}: {str(error).splitlines()[0]}")
            raise

    def _problem(self, func: Any, tensors: list[Tensor], args: tuple, kwargs: dict[str, Any]) -> str | None:
        packet = func.overloadpacket
        on_device = [tensor for tensor in tensors if tensor.device.type == self.device]
        if packet in (aten._to_copy, aten.copy_):
            source = args[0] if packet is aten._to_copy else args[1]
            goal = torch.device(kwargs.get("device") or source.device) if packet is aten._to_copy else args[0].device
            waits = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            if source.device.type == self.device and goal.type == "cpu":
                return "copies from the GPU to the host"
            if source.device.type == "cpu" and goal.type == self.device and waits:
                return "copies from the host to the GPU and waits"
            return None
        if not on_device:
            return None
        if packet in READS or (func in READS and kwargs.get("output_size") is None):
            return f"{func} waits for the GPU"
        if packet in CHECKED:
            return f"{func} waits for the GPU to read whether it converged"
        if packet in INDEXING and any(tensor.dtype == torch.bool for tensor in tree_leaves(args[1]) if tensor is not None):
            return f"{func} with a mask waits for the GPU"
        if any(tensor.device.type == "cpu" and tensor.dim() > 0 for tensor in tensors):
            return f"{func} mixes tensors of the host and the GPU"
        if HAS_CUDA_KERNELS and not has_cuda_kernel(func):
            return f"{func} has no CUDA kernel"
        return None

    def _note(self, problem: str) -> None:
        line = f"{caller()}: {problem}"
        if line not in self.problems:
            self.problems.append(line)


def fake(tensor: Tensor) -> Tensor:
    """A tensor of the host, made fake so that one of the device may meet it."""
    return tensor if isinstance(tensor, FakeTensor) else MODE.from_tensor(tensor)


@cache
def has_cuda_kernel(func: Any) -> bool:
    """Whether torch registers something that runs on CUDA."""
    return func.namespace == "prim" or any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in KEYS)


def caller() -> str:
    """File and line of the innermost frame inside gkd, or else inside this repository."""
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        frames.append((Path(frame.f_code.co_filename), frame.f_lineno))
        frame = frame.f_back
    return place(frames)


def place(frames: list[tuple[Path, int]]) -> str:
    """The first of these frames that lies inside gkd, or else inside this repository."""
    for folder in (ROOT / "gkd", ROOT):
        for path, line in frames:
            if path.is_relative_to(folder) and path != Path(__file__) and ".venv" not in path.parts:
                return f"{path.relative_to(ROOT)}:{line}"
    return "somewhere"


def problems_of(run: Callable[[], Any], device: str = "cuda") -> list[str]:
    """What a GPU would wait for in ``run()``, or could not do; the first error ends it."""
    with MODE, Guard(device) as guard:
        try:
            run()
        except Exception as error:
            if not guard.problems:
                frames = [(Path(frame.filename), frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
                guard.problems.append(f"{place(frames[::-1])}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return guard.problems


def move(*modules: nn.Module, device: str = "cuda") -> None:
    """Puts fake tensors of the device in place of all parameters and buffers."""
    moved: dict[int, Tensor] = {}
    with MODE:
        for module in (part for root in modules for part in root.modules()):
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is not None:
                        if id(tensor) not in moved:
                            moved[id(tensor)] = fake_like(tensor, device)
                        store[name] = moved[id(tensor)]


def fake_like(tensor: Tensor, device: str = "cuda") -> Tensor:
    """A fake tensor of the device with the shape, strides and kind of a real one."""
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake.requires_grad_(tensor.requires_grad)


def make_backward_possible() -> str:
    """Registers a private device for this process and returns its type.

    Autograd asks the driver for streams of a CUDA device; of a device that is registered from Python it asks nothing.
    """
    from torch.utils import backend_registration

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend("fakegpu", backend_module=Module())
    return "fakegpu"
