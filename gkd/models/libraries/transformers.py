from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gkd.models.libraries.classifier import Classifier, Preprocessing, not_downloaded, say_new_head

HEADS = ("classifier", "cls_classifier", "distillation_classifier")


def open_transformers(name: str, num_classes: int | None, weights: str | None, options: Mapping[str, Any]) -> Classifier:
    """Builds an image classifier of transformers, with the weights that come with it where `weights` is 'DEFAULT'.

    Code that a repository brings is not run.

    Args:
        name: `owner/model` of the Hugging Face hub, or a folder that a model was saved in. Without a last layer (DINOv2) it gets one.
        num_classes: Number of classes; None for that of the model.
        weights: 'DEFAULT', or a file, which is left to the caller.
        options: Entries of the model's configuration to change, such as `image_size`.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"Expected transformers to be installed for 'transformers:{name}' (got: {error}); pip install transformers"
        ) from error
    name = os.path.expanduser(name)
    try:
        with _quiet(transformers.utils.logging):
            config = transformers.AutoConfig.from_pretrained(name, **options)
            classes: int | None = config.num_labels
            if num_classes is not None and num_classes != classes:
                config.num_labels = num_classes
            if weights != "DEFAULT":
                model: Any = transformers.AutoModelForImageClassification.from_config(config)
                missing: list[str] = []
            else:
                model, info = transformers.AutoModelForImageClassification.from_pretrained(
                    name, config=config, ignore_mismatched_sizes=True, output_loading_info=True
                )
                missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
                if info["missing_keys"]:
                    classes = None
    except OSError as error:
        if os.path.isdir(name):
            raise ValueError(f"Expected a model that save_pretrained wrote in {name} (got: {_first_line(error)})") from error
        raise not_downloaded(f"{name} from the Hugging Face hub", error, "download it on another machine and name the folder") from error
    except ValueError as error:
        raise ValueError(f"Expected an image classifier of transformers at {name} (got: {_first_line(error)})") from error
    lost = [key for key in missing if not key.startswith(HEADS)]
    if lost:
        raise ValueError(f"Expected the weights of {name} for this configuration (got none of this shape for {', '.join(lost[:6])})")
    layers = sorted({key.rpartition(".")[0] for key in missing})
    if layers and num_classes is not None:
        say_new_head(layers, f"the weights of {name}", classes, num_classes)
    return Classifier(model, num_classes or classes, _preprocessing(name, config), layers, loaded=weights == "DEFAULT")


def _preprocessing(name: str, config: Any) -> Preprocessing | None:
    """What the model's own image processor does, where there is one."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return None
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if mean is None or std is None:
        return None
    side = getattr(config, "image_size", None)
    size = (side, side) if isinstance(side, int) else None if side is None else (side[0], side[1])
    return Preprocessing(tuple(mean), tuple(std), size)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Leaves the report of what was loaded to the caller."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
