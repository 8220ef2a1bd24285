from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import TAGConv

from gkd.graphs.edges import KNNEdges
from gkd.graphs.nodes import InstanceNodes
from gkd.graphs.precision import as_float, full_precision
from gkd.graphs.similarity import unit_rows
from gkd.losses.inputs import as_input, check_batch, check_same_shape, gather_images, in_full_precision, nan_if_diverged, pool

__all__ = ["CRDLoss", "HKDLoss", "crd_loss", "info_nce_loss", "sample_negatives"]


def sample_negatives(
    num_samples: int,
    num_negatives: int,
    index: Tensor,
    targets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws samples of the data set that a batch is contrasted with, on the device of `index` and without waiting for it.

    One uniform draw without repetition serves the whole batch, and every image disregards what is of its own class. So each image sees,
    like with a draw of its own, a uniform subset of the other classes; but one [K, D] read of a memory and one matrix product replace
    a [B, K, D] gather. More negatives than samples are drawn with repetition.

    Args:
        num_samples: Size of the data set.
        num_negatives: How many to draw.
        index: Positions of the batch's images in the data set.
        targets: Classes of the whole data set; without them an image disregards only itself.

    Shapes:
        - **index** [B], **targets** [num_samples]; **output** negatives [K] and which of them count for which image [B, K]

    Examples:
        >>> negatives, counts = sample_negatives(6, 6, torch.tensor([0]), torch.tensor([0, 0, 1, 1, 2, 2]))
        >>> sorted(negatives[counts[0]].tolist())
        [2, 3, 4, 5]
    """
    if num_samples < 1 or num_negatives < 1:
        raise ValueError(f"Expected num_samples and num_negatives of at least 1 (got {num_samples} and {num_negatives})")
    if num_negatives <= num_samples:
        negatives = torch.randperm(num_samples, device=index.device)[:num_negatives]
    else:
        negatives = torch.randint(num_samples, (num_negatives,), device=index.device)
    if targets is None:
        return negatives, index[:, None] != negatives
    return negatives, targets[index][:, None] != targets[negatives]


@in_full_precision
def crd_loss(positive: Tensor, negative: Tensor, counts: Tensor, num_samples: int) -> Tensor:
    r"""Noise-contrastive estimation: tells the teacher's embedding of the same image from embeddings of K other ones.

    .. math:: \frac1B \sum_b \left( -\log \frac{e^{p_b}}{e^{p_b} + K/N} - \sum_k \log \frac{K/N}{e^{n_{bk}} + K/N} \right)

    The sum over negatives is K times their mean, so that it keeps its scale where some of them do not count.

    Args:
        positive: Log-odds of the matching pairs: similarity over temperature, minus the logarithm of the normalisation.
        negative: Likewise of the pairs that do not match.
        counts: Which of these are true negatives.
        num_samples: N, size of the data set.

    Shapes:
        - **positive** [B], **negative**, **counts** [B, K]; **output** scalar

    References:
        Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020.
    """
    check_batch(positive, negative)
    num_negatives = negative.shape[1]
    shift = math.log(num_negatives / num_samples)
    rejected = (F.softplus(negative - shift) * counts).sum() / counts.sum().clamp(min=1)
    return F.softplus(shift - positive).mean() + num_negatives * rejected


@in_full_precision
def info_nce_loss(student: Tensor, teacher: Tensor, temperature: float = 0.07) -> Tensor:
    r"""Asks every student embedding to be closest to the teacher's embedding of the same image within the batch, and the reverse.

    .. math:: -\frac1B \sum_b \left( \log \frac{e^{\cos(s_b, t_b) / T}}{\sum_k e^{\cos(s_b, t_k) / T}}
              + \log \frac{e^{\cos(s_b, t_b) / T}}{\sum_k e^{\cos(s_k, t_b) / T}} \right)

    The teacher's embedding gets a gradient too, since it is learned.

    Shapes:
        - **student**, **teacher** [B, D] with B at least 2; **output** scalar

    References:
        van den Oord, Li, Vinyals: Representation Learning with Contrastive Predictive Coding, arXiv 1807.03748.
    """
    check_batch(student, teacher, at_least=2)
    check_same_shape(student, teacher)
    similarity = unit_rows(student) @ unit_rows(teacher).mT / temperature
    same = torch.arange(len(similarity), device=similarity.device)
    return F.cross_entropy(similarity, same) + F.cross_entropy(similarity.mT, same)


class CRDLoss(nn.Module):
    """Contrastive representation distillation, see :func:`crd_loss`. Published with weight 0.8 on the last stage.

    Both networks' pooled maps are embedded linearly on the unit sphere. Memories keep a running embedding of every sample of the data set
    for both networks: the student's embedding is contrasted with the teacher's memory, and the reverse. The negatives are one draw for the
    batch (:func:`sample_negatives`), where published code draws for each image; the expectation is the same.

    Memories, normalisation and classes are buffers and are saved with the training, so that a resumed run goes on exactly. With several
    processes each fills the memory for the samples that it sees, unless they are gathered.

    Args:
        num_samples: Size of the training set. Best left to :meth:`set_targets`.
        embedding_dim: Width of the embeddings.
        num_negatives: Negatives of a batch.
        temperature: Of the similarity.
        momentum: Of the memories; what is new weighs 1 - momentum.
        gather: Contrast the images of all processes in each, so that every memory holds the embeddings of all of them, see
            :func:`~gkd.losses.inputs.gather_images`.
    """

    level = "stage"
    needs_index = True
    targets: Tensor | None
    log_norm: Tensor

    def __init__(
        self,
        num_samples: int | None = None,
        embedding_dim: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        gather: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1 or not temperature > 0:
            raise ValueError(f"Expected momentum in [0, 1) and temperature above 0 (got {momentum} and {temperature})")
        self.num_samples, self.embedding_dim, self.num_negatives = num_samples, embedding_dim, num_negatives
        self.temperature, self.momentum, self.gather = temperature, momentum, gather
        self.student_embedding: nn.Linear | None = None
        self.teacher_embedding: nn.Linear | None = None
        self.register_buffer("targets", None)
        self.register_buffer("log_norm", torch.full((2,), torch.nan))

    def set_targets(self, targets: Tensor) -> None:
        """Tells the classes of all training samples, [num_samples]: negatives are then of other classes. Before or after build()."""
        if targets.dim() != 1 or targets.is_floating_point():
            raise ValueError(f"Expected classes [num_samples] of an integer type (got {targets.dtype} {tuple(targets.shape)})")
        self.targets = targets.to(self.log_norm.device, torch.long)
        resized, self.num_samples = self.num_samples != len(targets), len(targets)
        if self.student_embedding is not None and resized:
            self._create_memories()

    def build(self, student_shape: torch.Size, teacher_shape: torch.Size) -> None:
        """Creates embeddings and memories for maps of these shapes [B, C, h, w]."""
        self.student_embedding = nn.Linear(student_shape[1], self.embedding_dim)
        self.teacher_embedding = nn.Linear(teacher_shape[1], self.embedding_dim)
        if self.num_samples is not None:
            self._create_memories()

    def _create_memories(self) -> None:
        bound = math.sqrt(3 / self.embedding_dim)
        shape = (self.num_samples or 0, self.embedding_dim)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(shape, device=self.log_norm.device).uniform_(-bound, bound))

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor) -> Tensor:
        """Returns the loss of one stage; index [B] are the images' positions in the training set."""
        if self.student_embedding is None or self.teacher_embedding is None:
            raise RuntimeError("Expected build(student_shape, teacher_shape) before the first forward of CRDLoss")
        if self.num_samples is None:
            raise RuntimeError("Expected the size of the training set: CRDLoss.num_samples or set_targets() (got None)")
        check_batch(student, teacher)
        if index.shape != (len(student),):
            raise ValueError(f"Expected index [{len(student)}] (got {tuple(index.shape)})")
        if (
            index.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not 0 <= int(index.min()) <= int(index.max()) < self.num_samples
        ):
            raise ValueError(f"Expected index in [0, {self.num_samples}) (got {int(index.min())} to {int(index.max())})")
        embedded = [
            layer(as_input(pool(as_float(features)), layer))
            for layer, features in ((self.student_embedding, student), (self.teacher_embedding, teacher.detach()))
        ]
        if self.gather:
            *embedded, index = gather_images(*embedded, index)
        with full_precision(student):
            student_rows, teacher_rows = (unit_rows(as_float(rows)) for rows in embedded)
            negatives, counts = sample_negatives(self.num_samples, self.num_negatives, index, self.targets)
            student_memory, teacher_memory = self.get_buffer("student_memory"), self.get_buffer("teacher_memory")
            loss = self._contrast(0, student_rows, teacher_memory, index, negatives, counts)
            loss = loss + self._contrast(1, teacher_rows, student_memory, index, negatives, counts)
            if self.training:
                for memory, rows in ((student_memory, student_rows.detach()), (teacher_memory, teacher_rows.detach())):
                    memory[index] = unit_rows(torch.lerp(rows, memory[index].to(rows.dtype), self.momentum)).to(memory.dtype)
        return loss

    def _contrast(self, side: int, anchor: Tensor, memory: Tensor, index: Tensor, negatives: Tensor, counts: Tensor) -> Tensor:
        assert self.num_samples is not None
        positive = (anchor * memory[index].to(anchor.dtype)).sum(1) / self.temperature
        negative = anchor @ memory[negatives].to(anchor.dtype).mT / self.temperature
        with torch.no_grad():  # the normalisation is estimated from the first batch and stays
            total = positive.exp().mean() + self.num_negatives * (negative.exp() * counts).sum() / counts.sum().clamp(min=1)
            estimate = (total * self.num_samples / (self.num_negatives + 1)).log()
            log_norm = torch.where(self.log_norm[side].isnan(), estimate, self.log_norm[side].to(estimate.dtype))
            if self.training:
                self.log_norm[side] = log_norm
        return crd_loss(positive - log_norm, negative - log_norm, counts, self.num_samples)


class HKDLoss(nn.Module):
    r"""Holistic knowledge: what an image is, and what it and its neighbours in the batch are together. Published with weight 3, beside KD.

    .. math:: \mathrm{NCE}(e^s, e^t) + \mathrm{NCE}(h^s, h^t), \quad h = W_0 e + W_1 \hat A e

    Pooled maps are embedded linearly to :math:`e`. The images of the batch are the nodes of one kNN graph for each network, with
    normalised adjacency :math:`\hat A`; a :class:`~torch_geometric.nn.TAGConv` gathers the holistic embedding :math:`h`.
    :func:`info_nce_loss` compares both.

    After the paper, with two changes: neighbours are those of the pooled features instead of the class probabilities, with
    cosines as weights, and negatives are the other images of the batch instead of a memory of the data set. Built on gkd.graphs, it
    stays on the device; the published code builds its graphs with SciPy on the CPU.

    Args:
        k: Neighbours of an image; the batch must be larger.
        embedding_dim: Width of the embeddings.
        temperature: Of the similarity.
        gather: Join the images of all processes to one graph, see :func:`~gkd.losses.inputs.gather_images`.

    Raises:
        ValueError: If the batch has k images or fewer.

    References:
        Zhou, Wang, Chen, Chen, Wang, Wang, Bu: Distilling Holistic Knowledge with Graph Neural Networks, ICCV 2021.
    """

    level = "stage"

    def __init__(self, k: int = 8, embedding_dim: int = 128, temperature: float = 0.07, gather: bool = False) -> None:
        super().__init__()
        self.k, self.embedding_dim, self.temperature, self.gather = k, embedding_dim, temperature, gather
        self.nodes, self.edges = InstanceNodes(), KNNEdges(k=k, metric="cosine")
        self.networks = nn.ModuleList()

    def build(self, student_shape: torch.Size, teacher_shape: torch.Size) -> None:
        """Creates the layers of both networks for maps of these shapes [B, C, h, w]."""
        self.networks = nn.ModuleList(
            nn.ModuleDict(
                {"embedding": nn.Linear(shape[1], self.embedding_dim), "conv": TAGConv(self.embedding_dim, self.embedding_dim, K=1)}
            )
            for shape in (student_shape, teacher_shape)
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of one stage."""
        if not self.networks:
            raise RuntimeError("Expected build(student_shape, teacher_shape) before the first forward of HKDLoss")
        student, teacher = pool(as_float(student)), pool(as_float(teacher.detach()))
        if self.gather:
            student, teacher = gather_images(student, teacher)
        check_batch(student, teacher, at_least=self.k + 1)
        try:
            student_rows, student_context = self._embed(self.networks[0], student)
            teacher_rows, teacher_context = self._embed(self.networks[1], teacher)
        except ValueError as error:
            return nan_if_diverged(error, student)
        return info_nce_loss(student_rows, teacher_rows, self.temperature) + info_nce_loss(
            student_context, teacher_context, self.temperature
        )

    def _embed(self, network: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
        embedding, conv = network["embedding"], network["conv"]  # type: ignore[index]
        rows = embedding(as_input(features, embedding))
        with full_precision(features):
            edges = self.edges(self.nodes(features.detach()))
            rows = unit_rows(as_float(rows))
            weight = as_input(edges.edge_weight, conv)
            return rows, conv(as_input(rows, conv), edges.edge_index, weight)
