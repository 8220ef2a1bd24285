"""The run folder: everything a training leaves behind, each file at its place."""

from __future__ import annotations

import json
import platform
import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import nn

from gkd import __version__
from gkd.engine.lock import FolderLock
from gkd.errors import UserError
from gkd.files import remove_temporary, to_json, unwritable, write_atomic

PACKAGES = ("torch", "torchvision", "torch_geometric", "lightning", "torchmetrics", "gin-config", "numpy")


class RunFolder:
    """A folder that belongs to one training.

    ::

        config.gin  metrics.jsonl  checkpoints/{last,best}.pt  student.safetensors  results.json  report.html  tensorboard/

    Args:
        path: The folder; it is made where it is not there.

    Examples:
        >>> import tempfile
        >>> folder = RunFolder(Path(tempfile.mkdtemp()) / "run")
        >>> folder.prepare()
        >>> folder.write_config("Digits.holdout = 0.1")
        >>> folder.prepare()
        Traceback (most recent call last):
        gkd.errors.UserError: Expected an empty run folder (got ... Continue ... with --resume, replace it with --overwrite, ...
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.gin"
        self.metrics = self.path / "metrics.jsonl"
        self.last = self.path / "checkpoints" / "last.pt"
        self.best = self.path / "checkpoints" / "best.pt"
        self.student = self.path / "student.safetensors"
        self.results = self.path / "results.json"
        self.report = self.path / "report.html"
        self.tensorboard = self.path / "tensorboard"
        self.loggers = self.path / "loggers.json"
        self.onnx = self.path / "student.onnx"
        self.program = self.path / "student.pt2"
        self.lock = FolderLock(self.path / ".lock")

    @property
    def contents(self) -> tuple[Path, ...]:
        """What a training may write."""
        files = (self.config, self.metrics, self.student, self.results, self.report, self.loggers, self.onnx, self.program)
        return (*files, self.last.parent, self.tensorboard, self.path / "csv")

    def prepare(self, resume: bool = False, overwrite: bool = False) -> None:
        """Makes the folder ready to be written to.

        Args:
            resume: Keep what is there, to go on with it; a folder that is not there is made.
            overwrite: Take a folder that holds an earlier training; :meth:`clear` removes that.

        Raises:
            UserError: If the folder holds something and neither was asked, if both were, or if it cannot be written to.
        """
        if resume and overwrite:
            raise UserError("Expected --resume or --overwrite (got both). --resume keeps the run, --overwrite removes it.")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"Expected a folder to write the run to (got the file {self.path}). Choose another --output.")
        if not (resume or overwrite) and self.path.is_dir() and any(path != self.lock.path for path in self.path.iterdir()):
            raise UserError(
                f"Expected an empty run folder (got {self.path}, which holds files). "
                "Continue that run with --resume, replace it with --overwrite, or choose another --output."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.lock:
                for folder in (self.path, self.last.parent):
                    remove_temporary(folder)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def clear(self) -> None:
        """Removes what an earlier training wrote, and nothing else.

        Raises:
            UserError: If it cannot be removed, or another process writes to the folder.
        """
        try:
            with self.lock:
                for path in self.contents:
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def write_config(self, text: str) -> None:
        """Writes the operative configuration."""
        write_atomic(self.config, lambda file: file.write(text.encode()))

    def changed_bindings(self, text: str) -> list[str]:
        """Lines of a configuration that the folder's own does not have."""
        before = set(self.config.read_text().splitlines()) if self.config.is_file() else set(text.splitlines())
        return [line for line in text.splitlines() if line not in before]

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes the results as strict JSON."""
        text = to_json(results, indent=2) + "\n"
        write_atomic(self.results, lambda file: file.write(text.encode()))


def save_student(path: Path, model: nn.Module, description: Mapping[str, Any]) -> None:
    """Saves a model alone, as safetensors whose metadata says what it is.

    The names are those of ``model.state_dict()``, so the file loads into the ordinary model with ``strict=True``.

    Args:
        path: File to write.
        model: The student, as built: no teacher, no adapter, no wrapper.
        description: What is needed to build and use it again, stored as JSON.
    """
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    # One entry: safetensors writes several in any order, and equal students shall be equal files.
    content = save_tensors(tensors, metadata={"gkd": json.dumps({"version": __version__, **description})})
    write_atomic(path, lambda file: file.write(content))


def read_description(path: Path | str) -> dict[str, Any]:
    """Reads what `save_student` stored beside the weights; empty for a safetensors file of other origin."""
    with safe_open(str(path), framework="pt") as file:
        stored = file.metadata() or {}
    return json.loads(stored.get("gkd", "{}"))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Package versions and hardware, for the results."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": {"gkd": __version__, "python": platform.python_version(), **package_versions()},
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
    }


def package_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of the installed packages among those named."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest: those that torch took of the GPU, or those of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kibibytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def count_parameters(module: nn.Module) -> int:
    """Counts the parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
