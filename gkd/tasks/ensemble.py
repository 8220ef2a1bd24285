"""Several teachers of one classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gkd.errors import UserError
from gkd.models import Teacher, read_logits
from gkd.tasks.network import Network


class AverageLogits(nn.Module):
    """Answers with the weighted mean of what several networks answer.

    Args:
        members: The networks.
        shares: What each of them counts; their sum is 1.
    """

    def __init__(self, members: Sequence[nn.Module], shares: Sequence[float]) -> None:
        super().__init__()
        self.members, self.shares = nn.ModuleList(members), tuple(shares)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits [B, K]."""
        answers = [share * read_logits(member(images)) for member, share in zip(self.members, self.shares, strict=True)]
        return sum(answers[1:], answers[0])


@dataclass(frozen=True)
class TeacherEnsemble:
    r"""Several teachers that answer as one, with the weighted mean of their logits: :math:`\sum_m w_m z_m / \sum_m w_m`.

    It takes the place of the teacher's :class:`Network`: each member sees the images at its own size and with its own statistics, and its
    classes are put into the order of the data's. Terms that compare features look at one member: the tap ``members.0.model.layer3`` is
    ``layer3`` of the first.

    Args:
        networks: The teachers.
        shares: What each of them counts; None: all alike.

    Raises:
        UserError: If there are no networks, or the shares do not fit them.
    """

    networks: Sequence[Network]
    shares: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.networks:
            raise UserError("Expected at least one network in TeacherEnsemble.networks (got none)")
        if self.shares is not None and (len(self.shares) != len(self.networks) or not min(self.shares) > 0):
            raise UserError(f"Expected {len(self.networks)} numbers above 0 as TeacherEnsemble.shares (got {list(self.shares)})")

    def check_weights(self) -> None:
        """Raises where weights of a member are absent that a recipe makes."""
        for network in self.networks:
            network.check_weights()

    def build_teacher(self, data: Any) -> tuple[Teacher, str]:
        """The members as one teacher of a student on these data; see :meth:`Network.build_teacher`.

        Raises:
            UserError: If a member has no weights, or other classes than the data.
        """
        shares = self.shares or [1.0] * len(self.networks)
        members = []
        for network in self.networks:
            member, difference = network.build_teacher(data)
            if difference:
                raise UserError(f"Expected members for the classes of the data, whose logits can be averaged (got: {difference})")
            members.append(member)
        return Teacher(AverageLogits(members, [share / sum(shares) for share in shares])), ""
