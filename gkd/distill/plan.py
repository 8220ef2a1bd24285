from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from gkd.distill.weights import LossName
from gkd.errors import UserError, unknown_name
from gkd.losses.term import BuildsLayers, Term


@dataclass(frozen=True)
class Call:
    """One evaluation of a term: at one stage for a term of the level ``'stage'``, of the whole term otherwise."""

    name: str
    stages: tuple[str, ...]
    losses: Mapping[str | None, str]
    """Full name of every value that comes back, by its part; the part is None where the term returns a single value."""
    term: Term
    builds: bool

    @property
    def names(self) -> list[LossName]:
        """The addresses of what comes back."""
        return [loss_name(self.name, self.term.level, self.stages, part) for part in self.losses]

    @property
    def adapted(self) -> bool:
        """Whether it sees the student's maps as adapters make them."""
        return self.term.matched_channels and self.term.level != "logits"

    @property
    def key(self) -> str:
        """Name of the module: a term that owns layers is one module per stage."""
        return module_key(f"{self.name}/{self.stages[0]}" if self.builds and self.term.level == "stage" else self.name)


def loss_name(term: str, level: str, stages: Sequence[str], part: str | None) -> LossName:
    """Addresses what a term returns."""
    return LossName(term, stages[0] if level == "stage" else None, part)


def plan_calls(
    terms: Mapping[str, nn.Module], stages: Sequence[str], chosen: Mapping[str, Sequence[str]], extra: Sequence[str] = ()
) -> list[Call]:
    """Lists which term is evaluated at which stages.

    Args:
        terms: The losses by name.
        stages: The stages that a term looks at by default, shallow to deep.
        chosen: The stages of a term, where these are others.
        extra: Further stages that it may look at.

    Raises:
        UserError: If a name is unknown or cannot be used, or a term has nothing to look at or declares something else than a
            :class:`~gkd.losses.Term` may.
    """
    for stage in (*stages, *extra):
        _check_name(stage, "stage")
    for name in chosen:
        if name not in terms:
            raise UserError(unknown_name("a key of 'stages'", name, list(terms)))
    calls = []
    for name, module in terms.items():
        _check_name(name, "term")
        try:
            term = Term.of(module, name)
        except ValueError as error:
            raise UserError(str(error)) from error
        term_stages = _stages_of(name, term.level, stages, chosen.get(name), extra)
        parts = term.parts or (None,)
        twice = sorted(set(term.parts).intersection((*stages, *extra)))
        if twice:
            raise UserError(f"Expected no stage to be named as a part of the term '{name}' (got '{twice[0]}')")
        groups = [(stage,) for stage in term_stages] if term.level == "stage" else [tuple(term_stages)]
        for group in groups:
            losses = {part: str(loss_name(name, term.level, group, part)) for part in parts}
            calls.append(Call(name, group, losses, term, isinstance(module, BuildsLayers)))
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


def _stages_of(term: str, level: str, stages: Sequence[str], chosen: Sequence[str] | None, extra: Sequence[str]) -> list[str]:
    if level == "logits":
        if chosen is not None:
            raise UserError(f"Expected no stages for the term '{term}', which compares logits (got {list(chosen)})")
        return []
    wanted, existing = stages if chosen is None else chosen, [*stages, *extra]
    for stage in wanted:
        if stage not in existing:
            raise UserError(unknown_name(f"a stage of the term '{term}'", stage, existing))
    if not wanted:
        raise UserError(f"Expected a stage for the term '{term}': give it in 'taps' (got taps {list(stages)})")
    return [stage for stage in existing if stage in wanted]


def _check_name(name: str, kind: str) -> None:
    if not name or "/" in name or (kind == "term" and name == "task") or hasattr(nn.ModuleDict, module_key(name)):
        raise UserError(f"Expected another name for a {kind}: not empty, no '/', not one that PyTorch or the task uses (got '{name}')")
