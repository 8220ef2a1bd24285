from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gkd.models.cifar import CIFAR_MODELS
from gkd.models.libraries.classifier import Classifier, Preprocessing, call, not_downloaded, say_new_head
from gkd.models.names import near


def open_torchvision(name: str, num_classes: int | None, weights: str | None, options: Mapping[str, Any]) -> Classifier:
    """Builds a classifier of torchvision, with published weights where `weights` names some: 'DEFAULT', 'IMAGENET1K_V1'.

    Args:
        name: Of torchvision's.
        num_classes: Number of classes; None for that of the published weights.
        weights: Name of published weights, or a file, which is left to the caller.
        options: Keyword arguments of the network.
    """
    try:
        from torchvision import models
    except ImportError as error:
        raise ValueError(
            f"Expected one of {near(name, CIFAR_MODELS)}, or torchvision to be installed for {name!r} (got: {error})"
        ) from error
    names = models.list_models(module=models)
    if name not in names:
        raise ValueError(
            f"Expected the name of a classifier, such as {near(name, [*CIFAR_MODELS, *names])}; or one with its origin, as in "
            f"'torchvision:NAME', 'timm:NAME', 'transformers:NAME', 'package.module:factory' (got {name!r})"
        )
    published = models.get_model_weights(name)
    # A member by its name, also with the enum's: IMAGENET1K_V1, ResNet34_Weights.IMAGENET1K_V1.
    chosen = published.__members__.get(str(weights).removeprefix(f"{published.__name__}."))
    builder = models.get_model_builder(name)
    if chosen is None:
        if weights is not None and not os.path.exists(os.path.expanduser(weights)):
            raise FileNotFoundError(
                f"Expected weights of {name} (got {weights!r}): a file that exists, or one of {', '.join(published.__members__)}"
            )
        count = {} if num_classes is None else {"num_classes": num_classes}
        model = call(name, builder, {"weights": None, **count, **options})
        return Classifier(_without_auxiliary_heads(model, options), num_classes)
    try:
        model = call(name, builder, {"weights": chosen, **options})
    except OSError as error:
        raise not_downloaded(f"torchvision's {chosen}", error, f"put {chosen.url} into {torch.hub.get_dir()}/checkpoints") from error
    classes = len(chosen.meta["categories"])
    layers: list[str] = []
    if num_classes is not None and num_classes != classes:
        layers = _replace_head(model, call(name, builder, {"weights": None, "num_classes": num_classes, **options}))
        say_new_head(layers, f"torchvision's {chosen}", classes, num_classes)
    transform = chosen.transforms()
    size = tuple(transform.crop_size) * (3 - len(transform.crop_size))
    preprocessing = Preprocessing(tuple(transform.mean), tuple(transform.std), (size[0], size[1]))
    return Classifier(_without_auxiliary_heads(model, options), num_classes or classes, preprocessing, layers, loaded=True)


def _replace_head(model: nn.Module, fresh: nn.Module) -> list[str]:
    """Puts the layers of another shape from a fresh network of the same architecture into a model; returns their names."""
    layers = []
    for path, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if any(parameter.shape != fresh.get_submodule(path).get_parameter(name).shape for name, parameter in parameters.items()):
            layers.append(path)
    for path in layers:
        model.set_submodule(path, fresh.get_submodule(path))
    return layers


def _without_auxiliary_heads(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """googlenet and inception_v3 return several outputs in training because of auxiliary heads, unless they are taken off."""
    if not options.get("aux_logits") and getattr(model, "aux_logits", False):
        for attribute, off in {"aux_logits": False, "AuxLogits": None, "aux1": None, "aux2": None}.items():
            if hasattr(model, attribute):
                setattr(model, attribute, off)
    return model
