"""Graphs across the levels of a pyramid, compared as one graph an image."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from gkd.graphs import Spectrum, StageGraph
from gkd.graphs.precision import as_float, full_precision


class LevelGraphLoss(nn.Module):
    """Builds one graph over several stages of the student, and one of the teacher, and compares them by several terms.

    The sibling of `gkd.losses.GraphLoss` for a `gkd.graphs.StageGraph`: edges inside a stage and across stages take part alike.

    Args:
        builder: Makes the graphs; its stages are the stages of the term.
        terms: Modules of (student, teacher), two `gkd.graphs.Spectrum` views, by name.
        topology: ``'teacher'``: the student's weights are evaluated on the teacher's edges. ``'each'``: every network has its own.
        matched_channels: Whether the student's maps must have the teacher's channels, and so adapters. None: whether a term needs it.

    Shapes:
        - **student**, **teacher** {stage: [B, C, h, w]}; **output** scalars by name

    Gradient:
        To the student's maps. Computed in float32 under autocast.

    Raises:
        ValueError: If the topology is unknown or there is no term.
    """

    level = "stages"

    def __init__(
        self,
        builder: StageGraph,
        terms: Mapping[str, nn.Module],
        topology: Literal["teacher", "each"] = "teacher",
        matched_channels: bool | None = None,
    ) -> None:
        super().__init__()
        if topology not in ("teacher", "each"):
            raise ValueError(f"Expected 'topology' to be 'teacher' or 'each' (got '{topology}')")
        if not terms:
            raise ValueError("Expected at least one term (got none)")
        self.builder, self.terms, self.topology = builder, nn.ModuleDict(terms), topology
        self._matched_channels = matched_channels

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the terms."""
        return tuple(self.terms)

    @property
    def matched_channels(self) -> bool:
        """Whether the student's maps must have the teacher's channels."""
        if self._matched_channels is not None:
            return self._matched_channels
        return any(getattr(term, "matched_features", True) for term in self.terms.values())

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], parts: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Returns the terms by name.

        Args:
            student: The student's maps.
            teacher: The teacher's.
            parts: Names of the terms to compute; None for all.
        """
        wanted = {name: term for name, term in self.terms.items() if parts is None or name in parts}
        first = next(iter(student.values()))
        with full_precision(first):
            own = {stage: as_float(features) for stage, features in student.items()}
            if first.numel() == 0:
                return dict.fromkeys(wanted, 0 * as_float(first).sum())
            with torch.no_grad():
                goal = self.builder({stage: as_float(features.detach()) for stage, features in teacher.items()}, static=True)
            graph = self.builder(own, topology=goal if self.topology == "teacher" else None, static=True)
            views = Spectrum(graph), Spectrum(goal)
            return {name: term(*views) for name, term in wanted.items()}
