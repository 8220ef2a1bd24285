from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Preprocessing:
    """How the images were prepared that published weights were trained on.

    Args:
        mean: Mean of each channel, RGB, of pixels in [0, 1].
        std: Standard deviation of each channel.
        size: Height and width.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Classifier:
    """A network, and what is known of the weights that it was built with.

    Args:
        model: The network.
        num_classes: Classes of its last layer; None where the weights have no last layer and it was drawn at random.
        preprocessing: How the images of published weights were prepared; None where this is not known.
        new_layers: Names of the layers that were drawn at random because the weights have none for these classes.
        loaded: Whether the weights are in the model. A file is loaded by whoever asked for the network.
    """

    model: nn.Module
    num_classes: int | None
    preprocessing: Preprocessing | None = None
    new_layers: Sequence[str] = ()
    loaded: bool = False


def call(name: str, factory: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """Calls a factory of a library, which passes its options on without naming them: a wrong one ends in a TypeError."""
    try:
        return factory(**arguments)
    except TypeError as error:
        raise ValueError(f"Expected options that {name} takes (got: {error})") from error


def say_new_head(layers: Sequence[str], weights: str, their_classes: int | None, num_classes: int) -> None:
    """Says in one line that a last layer is new."""
    had = "no classes" if their_classes is None else f"{their_classes} classes"
    warnings.warn(f"The last layer ({', '.join(layers)}) is new, for {num_classes} classes: {weights} have {had}", stacklevel=2)


def not_downloaded(weights: str, error: Exception, remedy: str) -> FileNotFoundError:
    """The error of weights that could not be downloaded, with what to do instead."""
    return FileNotFoundError(
        f"Expected to download {weights} (got: {error}); where this machine has no access, {remedy}, or give a file as weights"
    )
