"""How the output of a module becomes a feature map [B, C, h, w], whatever order its axes have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gkd.models.modes import evaluating

Size = tuple[int, int]
EXTRA_TOKENS = 5  # a class token and four registers: what stands before the patches of a published transformer
_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    _BatchNorm,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)


def tokens_to_map(tokens: Tensor, grid: Size, extra: int = EXTRA_TOKENS) -> Tensor:
    """Lays the tokens of a transformer out as the feature map that a convolutional network would have.

    The patches are the *last* h*w tokens, row by row: class, distillation and register tokens, which come first, are left out.

    Args:
        tokens: Tokens, or a map with the channels last, as Swin has.
        grid: Rows and columns of patches (h, w).
        extra: How many tokens may be left out. More of them mean that the grid is another one.

    Shapes:
        - **tokens** [B, N, C] with h*w <= N <= h*w + extra, or [B, h, w, C]; **output** [B, C, h, w], a view in channels_last order

    Raises:
        ValueError: If the tokens cannot fill the grid, or are too many for it.

    Examples:
        >>> tokens_to_map(torch.zeros(2, 197, 768), (14, 14)).shape
        torch.Size([2, 768, 14, 14])
    """
    height, width = grid
    count = height * width
    if tokens.dim() == 3 and count <= tokens.size(1) <= count + extra:
        tokens = tokens[:, -count:].unflatten(1, (height, width))
    if tokens.dim() != 4 or tuple(tokens.shape[1:3]) != (height, width):
        raise ValueError(
            f"Expected tokens [B, N, C] with N from {count} to {count + extra} (class and register tokens come first), or a map "
            f"[B, {height}, {width}, C] (got {list(tokens.shape)})"
        )
    return tokens.permute(0, 3, 1, 2)


def fits(size: Sequence[int], image_size: Size) -> bool:
    """Tells whether a map of this height and width can come from such images by equal strides, each side rounded.

    Examples:
        >>> fits((7, 7), (224, 224)), fits((7, 8), (224, 224)), fits((7, 13), (224, 400))
        (True, False, True)
    """
    return abs(size[0] * image_size[1] - size[1] * image_size[0]) < max(image_size)


def patch_grid(model: nn.Module, image_size: Size) -> Size | None:
    """Rows and columns of patches of the model's own patch embedding, its first convolution whose stride is its kernel; None without."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if module.stride == module.kernel_size and module.stride > (1, 1):
                height, width = ((side - kernel) // kernel + 1 for side, kernel in zip(image_size, module.kernel_size, strict=True))
                return height, width
            return None
    return None


def token_grid(model: nn.Module, tokens: int, image_size: Size) -> Size | None:
    """Rows and columns in which so many tokens of a model lie; None where they form no grid of the image's shape.

    It is the grid of the patch embedding, halved as often as the network has merged patches by then. For a network without one it is the
    largest grid of the image's shape that leaves at most as many tokens over as a model has beside its patches.
    """
    extra = extra_tokens(model)
    grid = patch_grid(model, image_size)
    if grid is not None:
        while grid > (1, 1) and grid[0] * grid[1] > tokens:
            grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        return grid if 0 <= tokens - grid[0] * grid[1] <= extra else None
    for patches in range(tokens, max(tokens - extra, 1) - 1, -1):
        for height in range(1, patches + 1):
            if patches % height == 0 and fits((height, patches // height), image_size):
                return height, patches // height
    return None


def extra_tokens(model: nn.Module) -> int:
    """The largest number of class, distillation and register tokens to expect; timm's models say how many they have."""
    declared = getattr(model, "num_prefix_tokens", 0)
    return max(EXTRA_TOKENS, declared if isinstance(declared, int) else 0)


def channels_last(
    shape: Sequence[int], image_size: Size | None, module: nn.Module, reshape: Callable[[], Sequence[int] | None]
) -> bool | None:
    """Tells whether a module's output [B, ., ., .] has its channels last; None where nothing shows it.

    Height and width are those two axes that have the shape of the image. Where that is true of both readings, or of none, the types of the
    module's layers decide, and then which axes change with the size of the image.

    Args:
        shape: Of the output.
        image_size: Height and width of the images that led to it, where these are known.
        module: Where it comes from.
        reshape: Gives the shape of the output for images of another size; None where the model takes no others.
    """
    if image_size is not None:
        first, last = fits(shape[2:], image_size), fits(shape[1:3], image_size)
        if first != last:
            return last
    leaves = [
        leaf for leaf in module.modules() if isinstance(leaf, _CHANNELS_FIRST) or next(leaf.parameters(recurse=False), None) is not None
    ]
    if leaves and all(isinstance(leaf, _CHANNELS_FIRST) for leaf in leaves):
        return False
    resized = reshape()
    if resized is None or len(resized) != 4:
        return None
    moved = [before != after for before, after in zip(shape, resized, strict=True)]
    return None if moved[1] == moved[3] else moved[1]


def probe(model: nn.Module, modules: dict[str, nn.Module], input_size: Sequence[int], batch: int = 1) -> dict[str, torch.Size]:
    """Shapes of what modules return in one pass of zeros, of those that are called and return a tensor, in the order of the calls.

    The pass runs in eval mode, without gradient; modes and random generators are afterwards as before.

    Args:
        model: The network that is called.
        modules: Modules inside it by name.
        input_size: [C, H, W] of an image.
        batch: Number of images.
    """
    shapes: dict[str, torch.Size] = {}

    def record(name: str, output: object) -> None:
        tensor = single_tensor(output)
        if tensor is not None:
            shapes.pop(name, None)  # of a module that is called again the last output counts, also for the order
            shapes[name] = tensor.shape

    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: record(name, output)) for name, module in modules.items()
    ]
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[parameter.device] if parameter.is_cuda else []):
            model(parameter.new_zeros((batch, *input_size)))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def probe_other_size(model: nn.Module, modules: dict[str, nn.Module], input_size: Sequence[int]) -> dict[str, torch.Size]:
    """What `probe` gives for images of twice or half the size; nothing where the network takes neither."""
    channels, height, width = input_size
    for size in ((2 * height, 2 * width), (height // 2, width // 2)):
        try:
            return probe(model, modules, (channels, *size))
        except Exception:  # networks refuse sizes with errors of every type
            continue
    return {}


def single_tensor(output: object) -> Tensor | None:
    """A tensor, also as the only one in a tuple, as layers of transformers return it; None for anything else."""
    if isinstance(output, tuple) and len(output) == 1:
        output = output[0]
    return output if isinstance(output, Tensor) else None
