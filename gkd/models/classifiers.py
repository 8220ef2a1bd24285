from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gkd.models.cifar import CIFAR_MODELS
from gkd.models.names import near
from gkd.models.weights import load_weights

Weights = str | os.PathLike[str] | None


def build_classifier(name: str, num_classes: int = 1000, weights: Weights = None, **options: Any) -> nn.Module:
    """Builds a classifier by name.

    | name | network |
    |-|-|
    | `resnet20`, `wrn_40_2`, `vgg13`, `ShuffleV2`, ... | the CRD zoo for 32x32 images (gkd.models.cifar) |
    | `resnet34`, `vit_b_16`, ... | any classifier of torchvision |
    | `torchvision:vgg13` | the same, for the names that the CRD zoo has too |
    | `timm:NAME` | any model of timm, where it is installed |
    | `package.module:factory` | your own: `factory(num_classes=..., **options)` returns the network |

    Names are case-sensitive: `ResNet50` is the CRD zoo's, `resnet50` torchvision's.

    Args:
        name: See above.
        num_classes: Number of classes.
        weights: A file (see load_weights). For torchvision also the name of published weights, 'DEFAULT' or 'IMAGENET1K_V1';
            for timm 'DEFAULT'. None: drawn at random.
        options: Further keyword arguments of the network.

    Raises:
        ValueError: If the name is unknown (the nearest are listed), an option does not exist, or the weights are for another
            network or number of classes.
        FileNotFoundError: If the file of weights does not exist, or published weights cannot be downloaded.

    Examples:
        >>> model = build_classifier("resnet20", num_classes=100)
        >>> sum(parameter.numel() for parameter in model.parameters())
        278324
    """
    source, separator, rest = name.partition(":")
    if name in CIFAR_MODELS:
        model = _call(name, CIFAR_MODELS[name], num_classes, options)
    elif source == "timm" and separator:
        model, weights = _build_timm(rest, num_classes, weights, options)
    elif separator and source != "torchvision":
        model = _call(name, _import(source, rest), num_classes, options)
    else:
        model, weights = _build_torchvision(rest if separator else name, num_classes, weights, options)
    if weights is not None:
        load_weights(model, weights)
    return model


def _call(name: str, factory: Callable[..., Any], num_classes: int, options: dict[str, Any]) -> nn.Module:
    try:
        inspect.signature(factory).bind(num_classes=num_classes, **options)
    except TypeError as error:
        raise ValueError(
            f"Expected {name} to take num_classes{''.join(f', {option}' for option in options)} as keyword arguments "
            f"(got a factory with {inspect.signature(factory)}: {error})"
        ) from error
    model = factory(num_classes=num_classes, **options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"Expected {name} to return a torch.nn.Module (got {type(model).__name__})")
    return model


def _import(module_name: str, attribute: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that is found and lacks one of its own imports is another mistake, which its own error tells.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"Expected 'package.module:factory' with an importable module (got {module_name!r}: {error}); install it, or put its "
            "folder on PYTHONPATH"
        ) from error
    factory: Any = module
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise ValueError(f"Expected a function or class of {module_name}, such as {near(part, dir(factory))} (got {attribute!r})")
        factory = getattr(factory, part)
    if not callable(factory):
        raise ValueError(f"Expected {module_name}:{attribute} to be callable (got {type(factory).__name__})")
    return factory


def _build_torchvision(name: str, num_classes: int, weights: Weights, options: dict[str, Any]) -> tuple[nn.Module, Weights]:
    """Builds a classifier of torchvision; returns the weights still to be loaded too."""
    try:
        from torchvision import models
    except ImportError as error:
        raise ValueError(
            f"Expected one of {near(name, CIFAR_MODELS)}, or torchvision to be installed for {name!r} (got: {error})"
        ) from error
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(
            f"Expected the name of a classifier, such as {near(name, [*CIFAR_MODELS, *known])}; or one with its origin, as in "
            f"'torchvision:NAME', 'timm:NAME', 'package.module:factory' (got {name!r})"
        )
    published = models.get_model_weights(name)
    # A member by its name, also with the enum's: IMAGENET1K_V1, ResNet34_Weights.IMAGENET1K_V1.
    chosen = published.__members__.get(str(weights).removeprefix(f"{published.__name__}."))
    builder = models.get_model_builder(name)
    if chosen is None:
        if weights is not None and not os.path.exists(weights):
            raise FileNotFoundError(
                f"Expected weights of {name} (got {os.fspath(weights)!r}): a file that exists, or one of {', '.join(published.__members__)}"
            )
        model = _build(name, builder, weights=None, num_classes=num_classes, **options)
    else:
        weights = None
        _check_classes(f"torchvision's {chosen} weights of {name}", len(chosen.meta["categories"]), num_classes)
        try:
            model = _build(name, builder, weights=chosen, **options)
        except OSError as error:
            raise _not_downloaded(f"torchvision's {chosen}", error, f"put {chosen.url} into {torch.hub.get_dir()}/checkpoints") from error
    # googlenet and inception_v3 return several outputs in training because of auxiliary heads, unless they are taken off.
    if not options.get("aux_logits") and getattr(model, "aux_logits", False):
        for attribute, off in {"aux_logits": False, "AuxLogits": None, "aux1": None, "aux2": None}.items():
            if hasattr(model, attribute):
                setattr(model, attribute, off)
    return model, weights


def _build_timm(name: str, num_classes: int, weights: Weights, options: dict[str, Any]) -> tuple[nn.Module, Weights]:
    """Builds a model of timm; returns the weights still to be loaded too."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"Expected timm to be installed for 'timm:{name}' (got: {error}); pip install timm") from error
    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        known = timm.is_model(name)
    except RuntimeError:  # the model is known, the tag behind its dot is not
        known = False
    if not known:
        names = timm.list_pretrained() if "." in name else timm.list_models()
        raise ValueError(f"Expected the name of a model of timm, such as {near(name, names)} (got {name!r})")
    if weights != "DEFAULT":
        return _build(f"timm:{name}", timm.create_model, model_name=name, num_classes=num_classes, **options), weights
    if config is None or not config.has_weights:
        raise ValueError(f"Expected a model of timm with published weights, such as {near(name, timm.list_pretrained())} (got {name!r})")
    _check_classes(f"timm's weights of {name}", config.num_classes, num_classes)
    try:
        return timm.create_model(name, num_classes=num_classes, pretrained=True, **options), None
    except Exception as error:  # the clients of the hub share no error type
        raise _not_downloaded(f"timm's weights of {name}", error, "download them on another machine") from error


def _build(name: str, library_factory: Callable[..., nn.Module], **arguments: Any) -> nn.Module:
    """Calls a factory of a library, which passes its options on without naming them: a wrong one ends in a TypeError."""
    try:
        return library_factory(**arguments)
    except TypeError as error:
        raise ValueError(f"Expected options that {name} takes (got: {error})") from error


def _check_classes(weights: str, classes: int, num_classes: int) -> None:
    if classes != num_classes:
        raise ValueError(
            f"Expected num_classes={classes}, as {weights} have (got {num_classes}); for other classes start from "
            "weights=None or from a file of a network trained on them"
        )


def _not_downloaded(weights: str, error: Exception, remedy: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"Expected to download {weights} (got: {error}); where this machine has no access, {remedy}, or give a file as weights"
    )
