from __future__ import annotations

import torch
from torch import Tensor

from gkd.graphs.similarity import Similarity
from gkd.graphs.topology import largest

# Scores that are held together, so that memory stays bounded; a CPU is no faster with more.
_MOST_SCORES = {"cpu": 2**22}
_MOST_SCORES_ELSEWHERE = 2**26


def nearest(
    similarity: Similarity, x: Tensor, y: Tensor, k: int, mask: Tensor | None = None, loops: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Finds the k rows of y that are most similar to each row of x, without all the scores being there at once.

    Args:
        similarity: The metric.
        x: Rows that choose.
        y: Rows to choose from.
        k: Number of neighbours, at most the number of rows to choose from.
        mask: False for rows of y that cannot be chosen; None if all can.
        loops: Whether a row may choose the row of the same number.

    Shapes:
        - **x** [B, n, d], **y** [B, m, d], **mask** [B, m]; **output** numbers [B, n, k] of the neighbours in their graph, best first,
          their scores [B, n, k] and which of them exist [B, n, k], or None if all do

    Gradient:
        None; ``similarity.neighbor_scores`` has that of the scores.

    Examples:
        >>> from gkd.graphs.similarity import CosineSimilarity
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]])
        >>> nearest(CosineSimilarity(), x, x, k=1, loops=False)[0][0, 0]
        tensor([1])
    """
    (batch_size, num_rows, _), num_choices = x.shape, y.shape[1]
    most = _MOST_SCORES_ELSEWHERE if torch.compiler.is_compiling() else _MOST_SCORES.get(x.device.type, _MOST_SCORES_ELSEWHERE)
    graphs = max(most // max(num_rows * num_choices, 1), 1)
    rows = max(min(most // max(num_choices, 1), num_rows), 1)
    indices, scores = [], []
    with torch.no_grad():
        for graph in range(0, batch_size, graphs):
            part = slice(graph, graph + graphs)
            for row in range(0, num_rows, rows):
                score = similarity.scores(x[part, row : row + rows], y[part])
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
