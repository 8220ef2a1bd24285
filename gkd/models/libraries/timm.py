from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from gkd.models.libraries.classifier import Classifier, Preprocessing, call, not_downloaded, say_new_head
from gkd.models.names import near

HUBS = ("hf-hub:", "hf_hub:", "local-dir:")


def open_timm(name: str, num_classes: int | None, weights: str | None, options: Mapping[str, Any]) -> Classifier:
    """Builds a model of timm, with the weights that timm publishes where `weights` is 'DEFAULT'.

    Args:
        name: Of timm's, `hf-hub:owner/model`, or a folder that such a model was saved in.
        num_classes: Number of classes; None for that of the published weights.
        weights: 'DEFAULT', or a file, which is left to the caller.
        options: Keyword arguments of the network.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"Expected timm to be installed for 'timm:{name}' (got: {error}); pip install timm") from error
    if os.path.isdir(os.path.expanduser(name)):
        name = f"local-dir:{os.path.expanduser(name)}"
    if not name.startswith(HUBS):
        _check_name(name)
    pretrained = weights == "DEFAULT"
    if pretrained and not name.startswith(HUBS):
        config = timm.get_pretrained_cfg(name)
        if config is None or not config.has_weights:
            published = near(name, timm.list_pretrained())
            raise ValueError(f"Expected a model of timm with published weights, such as {published} (got {name!r})")
    count = {} if num_classes is None else {"num_classes": num_classes}
    arguments = {"model_name": name, "pretrained": pretrained, **count, **options}
    try:
        model = call(f"timm:{name}", timm.create_model, arguments)
    except ValueError:
        raise
    except Exception as error:  # the clients of the hub share no error type
        if not pretrained and not name.startswith(HUBS):
            raise
        raise not_downloaded(f"timm's weights of {name}", error, "download them on another machine") from error
    about: Any = model.pretrained_cfg
    classes = int(about.get("num_classes", 1000)) or None
    layers: list[str] = []
    if pretrained and num_classes is not None and num_classes != classes:
        head = about.get("classifier") or "head"
        layers = [head] if isinstance(head, str) else list(head)
        say_new_head(layers, f"timm's weights of {name}", classes, num_classes)
    if not pretrained and weights is not None and num_classes not in (None, classes):
        return Classifier(model, num_classes)  # a file of somebody's own training: how its images were prepared is not known
    return Classifier(model, num_classes or classes, _preprocessing(model), layers, loaded=pretrained)


def _check_name(name: str) -> None:
    import timm

    try:
        exists = timm.is_model(name)
        if exists:
            timm.get_pretrained_cfg(name)
    except RuntimeError:  # the model exists, the tag behind its dot does not
        exists = False
    if not exists:
        names = timm.list_pretrained() if "." in name else timm.list_models()
        raise ValueError(f"Expected the name of a model of timm, such as {near(name, names)} (got {name!r})")


def _preprocessing(model: nn.Module) -> Preprocessing:
    import timm.data

    config = timm.data.resolve_model_data_config(model)
    # A network that was built for images of one size says so; its configuration still has that of the weights.
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    return Preprocessing(tuple(config["mean"]), tuple(config["std"]), (size[0], size[1]))
