from __future__ import annotations

import torch
from torch import Tensor

from gkd.graphs.similarity import Comparable, Similarity

# Scores that are held together, so that memory stays bounded; a CPU is no faster with more.
_MOST_SCORES = {"cpu": 2**22}
_MOST_SCORES_ELSEWHERE = 2**26


def nearest(
    similarity: Similarity, rows: Comparable, k: int, mask: Tensor | None = None, loops: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Finds the k rows of y that are most similar to each row of x, without all the scores being there at once.

    Args:
        similarity: The metric.
        rows: Rows x that choose and rows y to choose from, as the metric prepared them.
        k: Number of neighbours, at most the number of rows to choose from.
        mask: False for rows of y that cannot be chosen; None if all can.
        loops: Whether a row may choose the row of the same number.

    Shapes:
        - **rows.x** [B, n, d], **rows.y** [B, m, d], **mask** [B, m]; **output** numbers [B, n, k] of the neighbours in their graph, best
          first, their scores [B, n, k] and which of them exist [B, n, k], or None if all do

    Gradient:
        None; ``similarity.neighbor_scores`` has that of the scores.

    Examples:
        >>> from gkd.graphs.similarity import CosineSimilarity
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]])
        >>> cosine = CosineSimilarity()
        >>> nearest(cosine, cosine.prepare(x), k=1, loops=False)[0][0, 0]
        tensor([1])
    """
    x, y, _ = rows
    (batch_size, num_rows, _), num_choices = x.shape, y.shape[1]
    most = _MOST_SCORES_ELSEWHERE if torch.compiler.is_compiling() else _MOST_SCORES.get(x.device.type, _MOST_SCORES_ELSEWHERE)
    graphs = max(most // max(num_rows * num_choices, 1), 1)
    height = max(min(most // max(num_choices, 1), num_rows), 1)
    indices, scores = [], []
    with torch.no_grad():
        for graph in range(0, batch_size, graphs):
            part = slice(graph, graph + graphs)
            for row in range(0, num_rows, height):
                score = similarity.scores(x[part, row : row + height], y[part])
                if not loops:
                    score.diagonal(row, dim1=1, dim2=2).fill_(float("-inf"))
                if mask is not None:
                    score.masked_fill_(~mask[part, None, :], float("-inf"))
                best, index = largest(score, k)
                indices.append(index)
                scores.append(best)
        if not indices:
            return x.new_zeros(batch_size, num_rows, k, dtype=torch.long), x.new_zeros(batch_size, num_rows, k), None
        source, score = (torch.cat([part.flatten(0, 1) for part in parts]).view(batch_size, num_rows, k) for parts in (indices, scores))
    if mask is None:
        return source, score, None
    exists = score > float("-inf")
    return source, score.masked_fill(~exists, 0.0), exists


def neighbors(scores: Tensor, k: int, mask: Tensor | None, loops: bool = True) -> tuple[Tensor, Tensor | None]:
    """The k columns with the highest scores in each row, best first, and which of them exist.

    Which of several equal scores comes first is the same in every run, but otherwise not specified.

    Args:
        scores: Scores; integer scores are not negative.
        k: Number of neighbours, at most the number of columns.
        mask: False for columns that cannot be chosen; None if all can.
        loops: Whether a row may choose the column of the same number.

    Shapes:
        - **scores** [B, n, m], **mask** [B, m]; **output** [B, n, k] long and [B, n, k] bool, or None if all exist
    """
    lowest = float("-inf") if scores.is_floating_point() else -1
    if not loops:
        scores = scores.masked_fill(torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device), lowest)
    if mask is None:
        return largest(scores, k)[1], None
    best = scores.masked_fill(~mask[:, None, :], lowest).topk(k, dim=-1)
    return best.indices, best.values > lowest


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Is ``scores.topk(k)``, in about half the time on a CPU where rows are long.

    Columns with equal remainder by 32 are a group. No more than k groups hold the k best, and these are the ones with the best maxima.
    """
    num_groups = 32
    size = scores.shape[-1] // num_groups
    if scores.device.type != "cpu" or scores.shape[-1] % num_groups or 2 * k > num_groups or size < 4:
        values, indices = scores.topk(k, dim=-1)
        return values, indices
    groups = scores.unflatten(-1, (size, num_groups))
    best = groups.amax(-2).topk(k, dim=-1, sorted=False).indices
    values, place = groups.gather(-1, best.unsqueeze(-2).expand(*best.shape[:-1], size, k)).flatten(-2).topk(k, dim=-1)
    return values, torch.div(place, k, rounding_mode="floor") * num_groups + best.gather(-1, place % k)


def num_slots(k: int, num_choices: int) -> int:
    """Number of neighbour slots of a node that has so many others to choose from."""
    return max(min(k, num_choices), 0)


def check_neighbors(k: int, num_choices: int, mask: Tensor | None) -> int:
    """Number of neighbour slots: in padded graphs, and where there is nobody to choose, k need not be reached."""
    if mask is None and 0 < num_choices < k:
        raise ValueError(f"Expected k <= {num_choices}, the number of nodes to choose from (got k={k})")
    return num_slots(k, num_choices)
