"""Splits as batches: decoding, seeded augmentation, sampling, and the Lightning data module.

An augmented view depends on (seed, epoch, sample) only: never on the number of workers or processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from probes.processes import share_batches
from probes.sampling import EpochSampler, seeded_generator
from probes.sections import DataSection, RecipeError
from probes.source_contract import decode as decode  # an image's bytes, for callers of this module
from probes.splits import Split, Splits

Batch = dict[str, Any]
"""`image` float32 [B, 3, H, W], `target` int64 [B] or multi-hot bool [B, C], `index` int64 [B] (position in the split);
`skipped`, a list of the positions left out as unreadable."""
Transform = Callable[..., torch.Tensor]
"""PIL image to float32 [3, H, W]; a training transform also takes a `torch.Generator`."""


@dataclass(frozen=True)
class Sample:
    """One decoded and transformed image."""

    image: torch.Tensor
    """float32 [3, H, W]."""
    target: int | torch.Tensor
    """Class index, or bool [C] of an image that may show several."""
    index: int


@dataclass(frozen=True)
class Unreadable:
    """Stands for an image that could not be decoded; `collate` drops and lists it."""

    index: int


class SplitDataset(Dataset[Sample | Unreadable]):
    """The images of a split: item `i` is an evaluation view, item `(epoch, i)` that epoch's training view.

    Args:
        split: the samples.
        transform: called with the image, and for `(epoch, i)` also a generator seeded from (seed, epoch, i).
        seed: the run's.
        on_corrupt: "fail" or "skip".
    """

    def __init__(self, split: Split, transform: Transform, seed: int, on_corrupt: str) -> None:
        self.split = split
        self.transform = transform
        self.seed = seed
        self.on_corrupt = on_corrupt

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: int | tuple[int, int]) -> Sample | Unreadable:
        """Decode and transform one image; EXIF orientation is not applied, as in the published view.

        Raises:
            RecipeError: the image is unreadable and `on_corrupt` is "fail"; its location is named.
        """
        epoch, index = item if isinstance(item, tuple) else (None, item)
        source, position = self.split.source, int(self.split.indices[index])
        try:
            image = source.image(position)
        except RecipeError:
            raise
        # On damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error and more.
        except Exception as error:
            if self.on_corrupt == "skip":
                return Unreadable(index)
            raise RecipeError(
                f"unreadable {source.media} in {self.split.name}: {source.location(position)} "
                f"({type(error).__name__}: {error}); replace or remove it, or leave unreadable {source.media}s "
                "out with data.on_corrupt=skip"
            ) from error
        if epoch is None:
            view = self.transform(image)
        else:
            view = self.transform(image, seeded_generator(self.seed, epoch, position))
        shown = self.split.multi_hot
        return Sample(view, int(self.split.targets[index]) if shown is None else torch.from_numpy(shown[index]), index)


class SplitLoader(DataLoader[Any]):
    """A DataLoader that raises a worker's RecipeError with its own message instead of a traceback as text."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches.

        Raises:
            RecipeError: an image is unreadable.
        """
        message = None
        try:
            yield from super().__iter__()
        except RecipeError as error:
            # The DataLoader rebuilds the exception here with the worker's formatted traceback as its message.
            message = str(error).rpartition("RecipeError: ")[2].rstrip()
            # Its frames hold the iterator in a cycle; collected at a bad moment, each worker takes 5 s to stop.
            error.__traceback__ = None
        if message is not None:
            raise RecipeError(message)


class ImageDataModule(LightningDataModule):
    """Loaders of all splits. They deal samples to processes: use `Trainer(use_distributed_sampler=False)`.

    Args:
        splits: from `prepare_splits`.
        train_transform: called with an image and a generator.
        eval_transform: called with an image.
        data: the recipe's section; `workers` and `on_corrupt` are used.
        micro_batch: images of one batch on one process.
        samples_per_epoch: steps x global batch, over all processes.
        seed: the run's.
    """

    def __init__(
        self,
        splits: Splits,
        train_transform: Transform,
        eval_transform: Transform,
        *,
        data: DataSection,
        micro_batch: int,
        samples_per_epoch: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.splits = splits
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self.data = data
        self.micro_batch = micro_batch
        self.samples_per_epoch = samples_per_epoch
        self.seed = seed
        self.skipped: dict[str, set[str]] = {name: set() for name in splits.named}
        """Keys of the unreadable images met so far, per split."""

    @property
    def evaluation_names(self) -> list[str]:
        """Splits that `val_dataloader` covers, in its order: selection, test, as far as there are any."""
        return [name for name in self.splits.named if name != "train"]

    def train_dataloader(self) -> SplitLoader:
        """Augmented views in the order of `EpochSampler`, this process's share."""
        split = self.splits.train
        sampler = EpochSampler(len(split), self.samples_per_epoch, self.seed, *self._rank_and_world_size())
        dataset = SplitDataset(split, self.train_transform, self.seed, self.data.on_corrupt)
        return self._build_loader(dataset, sampler, self.micro_batch)

    def val_dataloader(self) -> list[SplitLoader]:
        """This process's batches of the evaluation splits; over all processes each sample comes once.

        All processes have as many batches, since sharded weights need all of them for each pass: the last may be empty.
        """
        return [
            self._load_in_order(name, self.micro_batch, self._rank_and_world_size(), persistent=True)
            for name in self.evaluation_names
        ]

    def loader(self, name: str, batch_size: int | None = None) -> SplitLoader:
        """All of a split ("train", "holdout", "val", "test") under the evaluation view, in order.

        Under `probes.processes.join_trainer` this process's whole batches of it.
        """
        return self._load_in_order(name, batch_size or self.micro_batch, None, persistent=False)

    def _load_in_order(self, name: str, size: int, of: tuple[int, int] | None, *, persistent: bool) -> SplitLoader:
        split = self.splits.named[name]
        batches = share_batches(len(split), size, of)
        workers = min(self.data.workers, available_cores(), len(batches))
        return SplitLoader(
            SplitDataset(split, self.eval_transform, self.seed, self.data.on_corrupt),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=persistent and workers > 0,
            generator=seeded_generator(self.seed),
        )

    def note_skipped(self, split_name: str, batch: Mapping[str, Any]) -> None:
        """Remember which images of a consumed batch were left out."""
        split = self.splits.named[split_name]
        self.skipped[split_name].update(split.source.keys[split.indices[index]] for index in batch["skipped"])

    def _build_loader(
        self,
        dataset: SplitDataset,
        sampler: EpochSampler,
        batch_size: int,
        loader_class: type[SplitLoader] = SplitLoader,
    ) -> SplitLoader:
        workers = min(self.data.workers, available_cores(), -(-len(sampler) // batch_size))
        return loader_class(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            # Without one of its own a loader draws its workers' seed from the ambient generator.
            generator=seeded_generator(self.seed),
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def collate(samples: Sequence[Sample | Unreadable]) -> Batch:
    """Stack what could be read; a batch without any has B = 0 (and H = W = 0)."""
    read = [sample for sample in samples if isinstance(sample, Sample)]
    return {
        "image": torch.stack([sample.image for sample in read]) if read else torch.empty(0, 3, 0, 0),
        "target": _stack_targets([sample.target for sample in read]),
        "index": torch.tensor([sample.index for sample in read], dtype=torch.int64),
        "skipped": [sample.index for sample in samples if isinstance(sample, Unreadable)],
    }


def _stack_targets(targets: Sequence[int | torch.Tensor]) -> torch.Tensor:
    """int64 [B], or bool [B, C] from multi-hot rows."""
    rows = [target for target in targets if isinstance(target, torch.Tensor)]
    return torch.stack(rows) if rows else torch.tensor(targets, dtype=torch.int64)


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
