"""Splits and epochs of every kind of data: which sample comes when, and by which draws it is changed."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gkd.data.images import check_files

# Names of independent streams of draws under one (seed, epoch).
ORDER, AUGMENT, MIX = 1, 2, 3

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


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seeds the global generators of torch and Python for a while, for code that draws from them; ``None`` leaves them alone."""
    if seed is None:
        yield
        return
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(state)


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


class EpochData(ABC):
    """Samples in splits, read in batches that depend on (seed, epoch, step) and on nothing else.

    The splits are

    * ``'train'``: shuffled and augmented; the last batch is dropped when it is not full;
    * ``'train_eval'``: the same samples in order, not augmented;
    * ``'val'``: training samples held out (or the data's own validation part), in order, not augmented;
    * ``'test'``: in order, not augmented.

    Args:
        sizes: Number of samples of each part that there is: ``{'train': N, 'test': M}`` and perhaps ``'val'``.
        order: Rows of the part ``'train'`` in the order in which they are dealt out: first to ``'val'``, then to ``'train'``.
        holdout: Training samples for ``'val'``: a share in [0, 1) or a number.
        subset: Of the remaining training samples, those to train on: a share in (0, 1] or a number. ``None``: all.

    Raises:
        ValueError: If the numbers do not fit the data.
    """

    def __init__(self, sizes: Mapping[str, int], order: Tensor, holdout: float | int = 0.0, subset: float | int | None = None) -> None:
        if holdout and "val" in sizes:
            raise ValueError(f"Expected holdout=0 where the data bring their own validation part (got holdout={holdout})")
        for part, size in sizes.items():
            if size == 0:
                raise ValueError(f"Expected images in the part '{part}' (got none)")
        num_held = count_of(holdout, len(order), "holdout")
        num_train = len(order) - num_held if subset is None else count_of(subset, len(order) - num_held, "subset")
        if num_train < 1:
            raise ValueError(f"Expected at least one training image (got holdout={holdout} and subset={subset} of {len(order)})")
        train = order[num_held : num_held + num_train].sort().values
        # {split: (part it is read from, rows of that part)}
        self._members = {"train": ("train", train), "train_eval": ("train", train), "val": ("train", order[:num_held].sort().values)}
        self._members.update({part: (part, torch.arange(size)) for part, size in sizes.items() if part != "train"})

    def num_samples(self, split: str) -> int:
        """Counts the samples of a split; ``'val'`` has none unless some were held out."""
        return len(self._rows(split)[1])

    def num_batches(self, split: str, batch_size: int, world_size: int = 1) -> int:
        """Counts the steps of an epoch in which each of ``world_size`` processes takes ``batch_size`` samples."""
        return num_steps(self.num_samples(split), batch_size, world_size, drop_last=split == "train")

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        epoch: int = 0,
        start: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Iterator[Any]:
        """Reads an epoch of a split in batches.

        The order depends on (seed, epoch), the augmentation of a sample on (seed, epoch) and its place or index; both are drawn on the CPU
        by generators of their own. So ``start`` continues an interrupted epoch bit for bit, the device makes no difference, and what the
        ranks see in a step is together what a single process with ``world_size * batch_size`` sees.

        Args:
            split: ``'train'``, ``'train_eval'``, ``'val'`` or ``'test'``.
            batch_size: Samples that one process takes in one step.
            epoch: Only ``'train'`` depends on it, and on the seed.
            start: Steps of the epoch to leave out; they are not even read.
            seed: Seed of the run.
            rank: This process.
            world_size: Number of processes. The last, shorter step of a split that is not ``'train'`` is shared out evenly: a rank that
                gets nothing of it has one batch fewer.
            device: Where the batches are wanted.
            **options: What the kind of data documents.

        Returns:
            Batches (images, targets, index); the class of the data documents their shapes.

        Raises:
            ValueError: If the split is unknown or too small for one batch, or if a number is out of range.
            UnreadableImageError: If a file cannot be read.
        """
        self._check(split, batch_size, start, rank, world_size)
        train = split == "train"
        num_samples = self.num_samples(split)
        order = torch.randperm(num_samples, generator=generator(seed, epoch, ORDER)) if train else torch.arange(num_samples)
        plan = plan_epoch(order, batch_size, drop_last=train, start=start, rank=rank, world_size=world_size)
        return self._read(split, plan, (seed, epoch) if train else None, torch.device(device), **options)

    def check_files(self) -> None:
        """Finds out, without reading them, whether all files of all splits are there.

        Raises:
            ValueError: If files are missing: how many, and the first of them.
        """
        check_files(self._files())

    @abstractmethod
    def _read(self, split: str, plan: Plan, draw: tuple[int, int] | None, device: torch.device, **options: Any) -> Iterator[Any]:
        """Yields the batches of a plan, augmented by draws from (seed, epoch) where that is given."""

    def _files(self) -> Iterable[str]:
        """Paths of all files that may be read; none for data in memory."""
        return ()

    def _rows(self, split: str) -> tuple[str, Tensor]:
        if split not in self._members:
            names = ", ".join(f"'{name}'" for name in self._members)
            raise ValueError(f"Expected a split among {names} (got '{split}')")
        return self._members[split]

    def _check(self, split: str, batch_size: int, start: int, rank: int, world_size: int) -> None:
        num_samples = self.num_samples(split)
        if batch_size < 1 or world_size < 1:
            raise ValueError(f"Expected batch_size and world_size of at least 1 (got {batch_size} and {world_size})")
        if not 0 <= rank < world_size:
            raise ValueError(f"Expected rank in [0, {world_size}) (got {rank})")
        if split == "val" and num_samples == 0:
            raise ValueError(
                f"Expected held-out images for the split 'val' (got none: construct {type(self).__name__} with holdout=0.1, say)"
            )
        num_batches = self.num_batches(split, batch_size, world_size)
        if num_batches < 1:
            needed = f"{batch_size} images" if world_size == 1 else f"{world_size} x {batch_size} images"
            raise ValueError(
                f"Expected at least one full batch of {needed} (got {num_samples} in the split '{split}': take smaller batches)"
            )
        if not 0 <= start <= num_batches:
            raise ValueError(f"Expected start in [0, {num_batches}] (got {start})")


def count_of(amount: float | int, total: int, name: str) -> int:
    """Turns a share (float) or a number (int) of samples into a number."""
    number = round(amount * total) if isinstance(amount, float) and 0 <= amount <= 1 else amount
    if not isinstance(number, int) or isinstance(amount, bool) or not 0 <= number <= total:
        raise ValueError(f"Expected {name} as a share (float) in [0, 1] or a number (int) of at most {total} images (got {amount!r})")
    return number
