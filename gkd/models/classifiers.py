from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from gkd.models.cifar import CIFAR_MODELS
from gkd.models.libraries.classifier import Classifier, say_new_head
from gkd.models.libraries.timm import HUBS, open_timm
from gkd.models.libraries.torchvision import open_torchvision
from gkd.models.libraries.transformers import open_transformers
from gkd.models.names import near
from gkd.models.weights import OtherClasses, load_weights

Weights = str | os.PathLike[str] | None
# Options that make a library download, or read, files that somebody else chose.
LOADING_OPTIONS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "weights", "cache_dir", "weights_backbone")


def build_classifier(name: str, num_classes: int = 1000, weights: Weights = None, **options: Any) -> nn.Module:
    """Builds a classifier by name.

    * ``resnet20``, ``wrn_40_2``, ``vgg13``, ``ShuffleV2``, ...: the CRD zoo for 32x32 images (gkd.models.cifar).
    * ``resnet34``, ``vit_b_16``, ...: any classifier of torchvision.
    * ``torchvision:vgg13``: the same, for the names that the CRD zoo has too.
    * ``timm:NAME``, ``timm:hf-hub:OWNER/NAME``, ``timm:FOLDER``: any model of timm, where it is installed.
    * ``transformers:OWNER/NAME``, ``transformers:FOLDER``: any image classifier of transformers, where it is installed.
    * ``package.module:factory``: your own; ``factory(num_classes=..., **options)`` returns the network.

    Names are case-sensitive: `ResNet50` is the CRD zoo's, `resnet50` torchvision's. Weights for another number of classes are taken but for
    the last layer, which is drawn at random; a warning says so.

    Args:
        name: See above.
        num_classes: Number of classes.
        weights: A file (see load_weights). For torchvision also the name of published weights, 'DEFAULT' or 'IMAGENET1K_V1';
            for timm and transformers 'DEFAULT'. None: drawn at random.
        options: Further keyword arguments of the network; of transformers, entries of its configuration.

    Raises:
        ValueError: If the name is unknown (the nearest are listed), an option does not exist, or the weights are for another
            network.
        FileNotFoundError: If the file of weights does not exist, or published weights cannot be downloaded.

    Examples:
        >>> model = build_classifier("resnet20", num_classes=100)
        >>> sum(parameter.numel() for parameter in model.parameters())
        278324
    """
    return open_classifier(name, num_classes, weights, options).model


def open_classifier(
    name: str, num_classes: int, weights: Weights = None, options: Mapping[str, Any] | None = None, keep_classes: bool = False
) -> Classifier:
    """Builds a classifier as `build_classifier` does, and says what is known of its weights.

    Args:
        name: As there.
        num_classes: As there.
        weights: As there.
        options: As there.
        keep_classes: Whether weights for another number of classes keep it, with their last layer.
    """
    weights = None if weights is None else os.fspath(weights)
    classifier = _open(name, num_classes, weights, options or {}, keep_classes)
    if weights is None or classifier.loaded:
        return classifier
    try:
        layers = load_weights(classifier.model, weights)
    except OtherClasses as error:
        if keep_classes:
            classifier = _open(name, error.classes, weights, options or {}, keep_classes=False)
            load_weights(classifier.model, weights)
            return classifier
        layers = load_weights(classifier.model, weights, new_head=True)
        say_new_head(layers, f"the weights in {weights}", error.classes, num_classes)
    return replace(classifier, new_layers=layers, loaded=True)


def is_safe(name: str, options: Mapping[str, Any]) -> bool:
    """Tells whether a description leads to nothing but networks of the zoo, torchvision and timm: neither foreign code nor downloads."""
    source, separator, rest = name.partition(":")
    return (not separator or source in ("torchvision", "timm")) and not rest.startswith(HUBS) and options.keys().isdisjoint(LOADING_OPTIONS)


def _open(name: str, num_classes: int, weights: str | None, options: Mapping[str, Any], keep_classes: bool) -> Classifier:
    source, separator, rest = name.partition(":")
    if name in CIFAR_MODELS:
        return Classifier(_call(name, CIFAR_MODELS[name], num_classes, options), num_classes)
    libraries = {"timm": open_timm, "transformers": open_transformers, "torchvision": open_torchvision}
    if separator and source not in libraries:
        return Classifier(_call(name, import_factory(source, rest), num_classes, options), num_classes)
    published = weights is not None and not os.path.exists(os.path.expanduser(weights))
    count = None if keep_classes and published else num_classes
    return libraries[source](rest, count, weights, options) if separator else open_torchvision(name, count, weights, options)


def _call(name: str, factory: Callable[..., Any], num_classes: int, options: Mapping[str, Any]) -> nn.Module:
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


def import_factory(module_name: str, attribute: str) -> Callable[..., Any]:
    """The function or class at the end of `package.module:factory`; a ValueError names what is missing."""
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that is there and lacks one of its own imports is another mistake, which its own error tells.
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
