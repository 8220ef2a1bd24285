from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gkd.models.maps import Size, channels_last, extra_tokens, probe_other_size, single_tensor, token_grid, tokens_to_map
from gkd.models.modes import evaluating
from gkd.models.names import near
from gkd.models.teacher import Teacher
from gkd.models.wrappers import layers

_GRID = re.compile(r"(?P<path>.+)@(?:auto|(?P<height>[1-9]\d*)x(?P<width>[1-9]\d*))")


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
        tensor = single_tensor(output)
        if tensor is None:
            raise TypeError(f"Expected the module at {path!r} to return a tensor (got {type(output).__name__}); tap a module inside it")
        key = (path, training)
        self.maps[path] = tensor if self.overwritten.get(key) is False else tensor.clone()
        # Neither compiled code nor inference mode counts versions: what is not known by then is cloned every time.
        if not torch.compiler.is_compiling() and not tensor.is_inference():
            self.seen[key] = (tensor, tensor._version)

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

    Of images [B, C, H, W] every map comes as [B, C, h, w]. Where a module has its channels last, as in Swin and inside ConvNeXt, they are
    moved to the front, and `path@auto` lays the tokens of a transformer out by its own grid of patches.

    Args:
        model: Any network, also inside `torch.compile`, `DistributedDataParallel` or :class:`Teacher`.
        paths: Module paths inside the network, as in `model.named_modules()`; a negative number counts from the end: 'layer1.-1.relu'.
            'blocks.11@auto' or 'blocks.11@14x14' lays tokens out as a map (see tokens_to_map).

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
        self._grids: dict[str, Size | None] = {}  # of the paths with an @; None: the model's own grid
        self._channels_last: dict[str, bool] = {}
        self._recorder = _Recorder()
        self._shapes: dict[tuple[int, ...], dict[str, torch.Size]] = {}
        wrapped = list(layers(model))
        matches = [self._find(path, wrapped) for path in self.paths]
        self._modules = {path: module for path, (_, module) in zip(self.paths, matches, strict=True)}
        # Shapes are probed in what holds the paths, without what is wrapped around it (compiled code, other processes).
        depth = min((layer for layer, _ in matches), default=0)
        self._root = wrapped[depth]
        self._resizing = next((layer for layer in wrapped[:depth] if isinstance(layer, Teacher)), None)
        self._closed = False
        self._handles = [module.register_forward_hook(_Hook(path, self._recorder)) for path, module in self._modules.items()]

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Calls the model.

        Returns:
            The model's output and the tapped {path: feature map}, in the order of the paths.

        Raises:
            ValueError: If a tapped module was not reached, or its output cannot be read as a map.
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
        if self._resizing is not None:
            input_size = (input_size[0], *self._resizing.image_size(input_size[1:]))
        key = (batch, *input_size)
        if key not in self._shapes:
            model = self._root
            parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
            devices = [parameter.device] if parameter.is_cuda else []
            # Only where something may be compiled: the import behind set_stance takes seconds.
            eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
            with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=devices), eager:
                _, features = self._call(model, parameter.new_zeros(key))
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
            self._grids[path] = (int(match["height"]), int(match["width"])) if match["height"] else None
        names: list[str] = []
        for layer, model in enumerate(wrapped):
            module = _descend(model, name)
            if module is not None:
                return layer, module
            names = [candidate for candidate, _ in model.named_modules(remove_duplicate=False) if candidate]
        raise ValueError(f"Expected the path of a module of {type(wrapped[-1]).__name__}, such as {near(name, names)} (got {path!r})")

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
        images = args[0] if args and isinstance(args[0], Tensor) and args[0].dim() == 4 else None
        return output, {path: self._as_map(path, maps[path], images) for path in self.paths}

    def _as_map(self, path: str, output: Tensor, images: Tensor | None) -> Tensor:
        """Moves the channels of a module's output to the front and lays tokens out; where no images came in, only what is asked for."""
        if images is None:
            grid = self._grids.get(path)
            return output if grid is None else tokens_to_map(output, grid)
        size: Size = (images.size(2), images.size(3))
        if self._resizing is not None:
            size = self._resizing.image_size(size)
        if output.dim() in (3, 4) and output.size(0) != images.size(0):
            raise ValueError(
                f"Expected one map for each of the {images.size(0)} images at {path!r} (got {list(output.shape)}); tap a module around it"
            )
        if output.dim() == 3:
            return self._lay_out(path, output, size)
        if output.dim() == 4:
            grid = self._grids.get(path)
            if grid is not None:
                return tokens_to_map(output, grid)
            return output.permute(0, 3, 1, 2) if self._has_channels_last(path, output, (images.size(1), *size)) else output
        if path in self._grids:
            raise ValueError(f"Expected tokens or a map at {path!r} (got {list(output.shape)}); leave out what follows the @")
        return output

    def _lay_out(self, path: str, tokens: Tensor, size: Size) -> Tensor:
        natural = token_grid(self._root, tokens.size(1), size)
        if path not in self._grids:
            example = "@HxW, the rows and columns of its patches" if natural is None else f"@{natural[0]}x{natural[1]}"
            raise ValueError(
                f"Expected a map [B, C, h, w] or a vector [B, C] at {path!r} (got tokens {list(tokens.shape)}); to lay them out as a map, "
                f"write '{path}@auto' or '{path}{example}'"
            )
        grid = self._grids[path] or natural
        if grid is None:
            raise ValueError(
                f"Expected tokens that form a grid of the shape of the images, {size[0]}x{size[1]}, at {path!r} "
                f"(got {list(tokens.shape)}); give the rows and columns, as in '14x14' for 'auto'"
            )
        if natural is not None and grid != natural:
            raise ValueError(
                f"Expected the grid {natural[0]}x{natural[1]} for {tokens.size(1)} tokens of images {size[0]}x{size[1]} "
                f"(got {path!r}); write @auto or that grid"
            )
        return tokens_to_map(tokens, grid, extra_tokens(self._root))

    def _has_channels_last(self, path: str, output: Tensor, input_size: Sequence[int]) -> bool:
        if path not in self._channels_last:
            size: Size = (input_size[1], input_size[2])
            last = channels_last(output.shape, size, self._modules[path], lambda: self._probe_other_size(path, input_size))
            if last is None:
                raise ValueError(
                    f"Expected to see which axes of the output of {path!r} are height and width (got {list(output.shape)} of images "
                    f"{size[0]}x{size[1]}, and a network that is asked for no other size); tap a module before or after it"
                )
            self._channels_last[path] = last
        return self._channels_last[path]

    def _probe_other_size(self, path: str, input_size: Sequence[int]) -> torch.Size | None:
        if torch.compiler.is_compiling():
            return None
        return probe_other_size(self._root, {path: self._modules[path]}, input_size).get(path)


def _descend(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, in which a negative number counts the children from the end; None where there is none."""
    module: nn.Module | None = model if path else None
    for part in path.split("."):
        if module is None:
            break
        children = list(module._modules.values())
        from_end = re.fullmatch(r"-[1-9]\d*", part) is not None and int(part[1:]) <= len(children)
        module = children[int(part)] if from_end else module._modules.get(part)
    return module
