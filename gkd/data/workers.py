"""Data in files: read by this process or by workers that live from epoch to epoch; files that cannot be read are named."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gkd.data.epochs import AUGMENT, EpochData, Plan, mix

_log = logging.getLogger(__name__)

# A row of the part that is read, and the seed of its augmentation (None: no chance in it).
_Item = tuple[int, int | None]


class UnreadableImageError(ValueError):
    """Images of a batch that cannot be read; the message names them and says how many there were so far."""


class Unreadable(NamedTuple):
    """Stands for a sample whose file cannot be read."""

    path: str
    reason: str


class PackedStrings:
    """A list of strings in one block of bytes: forked workers share it, others get it in one piece.

    Python strings would be copied in each worker, page by page, by their counted references.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> str:
        begin = self.ends[row - 1] if row else 0
        return os.fsdecode(self.text[begin : self.ends[row]].tobytes())


class Reader(Dataset[Any], ABC):
    """Reads one sample, in a worker or here. Its attributes are few and flat, since spawned workers get a copy."""

    @abstractmethod
    def source(self, row: int) -> str:
        """Names the sample: the path of its file."""

    @abstractmethod
    def read(self, row: int) -> Any:
        """Reads the file; whatever it raises makes the sample unreadable."""

    @abstractmethod
    def prepare(self, image: Any, row: int, seed: int | None) -> Any:
        """Augments what was read by draws from the seed."""

    @abstractmethod
    def collate(self, samples: Sequence[Any]) -> Any:
        """Puts what was prepared together to a batch, perhaps an empty one."""

    def __getitem__(self, item: _Item) -> Any:
        row, seed = item
        try:
            image = self.read(row)
        except Exception as error:  # Whatever a damaged file makes a decoder raise.
            return Unreadable(self.source(row), f"{type(error).__name__}: {error}")
        return self.prepare(image, row, seed)


class FileData(EpochData):
    """Samples in files; a subclass says how one is read.

    Each sample's augmentation is seeded by (seed, epoch, index), so neither the number of workers nor the batch in which it comes makes a
    difference, and an epoch starts at any step without reading those before.

    Args:
        sizes: See :class:`~gkd.data.epochs.EpochData`, and so the others.
        order: Rows of the training part in the order in which they are dealt out.
        holdout: Training samples for ``'val'``.
        subset: Of the remaining training samples, those to train on.
        num_workers: Processes that read; 0 reads in this one. ``None``: the cores there are for this process, at most 8.
        skip_unreadable: Leave out samples that cannot be read: their batch is smaller by them. ``False``: stop.

    Attributes:
        unreadable (dict): Reason by path of the files that could not be read so far.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        order: Tensor,
        holdout: float | int = 0.0,
        subset: float | int | None = None,
        num_workers: int | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        super().__init__(sizes, order, holdout, subset)
        if num_workers is None:
            num_workers = min(8, max(1, _usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        if num_workers < 0:
            raise ValueError(f"Expected num_workers >= 0 (got {num_workers})")
        self.num_workers = num_workers
        self.skip_unreadable = skip_unreadable
        self.unreadable: dict[str, str] = {}
        self._loaders: dict[Any, _Loader] = {}

    @abstractmethod
    def _reader(self, split: str, **options: Any) -> Reader:
        """Makes what reads a split's part; it is made once for each split and options, and then kept."""

    def _load(
        self, split: str, plan: Plan, draw: tuple[int, int] | None, device: torch.device, **options: Any
    ) -> Iterator[tuple[Tensor, Any]]:
        """Yields the positions in the split of what could be read, and its batch as the reader collates it."""
        part, members = self._members[split]
        index = plan.samples.split(plan.sizes) if plan.sizes else ()
        steps = (
            [
                (row, None if draw is None else mix(*draw, AUGMENT, number))
                for row, number in zip(members[numbers].tolist(), numbers.tolist(), strict=True)
            ]
            for numbers in index
        )
        # One loader serves all epochs of a split; a second iteration at the same time gets its own.
        key = (split, device.type == "cuda", tuple(sorted(options.items())))
        loader = self._loaders.pop(key, None) or _Loader(self._reader(split, **options), self.num_workers, pin=key[1])
        try:
            for numbers, (batch, unreadable) in zip(index, loader.read(steps), strict=False):
                yield self._readable(numbers, unreadable, part), batch
        finally:
            self._loaders[key] = loader

    def _readable(self, index: Tensor, unreadable: Mapping[int, Unreadable], part: str) -> Tensor:
        """Gives the batch's index without the samples that could not be read."""
        if not unreadable:
            return index
        new = {path: reason for path, reason in unreadable.values() if path not in self.unreadable}
        self.unreadable.update(new)
        if not self.skip_unreadable or len(unreadable) == len(index):
            named = "\n".join(f"  {path}: {reason}" for path, reason in unreadable.values())
            raise UnreadableImageError(
                f"Expected {len(index)} readable images of the part '{part}' in a batch (got {len(unreadable)} that cannot be read; "
                f"{len(self.unreadable)} so far).\n{named}\n"
                "Replace them, take them out of the data, or set skip_unreadable = True to go on without them."
            )
        for path, reason in new.items():
            _log.warning("image left out, it cannot be read: %s: %s (%d so far)", path, reason, len(self.unreadable))
        readable = torch.ones(len(index), dtype=torch.bool)
        readable[list(unreadable)] = False
        return index[readable]


class _Steps(Sampler[list[_Item]]):
    """The batches of the epoch that is read next."""

    def __init__(self) -> None:
        self.steps: Iterable[list[_Item]] = ()

    def __iter__(self) -> Iterator[list[_Item]]:
        return iter(self.steps)


class _Collate:
    """Collates what could be read, and gives the others by their position."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __call__(self, samples: list[Any]) -> tuple[Any, dict[int, Unreadable]]:
        unreadable = {position: sample for position, sample in enumerate(samples) if isinstance(sample, Unreadable)}
        return self.reader.collate([sample for sample in samples if not isinstance(sample, Unreadable)]), unreadable


class _Loader:
    """A DataLoader whose workers live on from epoch to epoch while the batches change."""

    def __init__(self, reader: Reader, num_workers: int, pin: bool) -> None:
        self.steps = _Steps()
        self.loader = DataLoader(
            reader,
            batch_sampler=self.steps,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin,
            collate_fn=_Collate(reader),
            generator=torch.Generator(),  # Else each epoch would draw from the global one.
        )

    def read(self, steps: Iterable[list[_Item]]) -> Iterator[tuple[Any, dict[int, Unreadable]]]:
        self.steps.steps = steps
        return iter(self.loader)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
