"""Seeded order: which sample an epoch sees when, on any number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields `(view, index)` in an order that depends on (seed, epoch) only, dealt over processes.

    The permutation is cut to `samples_per_epoch` (the last partial batch dropped), and process `rank` takes
    every `world_size`-th from `rank` on: a global batch holds the same images on any number of processes.

    Args:
        num_samples: size of the split.
        samples_per_epoch: steps x global batch, over all processes.
        seed: the run's.
        rank: of this process.
        world_size: number of processes.
        repeats: views of one image in an epoch, one after the other; views are numbered from `epoch * repeats` on, so
            that with one the view is the epoch. An epoch then covers 1 / repeats of the images.
    """

    def __init__(
        self,
        num_samples: int,
        samples_per_epoch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        repeats: int = 1,
    ) -> None:
        assert samples_per_epoch <= num_samples * repeats, "an epoch sees no view twice"
        self.num_samples = num_samples
        self.samples_per_epoch = samples_per_epoch
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; Lightning calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.epoch * self.repeats
        order = torch.randperm(self.num_samples, generator=seeded_generator(self.seed, self.epoch))
        views = order.repeat_interleave(self.repeats)[: self.samples_per_epoch]
        for position in range(self.rank, len(views), self.world_size):
            yield first + position % self.repeats, int(views[position])

    def __len__(self) -> int:
        return len(range(self.rank, self.samples_per_epoch, self.world_size))


def seeded_generator(*parts: int) -> torch.Generator:
    """A generator seeded from a hash of integers, so that neighbouring ones give unrelated streams."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
