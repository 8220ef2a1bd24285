"""torchvision's detectors in formats that need no Python to run, each compared with the detector itself."""

from __future__ import annotations

import copy
import importlib.util
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gkd.errors import UserError
from gkd.files import write_atomic

TOLERANCE = 1e-2  # pixels
OPSET = 17


def export_onnx(model: nn.Module, size: Sequence[int], path: Path) -> float:
    """Writes an ONNX model of one image: input ``image`` [3, h, w] in [0, 1] of any size; outputs ``boxes``, ``scores``, ``labels``, and
    ``masks`` or ``keypoints`` where there are some.

    Args:
        model: The detector.
        size: Height and width of the image that is traced.
        path: File to write, ending in .onnx.

    Returns:
        The largest difference of a coordinate, in pixels, on an image of another size; 0 where there is no onnxruntime to tell.

    Raises:
        UserError: If onnx is not installed, the model cannot be exported, or the result finds other boxes.
    """
    if importlib.util.find_spec("onnx") is None:
        raise UserError("Expected the package onnx for --export onnx (got none). Install it with: pip install 'gkd[export]'")
    network: Any = _copy(model)
    image = _image(size)
    with torch.no_grad():
        names = list(network([image])[0])  # in the order in which the tracer flattens them
    temporary = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of every number that is taken for a constant
            torch.onnx.export(
                network,
                ([image],),
                str(temporary),
                dynamo=False,  # the number of detections depends on the data, which the newer exporter does not take
                opset_version=OPSET,
                input_names=["image"],
                output_names=names,
                dynamic_axes={"image": {1: "height", 2: "width"}, **{name: {0: "detections"} for name in names}},
            )
        difference = _compare(network, _onnx_boxes(temporary), size) if importlib.util.find_spec("onnxruntime") is not None else 0.0
        content = temporary.read_bytes()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"Expected a detector that torch.onnx can export (got {type(network).__name__}: {error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    write_atomic(path, lambda file: file.write(content))
    return difference


def export_script(model: nn.Module, size: Sequence[int], path: Path) -> float:
    """Writes a TorchScript program, which `torch.jit.load` reads, also in C++; as every scripted detector of torchvision it answers with
    (losses, detections).

    Args:
        model: The detector.
        size: Height and width of an image.
        path: File to write, ending in .pt.

    Returns:
        The largest difference of a coordinate, in pixels.

    Raises:
        UserError: If the model cannot be scripted, or the program finds other boxes.
    """
    model = _copy(model)
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; torch.export takes no detectors yet
            torch.jit.save(torch.jit.script(model), buffer)
            program = torch.jit.load(io.BytesIO(buffer.getvalue()))
    except Exception as error:
        raise UserError(f"Expected a detector that TorchScript takes (got {type(model).__name__}: {error})") from error
    difference = _compare(model, lambda image: program([image])[1][0]["boxes"], size)
    write_atomic(path, lambda file: file.write(buffer.getvalue()))
    return difference


def _copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU in eval mode, without hooks."""
    model = copy.deepcopy(model).cpu().eval()
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


def _image(size: Sequence[int]) -> Tensor:
    return torch.rand(3, size[0], size[1], generator=torch.Generator().manual_seed(0))


def _onnx_boxes(path: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["boxes"], {"image": image.numpy()})[0])


@torch.no_grad()
def _compare(model: Any, boxes_of: Any, size: Sequence[int]) -> float:
    image = _image((size[0] + 16, size[1] + 40))
    ours, theirs = model([image])[0]["boxes"], boxes_of(image)
    if ours.shape != theirs.shape:
        raise UserError(f"Expected as many boxes of the exported detector as of the student, {len(ours)} (got {len(theirs)})")
    difference = float((ours - theirs).abs().max()) if len(ours) else 0.0
    if not difference <= TOLERANCE:
        raise UserError(f"Expected the exported detector to find the student's boxes (got a difference of {difference:.2g} pixels)")
    return difference
