from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gkd.models.names import near
from gkd.models.wrappers import layers

_GRID = re.compile(r"(?P<path>.+)@(?P<height>[1-9]\d*)x(?P<width>[1-9]\d*)")


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lays the tokens of a transformer out as the feature map that a convolutional network would have.

    The patches are the *last* h*w tokens, row by row: class and register tokens, which come first, are left out.

    Args:
        tokens: Tokens, or a map with the channels last, as Swin has.
        grid: Rows and columns of patches (h, w).

    Shapes:
        - **tokens** [B, N, C] with N >= h*w, or [B, h, w, C]; **output** [B, C, h, w], a view in channels_last order

    Raises:
        ValueError: If the tokens cannot fill the grid.

    Examples:
        >>> tokens_to_map(torch.zeros(2, 197, 768), (14, 14)).shape
        torch.Size([2, 768, 14, 14])
    """
    height, width = grid
    if tokens.dim() == 3 and tokens.size(1) >= height * width:
        tokens = tokens[:, -height * width :].unflatten(1, (height, width))
    if tokens.dim() != 4 or tuple(tokens.shape[1:3]) != (height, width):
        raise ValueError(f"Expected tokens [B, N, C] with N >= {height * width}, or [B, {height}, {width}, C] (got {list(tokens.shape)})")
    return tokens.permute(0, 3, 1, 2)


class _Calls:
    """Counts the calls through taps that are under way.

    Compiled code is guarded by globals but not by what hooks hold, so it is this count that tells it whether to record.
    """

    def __init__(self) -> None:
        self.depth = 0


_CALLS = _Calls()


class _Recorder:
    """What the hooks of one FeatureTaps share with it. It holds tensors during a call only, so models stay copyable."""

    def __init__(self) -> None:
        self.active = False
        self.maps: dict[str, Tensor] = {}
        self.seen: dict[tuple[str, bool], tuple[Tensor, int]] = {}
        # Whether the network overwrites a module's output, by path and training mode; absent: not known yet.
        self.overwritten: dict[tuple[str, bool], bool] = {}

    def record(self, path: str, training: bool, output: object) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(f"Expected the module at {path!r} to return a tensor (got {type(output).__name__}); tap a module inside it")
        key = (path, training)
        self.maps[path] = output if self.overwritten.get(key) is False else output.clone()
        # Neither compiled code nor inference mode counts versions: what is not known by then is cloned every time.
        if not torch.compiler.is_compiling() and not output.is_inference():
            self.seen[key] = (output, output._version)

    def learn(self) -> None:
        """Finds out, after a forward pass, which outputs were overwritten in place since they were recorded."""
        for (path, training), (output, version) in self.seen.items():
            changed = output._version != version
            if changed and self.maps[path] is output:
                self.overwritten[path, training] = True
                raise RuntimeError(
                    f"Expected the output of {path!r} to stay as it is in the forward pass, as it did before "
                    "(got an in-place change); call again: it is copied from now on"
                )
            self.overwritten[path, training] = changed or self.overwritten.get((path, training), False)
            if not self.overwritten[path, training]:
                # The copy was not needed: the first call gives what all later ones give, or gradients would be summed in another order.
                self.maps[path] = output

    def clear(self) -> None:
        self.active = False
        self.maps = {}
        self.seen = {}


class _Hook:
    """A forward hook that can be copied and pickled with its module."""

    def __init__(self, path: str, recorder: _Recorder) -> None:
        self.path = path
        self.recorder = recorder

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if _CALLS.depth and self.recorder.active:
            self.recorder.record(self.path, module.training, output)


class FeatureTaps:
    """Calls a model and returns, beside its output, what chosen modules inside it returned.

    No model is rewritten: the modules get forward hooks, which do nothing unless the model is called through the taps. A
    tapped map is the module's output as it left the module, even where a later layer (an in-place ReLU) overwrites it: such
    outputs are found on the first call and copied. Of a module that is used several times in a pass, the last output counts.

    `FeatureTaps` is no `nn.Module`, so an owner that holds it does not hold the model a second time. Models with taps can be
    copied and pickled; a copy of the taps together with their model works on the copy. Make the taps before a compiled
    model is called for the first time.

    Args:
        model: Any network, also inside `torch.compile`, `DistributedDataParallel` or :class:`Teacher`.
        paths: Module paths inside the network, as in `model.named_modules()`. `path@HxW` lays the tokens of a transformer out
            as a map (see tokens_to_map): 'blocks.11@14x14'.

    Raises:
        ValueError: If there is no module of that path; the nearest are listed.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3, stride=2))
        >>> taps = FeatureTaps(model, ["0", "1"])
        >>> output, features = taps(torch.randn(2, 3, 8, 8))
        >>> bool(features["0"].min() < 0), bool(features["1"].min() < 0)
        (True, False)
        >>> taps.shapes((3, 8, 8))
        {'0': torch.Size([2, 8, 8, 8]), '1': torch.Size([2, 8, 8, 8])}
    """

    def __init__(self, model: nn.Module, paths: str | Iterable[str]) -> None:
        self.model = model
        self.paths = tuple(dict.fromkeys([paths] if isinstance(paths, str) else paths))
        self._grids: dict[str, tuple[int, int]] = {}
        self._recorder = _Recorder()
        self._shapes: dict[tuple[int, ...], dict[str, torch.Size]] = {}
        wrapped = list(layers(model))
        found = [self._find(path, wrapped) for path in self.paths]
        # Shapes are probed in what holds the paths, without what is wrapped around it (compiled code, other processes).
        self._root = wrapped[min((layer for layer, _ in found), default=0)]
        self._closed = False
        self._handles = [
            module.register_forward_hook(_Hook(path, self._recorder)) for path, (_, module) in zip(self.paths, found, strict=True)
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Calls the model.

        Returns:
            The model's output and the tapped {path: feature map}, in the order of the paths.

        Raises:
            ValueError: If a tapped module was not reached.
            TypeError: If a tapped module returned something other than a tensor.
        """
        return self._call(self.model, *args, **kwargs)

    def shapes(self, input_size: Sequence[int], batch: int = 2) -> dict[str, torch.Size]:
        """Returns the shapes of the tapped maps, from one pass of zeros that leaves no trace.

        The pass runs in eval mode without gradient and is not compiled; training modes, norm statistics and random generators
        are afterwards as before. The answer is remembered.

        Args:
            input_size: Size of one input, (3, 32, 32).
            batch: Number of inputs: the first size of every shape.
        """
        key = (batch, *input_size)
        if key not in self._shapes:
            model = self._root
            parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
            modes = {module: module.training for module in model.modules()}
            devices = [parameter.device] if parameter.is_cuda else []
            # Only where something may be compiled: the import behind set_stance takes seconds.
            eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
            try:
                model.eval()
                with torch.no_grad(), torch.random.fork_rng(devices=devices), eager:
                    _, features = self._call(model, parameter.new_zeros(key))
            finally:
                for module, training in modes.items():
                    module.training = training
            self._shapes[key] = {path: feature.shape for path, feature in features.items()}
        return dict(self._shapes[key])

    def close(self) -> None:
        """Takes the hooks off the model; the taps cannot be called any more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._closed = True

    def _find(self, path: str, wrapped: Sequence[nn.Module]) -> tuple[int, nn.Module]:
        """Returns the module at a path and the number of the wrapping, from the outside, in which the path begins."""
        match = _GRID.fullmatch(path)
        name = match["path"] if match else path
        if match:
            self._grids[path] = (int(match["height"]), int(match["width"]))
        known: dict[str, nn.Module] = {}
        for layer, model in enumerate(wrapped):
            known = {known_name: module for known_name, module in model.named_modules(remove_duplicate=False) if known_name}
            if name in known:
                return layer, known[name]
        raise ValueError(f"Expected the path of a module of {type(wrapped[-1]).__name__}, such as {near(name, known)} (got {path!r})")

    def _call(self, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        if self._closed:
            raise RuntimeError("Expected taps on the model (got taps that are closed)")
        recorder = self._recorder
        recorder.active = True
        _CALLS.depth += 1
        try:
            output = model(*args, **kwargs)
            recorder.learn()
            maps = recorder.maps
        finally:
            _CALLS.depth -= 1
            recorder.clear()
        missed = [path for path in self.paths if path not in maps]
        if missed:
            raise ValueError(
                f"Expected the forward pass to call the modules at {', '.join(self.paths)} (got no call of {', '.join(missed)}); "
                "tap a module that is called, and make the taps before the first call of a compiled model"
            )
        features = {path: maps[path] for path in self.paths}
        for path, grid in self._grids.items():
            features[path] = tokens_to_map(features[path], grid)
        return output, features
