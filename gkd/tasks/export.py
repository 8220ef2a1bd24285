"""The student in formats that need no Python to run, each checked against the student itself."""

from __future__ import annotations

import copy
import importlib.util
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gkd.errors import UserError
from gkd.files import write_atomic
from gkd.models import read_logits

TOLERANCE = 1e-3  # largest difference, relative to the largest output: what other kernels may round differently


def export_program(model: nn.Module, input_size: Sequence[int], path: Path) -> float:
    """Writes a `torch.export` program with a free batch size; ``torch.export.load(path).module()`` runs it.

    Args:
        model: The student.
        input_size: [C, H, W] of an image.
        path: File to write, ending in .pt2.

    Returns:
        The largest difference to the model's own output, relative to the largest output.

    Raises:
        UserError: If the model cannot be exported, or the program computes something else.
    """
    model, images = _for_export(model, input_size)
    try:
        with torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:
        raise UserError(f"Expected a student that torch.export can trace (got {type(model).__name__}: {error})") from error
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    content = buffer.getvalue()
    difference = _check(model, torch.export.load(io.BytesIO(content)).module(), input_size, "torch.export program")
    write_atomic(path, lambda file: file.write(content))
    return difference


def export_onnx(model: nn.Module, input_size: Sequence[int], path: Path) -> float:
    """Writes an ONNX model with a free batch size, input ``images`` and output ``logits``.

    It is checked with onnxruntime where that is installed, else with onnx's own (slow) reference.

    Args:
        model: The student.
        input_size: [C, H, W] of an image.
        path: File to write, ending in .onnx.

    Returns:
        The largest difference to the model's own output, relative to the largest output.

    Raises:
        UserError: If onnx is not installed, the model cannot be exported, or the result computes something else.
    """
    if importlib.util.find_spec("onnx") is None:
        raise UserError("Expected the package onnx for --export onnx (got none). Install it with: pip install onnx onnxscript")
    model, images = _for_export(model, input_size)
    options: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    if importlib.util.find_spec("onnxscript") is not None:
        options.update(dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False, verbose=False)
    else:
        options.update(dynamo=False, dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}})
    temporary = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # both exporters tell of their inner deprecations
            torch.onnx.export(model, (images,), str(temporary), **options)
        difference = _check(model, _onnx_runner(temporary), input_size, "ONNX model")
        content = temporary.read_bytes()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"Expected a student that torch.onnx can export (got {type(model).__name__}: {error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    write_atomic(path, lambda file: file.write(content))
    return difference


def _for_export(model: nn.Module, input_size: Sequence[int]) -> tuple[nn.Module, Tensor]:
    """A copy on the CPU in eval mode, without hooks of taps, and two images: a batch of one would be taken for a constant."""
    model = copy.deepcopy(model).cpu().eval()
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    images = torch.zeros(2, *input_size)
    with torch.no_grad():
        if not isinstance(model(images), Tensor):
            model = _Logits(model)
    return model.to(memory_format=torch.contiguous_format), images


class _Logits(nn.Module):
    """A network whose logits are all of its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return read_logits(self.model(images))


def _onnx_runner(path: Path) -> Callable[[Tensor], Tensor]:
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    from onnx.reference import ReferenceEvaluator

    reference = ReferenceEvaluator(str(path))

    def run(images: Tensor) -> Tensor:
        outputs: Any = reference.run(None, {"images": images.numpy()})
        return torch.from_numpy(outputs[0])

    return run


@torch.no_grad()
def _check(model: nn.Module, exported: Callable[[Tensor], Tensor], input_size: Sequence[int], kind: str) -> float:
    """Compares on another batch size than the one that was traced."""
    images = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))
    ours, theirs = model(images), exported(images)
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))
    if not difference <= TOLERANCE:
        raise UserError(f"Expected the {kind} to compute what the student does (got a relative difference of {difference:.2g})")
    return difference
