from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from gkd.distill.weights import LossName, unknown_name
from gkd.errors import UserError

LEVELS = ("logits", "stage", "stages")


@dataclass(frozen=True)
class Call:
    """One evaluation of a term: at one stage for a term of the level ``'stage'``, of the whole term otherwise."""

    term: str
    stages: tuple[str, ...]
    level: str
    losses: Mapping[str | None, str]
    """Full name of every value that comes back, by its part; the part is None where the term returns a single value."""
    adapted: bool
    map_size: tuple[int, int] | None
    indexed: bool
    located: bool
    builds: bool

    @property
    def names(self) -> list[LossName]:
        """The addresses of what comes back."""
        return [loss_name(self.term, self.level, self.stages, part) for part in self.losses]

    @property
    def key(self) -> str:
        """Name of the module: a term that owns layers is one module per stage."""
        own = self.builds and self.level == "stage"
        return module_key(f"{self.term}/{self.stages[0]}" if own else self.term)


def loss_name(term: str, level: str, stages: Sequence[str], part: str | None) -> LossName:
    """Addresses what a term returns."""
    return LossName(term, stages[0] if level == "stage" else None, part)


def plan_calls(terms: Mapping[str, nn.Module], known: Sequence[str], stages: Mapping[str, Sequence[str]]) -> list[Call]:
    """Lists which term is evaluated at which stages.

    Args:
        terms: The losses by name.
        known: All stages, shallow to deep.
        stages: The stages of a term, where these are not all.

    Raises:
        UserError: If a name is unknown or cannot be used, or a term has nothing to look at.
    """
    for stage in known:
        _check_name(stage, "stage")
    for term in stages:
        if term not in terms:
            raise UserError(unknown_name("a key of 'stages'", term, list(terms)))
    calls = []
    for term, loss in terms.items():
        _check_name(term, "term")
        level = getattr(loss, "level", None)
        if level not in LEVELS:
            raise UserError(
                f"Expected term '{term}' to have the attribute 'level', one of {', '.join(LEVELS)} (got {level!r} of {type(loss).__name__})"
            )
        looked_at = _stages_of(term, level, known, stages)
        parts = tuple(getattr(loss, "parts", ())) or (None,)
        twice = sorted(set(parts).intersection(known))
        if twice:
            raise UserError(f"Expected no stage to be named as a part of the term '{term}' (got '{twice[0]}')")
        groups = [(stage,) for stage in looked_at] if level == "stage" else [tuple(looked_at)]
        for group in groups:
            losses = {part: str(loss_name(term, level, group, part)) for part in parts}
            adapted, indexed, located = (bool(getattr(loss, name, False)) for name in ("matched_channels", "needs_index", "needs_boxes"))
            size = getattr(loss, "map_size", None)
            calls.append(Call(term, group, level, losses, adapted and level != "logits", size, indexed, located, hasattr(loss, "build")))
    return calls


def two_paths(stage: str, paths: Sequence[str] | str) -> tuple[str, str]:
    """Returns the module paths of a stage in the student and in the teacher; one path stands for both."""
    if isinstance(paths, str):
        return paths, paths
    if len(paths) != 2:
        raise UserError(f"Expected the tap '{stage}' to be a path in the student and one in the teacher (got {list(paths)})")
    return paths[0], paths[1]


def module_key(name: str) -> str:
    """Spells a name as a key of a ModuleDict, which forbids dots; no two names meet, for none holds a slash."""
    return name.replace(".", "/")


def _stages_of(term: str, level: str, known: Sequence[str], stages: Mapping[str, Sequence[str]]) -> list[str]:
    if level == "logits":
        if term in stages:
            raise UserError(f"Expected no stages for the term '{term}', which compares logits (got {list(stages[term])})")
        return []
    wanted = stages.get(term, known)
    for stage in wanted:
        if stage not in known:
            raise UserError(unknown_name(f"a stage of the term '{term}'", stage, known))
    if not wanted:
        raise UserError(f"Expected a stage for the term '{term}': give it in 'taps' (got taps {list(known)})")
    return [stage for stage in known if stage in wanted]


def _check_name(name: str, kind: str) -> None:
    if not name or "/" in name or (kind == "term" and name == "task") or hasattr(nn.ModuleDict, module_key(name)):
        raise UserError(f"Expected another name for a {kind}: not empty, no '/', not one that PyTorch or the task uses (got '{name}')")
