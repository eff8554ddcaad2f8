"""Fill the missing shards of an entry: one pass of the encoder for all kinds, together with any other processes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from eva_clip.towers import has_mean_pool
from probes.data import SplitDataset, SplitLoader, available_cores, collate
from probes.progress import track
from probes.sampling import seeded_generator
from probes.source_contract import some
from probes.store import StoreEntry
from probes.store_claims import Claims
from probes.store_shard import write_shard

if TYPE_CHECKING:
    from eva_clip.encoder import VisionEncoder

BATCH = 64
"""Images of one forward pass. Batches never cross shards, so that features do not depend on where a pass began."""
POLL_S = 0.5
"""Seconds between two looks at shards that other processes are extracting."""

Item = int | tuple[int, int]


class ClaimedBatches:
    """Batches of dataset items, shard after shard, of the shards that no other process has claimed.

    A shard is claimed when the loader comes to it; its claim is released when it is written, or by the kernel.
    """

    def __init__(
        self, entry: StoreEntry, arrays: list[str], order: list[int], claims: Claims, view: int | None
    ) -> None:
        self.entry, self.arrays, self.order, self.claims, self.view = entry, arrays, order, claims, view

    def __len__(self) -> int:
        spans = (self.entry.span(number) for number in self.order)
        return sum(math.ceil((stop - start) / BATCH) for start, stop in spans)

    def __iter__(self) -> Iterator[list[Item]]:
        for number in self.order:
            if not self.claims.take(number):
                continue
            if all(self.entry.path(array, number).is_file() for array in self.arrays):  # finished by another meanwhile
                self.claims.release(number)
                continue
            start, stop = self.entry.span(number)
            for first in range(start, stop, BATCH):
                positions = range(first, min(first + BATCH, stop))
                yield list(positions) if self.view is None else [(self.view, position) for position in positions]


def fill_entry(
    entry: StoreEntry,
    wanted: Mapping[str, str],
    *,
    encoder: VisionEncoder,
    dataset: SplitDataset,
    view: int | None,
    workers: int,
) -> None:
    """Extract until no shard of the wanted arrays is missing, by this process or another.

    Args:
        entry: the entry.
        wanted: name of each array, and the kind of feature that it holds.
        encoder: on its device.
        dataset: the split under the view in question.
        view: None for the evaluation view, else the epoch whose augmented view is taken.
        workers: processes that decode images.

    Raises:
        RecipeError: an image is unreadable.
        ValueError: a feature is not finite, or a kind that a mean-pool encoder has not.
        OSError: a shard cannot be written.
    """
    undefined = [kind for kind in wanted.values() if kind != "gap"] if has_mean_pool(encoder.tower) else []
    if undefined:
        raise ValueError(
            f"features of kind {', '.join(undefined)} were asked of a mean-pool encoder (it has fc_norm and no norm), "
            "whose class token was never trained for it; take kind 'gap' alone"
        )
    name = dataset.split.name + ("" if view is None else f", view {view}")
    told = False
    with Claims(entry.folder) as claims:
        while missing := entry.missing(wanted):
            order = _own_first(missing)
            if not any(claims.take(number) for number in order):
                if not told:
                    count = len(missing)
                    print(f"features of {name}: other processes are at the last {count} shard(s); waiting for them")
                    told = True
                time.sleep(POLL_S)
                continue
            batches = ClaimedBatches(entry, list(wanted), order, claims, view)
            loader = SplitLoader(
                dataset,
                batch_sampler=batches,
                num_workers=min(workers, available_cores(), len(batches)),
                collate_fn=collate,
                pin_memory=torch.cuda.is_available(),
                generator=seeded_generator(0),
            )
            shards = OpenShards(entry, wanted, encoder, claims, dataset.split.keys)
            for batch in track(loader, f"features of {name}", len(batches)):
                shards.add(batch)


class OpenShards:
    """Collects the features of batches by shard and writes each shard when it has all of its positions."""

    def __init__(
        self, entry: StoreEntry, wanted: Mapping[str, str], encoder: VisionEncoder, claims: Claims, keys: list[str]
    ) -> None:
        self.entry, self.wanted, self.encoder, self.claims, self.keys = entry, wanted, encoder, claims, keys
        self._features: dict[str, list[torch.Tensor]] = {array: [] for array in wanted}
        self._index: list[torch.Tensor] = []
        self._seen = 0

    def add(self, batch: Mapping[str, Any]) -> None:
        """Take one batch; those of one shard follow each other."""
        parameter = next(self.encoder.parameters())
        if len(batch["index"]):
            image = batch["image"].to(parameter.device, non_blocking=True)
            found = self.encoder.take_kinds(image, list(self.wanted.values()))
            for array, kind in self.wanted.items():
                self._features[array].append(found[kind])  # stays on the device until the shard is whole
        self._index.append(batch["index"])
        positions = [*batch["index"].tolist(), *batch["skipped"]]
        self._seen += len(positions)
        number = positions[0] // self.entry.shard_rows
        start, stop = self.entry.span(number)
        if self._seen == stop - start:
            self._write(number, start, stop, parameter.dtype)

    def _write(self, number: int, start: int, stop: int, dtype: torch.dtype) -> None:
        from eva_clip.feature_kinds import kind_width

        index = torch.cat(self._index)
        for array, kind in self.wanted.items():
            none = torch.empty(0, kind_width(kind, self.encoder.spec), dtype=dtype)
            features = torch.cat(self._features[array]).cpu() if self._features[array] else none
            path = self.entry.path(array, number)
            self._check_finite(features, index, kind)
            if not path.is_file():
                write_shard(path, features, index, start, stop)
        self.claims.release(number)
        self._features = {array: [] for array in self.wanted}
        self._index, self._seen = [], 0

    def _check_finite(self, features: torch.Tensor, index: torch.Tensor, kind: str) -> None:
        bad = (~features.isfinite().all(dim=1)).nonzero().flatten()
        if len(bad):
            names = some([self.keys[position] for position in index[bad].tolist()])
            split = self.entry.about["split"]
            raise ValueError(
                f"{len(bad)} feature(s) of {split} (kind {kind}) are not finite and were not stored: {names}; use "
                "precision fp32, or check the weights and these images"
            )


def _own_first(missing: list[int]) -> list[int]:
    """Shards in the order that this process tries them: its share among the launcher's processes, then the others'."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    own = missing[rank % size :: size]
    return [*own, *(number for number in reversed(missing) if number not in set(own))]
