"""Configurations of Detectron2 as text: written so that plain Detectron2 reads them, and read so that nothing in them runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gkd.errors import UserError
from gkd.files import write_atomic

_log = logging.getLogger(__name__)

# What a file may ask to be built. What lies elsewhere has to be asked for by its own LazyConfig, in DetectorNetwork.config.
PACKAGES = ("detectron2.modeling.", "detectron2.layers.", "detectron2.structures.", "torch.nn.", "torchvision.ops.", "gkd.detection.d2.")


def config_text(config: Any) -> str | None:
    """A configuration as YAML; None where it holds what no text can say, such as a function."""
    from omegaconf import DictConfig

    if not isinstance(config, DictConfig):
        return str(config.dump())
    import yaml

    try:
        return str(yaml.safe_dump(_plain({name: config[name] for name in ("model", "dataloader") if name in config})))
    except yaml.YAMLError:
        return None


def parse_config(text: str, source: str) -> Any:
    """The configuration in a text: a CfgNode, or a DictConfig with a ``model``.

    Raises:
        UserError: If it holds anything but plain values, or asks for something outside of `PACKAGES`.
    """
    import yaml
    from detectron2.config import CfgNode, get_cfg
    from omegaconf import OmegaConf

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"Expected a configuration of plain values in {source} (got: {str(error).splitlines()[0]}). If you trust it, name it as "
            "DetectorNetwork.config, as a LazyConfig."
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"Expected a configuration of Detectron2 in {source} (got {type(content).__name__})")
    if "model" in content:
        _check_targets(content["model"], source)
        return OmegaConf.create(dict(content))
    config = get_cfg()
    try:
        config.merge_from_other_cfg(CfgNode(dict(content)))
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(f"Expected a configuration that Detectron2 reads in {source} (got {type(error).__name__}: {error})") from error
    return config


def save_config(config: Any, path: Path) -> None:
    """Writes the configuration as a YAML file that plain Detectron2 reads; one that no text can say is left out, with a warning."""
    text = config_text(config)
    if text is None:
        _log.warning("%s is not written: the LazyConfig holds functions, which no text can say; keep your own file of it", path)
        return
    write_atomic(path, lambda file: file.write(text.encode()))


def _plain(value: Any) -> Any:
    """Plain values of a LazyConfig, with the names of what it builds."""
    from detectron2.utils.registry import _convert_target_to_string
    from omegaconf import DictConfig, ListConfig, OmegaConf

    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        target = value.get("_target_")
        named = {} if target is None else {"_target_": target if isinstance(target, str) else _convert_target_to_string(target)}
        return {str(name): _plain(part) for name, part in value.items() if name != "_target_"} | named
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _check_targets(content: Any, source: str) -> None:
    from detectron2.utils.registry import locate

    for target in _targets(content):
        # A name may lead through a module to what that has imported: where the object comes from counts too.
        try:
            home = f"{getattr(locate(target), '__module__', '')}." if target.startswith(PACKAGES) else ""
        except ImportError:
            home = ""
        if not home.startswith(PACKAGES):
            raise UserError(
                f"Expected a configuration that builds parts of {', '.join(package[:-1] for package in PACKAGES)} alone in {source} (got "
                f"{target}). If you trust it, name the LazyConfig it comes from as DetectorNetwork.config."
            )


def _targets(content: Any) -> Iterator[str]:
    if isinstance(content, Mapping):
        if "_target_" in content:
            yield str(content["_target_"])
        for part in content.values():
            yield from _targets(part)
    elif isinstance(content, list):
        for part in content:
            yield from _targets(part)
