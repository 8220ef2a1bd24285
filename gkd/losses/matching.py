from __future__ import annotations

from torch import Tensor


def mean_over_graphs(values: Tensor, mask: Tensor) -> Tensor:
    """Averages one value per graph over the graphs that have a node; 0, with a gradient of 0, where there is none.

    Shapes:
        - **values** [B], **mask** [B, n]; **output** scalar
    """
    exists = mask.any(dim=1)
    return values.where(exists, 0.0).sum() / exists.sum().clamp(min=1)


def mean_over_nodes(values: Tensor, mask: Tensor) -> Tensor:
    """Averages one value per node over the nodes of every graph, then over the graphs.

    Shapes:
        - **values** [B, n], **mask** [B, n]; **output** scalar
    """
    total = values.where(mask, 0.0).sum(dim=1)
    return mean_over_graphs(total / mask.sum(dim=1).clamp(min=1), mask)


def check_matched(student: Tensor, teacher: Tensor) -> None:
    """Asks that node i of the student can be node i of the teacher.

    Args:
        student: Mask of the student's nodes.
        teacher: Mask of the teacher's nodes.

    Shapes:
        - both [B, n]

    Raises:
        ValueError: If the numbers of graphs or of nodes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"Expected as many graphs and nodes in the student as in the teacher, node i being node i (got student {list(student.shape)}, "
            f"teacher {list(teacher.shape)}): send the student's map through a ChannelAdapter, or compare without matched nodes"
        )
