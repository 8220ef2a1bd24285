"""Which sample comes when: seeds without state, stratified orders, and the plan of one epoch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    r"""Hashes integers to one seed in :math:`[0, 2^{63})`, in their order (splitmix64).

    Neighbouring inputs give unrelated seeds, so ``mix(seed, epoch)`` replaces the state of a generator: whoever knows
    the epoch can draw again what was drawn there.

    Args:
        *values: Any integers, negative ones too.

    References:
        Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.

    Examples:
        >>> mix(0, 1) == mix(0, 1), mix(0, 1) == mix(1, 0)
        (True, False)
    """
    state = 0
    for value in values:
        state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def generator(*values: int) -> torch.Generator:
    """Makes a CPU generator seeded by :func:`mix`: the global generators are neither read nor moved."""
    return torch.Generator().manual_seed(mix(*values))


def stratified_order(targets: Tensor, seed: int) -> Tensor:
    """Orders the samples at random so that every stretch of the order holds the classes in their proportions.

    The r-th of the c samples of a class stands at (r + 1/2) / c of the way; ties between classes fall at random. So a prefix is
    a stratified subset, and a longer prefix contains it.

    Args:
        targets: Class of each sample.
        seed: The order depends on this and on the targets alone.

    Shapes:
        - **targets** [N] long; **output** [N] long, a permutation

    Examples:
        >>> targets = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> sorted(targets[stratified_order(targets, seed=0)][:3].tolist())
        [0, 0, 1]
    """
    num_samples = len(targets)
    shuffled = torch.randperm(num_samples, generator=generator(seed))
    labels = targets[shuffled]
    by_class = labels.argsort(stable=True)
    counts = torch.bincount(labels) if num_samples else labels
    first = counts.cumsum(0) - counts
    ranks = torch.empty(num_samples, dtype=torch.long)
    ranks[by_class] = torch.arange(num_samples) - first[labels[by_class]]
    # Exact integers up to 2^53: equal ranks in classes of equal size tie exactly, and the stable sort leaves ties as shuffled.
    position = (2 * ranks + 1).double() / (2 * counts[labels]).double()
    return shuffled[position.argsort(stable=True)]


class Plan(NamedTuple):
    """What one rank reads in one epoch, from its first batch on.

    Attributes:
        samples: Positions in the split, batch after batch.
        place: Where in the epoch each of them stands: the draws of the augmentation belong to the place, so they are
            the same for any number of ranks and after any resumption.
        sizes: Number of samples in each batch; they sum to ``len(samples)``.
    """

    samples: Tensor
    place: Tensor
    sizes: list[int]


def num_steps(num_samples: int, batch_size: int, world_size: int = 1, drop_last: bool = False) -> int:
    """Counts the batches of an epoch: ``batch_size`` is what one process takes, so a step takes ``world_size`` times as many."""
    together = batch_size * world_size
    return num_samples // together if drop_last else -(-num_samples // together)


def plan_epoch(order: Tensor, batch_size: int, *, drop_last: bool, start: int = 0, rank: int = 0, world_size: int = 1) -> Plan:
    """Cuts an order of samples into steps, and every step into one contiguous part a rank.

    All ranks together see in step i what a single process with ``world_size * batch_size`` sees. The last, shorter step (kept when
    not ``drop_last``) is shared out evenly; a rank that gets nothing of it has one batch fewer.

    Args:
        order: Samples in the order of the epoch.
        batch_size: Samples that one process takes in one step.
        drop_last: Leave out the last step when it is not full.
        start: Steps to leave out at the beginning.
        rank: This process.
        world_size: Number of processes.

    Shapes:
        - **order** [N] long

    Examples:
        >>> plan_epoch(torch.tensor([3, 1, 2, 0, 4]), 1, drop_last=False, rank=1, world_size=2)
        Plan(samples=tensor([1, 0]), place=tensor([1, 3]), sizes=[1, 1])
    """
    together = batch_size * world_size
    places, sizes = [], []
    for step in range(start, num_steps(len(order), batch_size, world_size, drop_last)):
        begin = step * together
        length = min(together, len(order) - begin)
        low, high = begin - (-rank * length // world_size), begin - (-(rank + 1) * length // world_size)
        if high > low:
            places.append(torch.arange(low, high))
            sizes.append(high - low)
    place = torch.cat(places) if places else torch.empty(0, dtype=torch.long)
    return Plan(order[place], place, sizes)
