"""The batches of a fine-tune: the shared data module with a training loader that continues inside an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from probes.data import Batch, ImageDataModule, SplitDataset, SplitLoader
from probes.sampling import EpochSampler


class ResumableSampler(EpochSampler):
    """An `EpochSampler` whose next pass may begin past its first samples."""

    skip: int = 0
    """Samples of this process that the next pass leaves out, because a run before it has seen them."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield `(view, index)` from `skip` on, once; later passes are whole."""
        skip, self.skip = self.skip, 0
        for position, item in enumerate(super().__iter__()):
            if position >= skip:
                yield item


class ResumableLoader(SplitLoader):
    """A loader that Lightning can save and restore inside an epoch.

    Its state is the number of images handed out, over all processes, not of those that workers have prepared: batches
    of another size go on at the same image. A restored loader's length stays that of a whole epoch.
    """

    handed_out = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches from where the restored state stands."""
        sampler = self.sampler
        assert isinstance(sampler, ResumableSampler)
        self.handed_out = sampler.skip // self.batch_size if self.batch_size else 0
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Images handed out in the present epoch."""
        sampler, batches = self.sampler, self.handed_out % max(len(self), 1)
        assert isinstance(sampler, ResumableSampler)
        assert self.batch_size is not None
        return {"images": batches * self.batch_size * sampler.world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass begin after `state["images"]` images."""
        sampler = self.sampler
        assert isinstance(sampler, ResumableSampler)
        sampler.skip = int(state["images"]) // sampler.world_size


class FinetuneData(ImageDataModule):
    """`ImageDataModule` whose training batches can be continued and may hold several views of an image.

    Args:
        repeats: views of one image in an epoch; the epoch then covers 1 / repeats of the images.
    """

    repeats: int = 1

    def train_dataloader(self) -> SplitLoader:
        """Augmented views in a seeded order, this process's share."""
        split = self.splits.train
        rank, world_size = self._rank_and_world_size()
        sampler = ResumableSampler(
            len(split), self.samples_per_epoch, self.seed, rank, world_size, repeats=self.repeats
        )
        dataset = SplitDataset(split, self.train_transform, self.seed, self.data.on_corrupt)
        return self._build_loader(dataset, sampler, self.micro_batch, loader_class=ResumableLoader)
