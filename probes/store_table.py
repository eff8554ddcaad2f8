"""Features of one split as tensors: mapped from the store's shards, verified when they are first read."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from probes.store import StoreEntry
from probes.store_shard import DamagedShard, Shard, map_shard, read_features, read_shard, verify_shard
from probes.store_verified import VerifiedShards

if TYPE_CHECKING:
    from eva_clip.checkpoints import LoadReport
    from eva_clip.encoder import VisionEncoder
    from probes.splits import Split


@dataclass(frozen=True)
class EncoderFacts:
    """What a result says of the encoder that made the features."""

    sha256: str
    """`VisionEncoder.weights_sha256()`."""
    loaded: str
    """What was loaded, in words."""
    feature_dim: int
    """D."""
    image_size: int
    """Input side in pixels."""

    @classmethod
    def of(cls, encoder: VisionEncoder, report: LoadReport | None) -> EncoderFacts:
        """The facts of an encoder in memory."""
        loaded = report.summary() if report else "none: randomly initialised"
        return cls(encoder.weights_sha256(), loaded, encoder.feature_dim, encoder.spec.vision.image_size)


class FeatureTable:
    """Features [N, D] of the readable images of one source, in its order, or of a split of it.

    Opening reads headers and positions only. The first access to features compares the checksum of every shard that was
    not compared since it last changed; the tensor of one shard is the mapped file itself, that of several is memory.

    Args:
        name: of the split.
        entry: where the features are; all shards of `views` are there.
        views: the arrays to concatenate along D, for each view.
        source_keys: names of all samples of the source.
        encoder: what made the features.
        l2norm: scale rows to unit length.

    Raises:
        DamagedShard: a shard's header or positions make no sense.
    """

    def __init__(
        self,
        name: str,
        entry: StoreEntry,
        views: Sequence[Sequence[str]],
        *,
        source_keys: Sequence[str],
        encoder: EncoderFacts,
        l2norm: bool = False,
    ) -> None:
        self.name = name
        self.encoder = encoder
        self.l2norm = l2norm
        self._entry = entry
        self._views = [[self._open(array) for array in arrays] for arrays in views]
        first = self._views[0][0]
        self.index = torch.cat([_checked_index(shard) for shard in first])
        """int64 [N]: position of each row in its source, or its split; unreadable images are absent."""
        self._check_same_rows(first)
        self.targets = torch.zeros(len(self.index), dtype=torch.int64)
        """int64 [N]: classes; 0 until a split is taken."""
        self.keys = [source_keys[position] for position in self.index.tolist()]
        """Names of the N samples."""
        readable = set(self.index.tolist()) if len(self.index) < len(source_keys) else None
        self.skipped = [] if readable is None else [key for i, key in enumerate(source_keys) if i not in readable]
        """Names of the unreadable images."""
        self._read: dict[int, torch.Tensor] = {}
        self._source: FeatureTable | None = None
        self._rows: torch.Tensor | None = None  # int64 [N], of the source's table; None is all

    @property
    def whole(self) -> FeatureTable:
        """The table of the source that these rows are of."""
        return self._source or self

    def take(self, split: Split) -> FeatureTable:
        """The rows of a split of this table's source; what is read of the source is shared."""
        taken = copy.copy(self)
        position = torch.full((len(split.source),), -1)  # of each image of the source in the split
        position[torch.from_numpy(split.indices)] = torch.arange(len(split))
        kept = position[self.index] >= 0
        taken.name, taken.index = split.name, position[self.index][kept]
        taken.targets = torch.from_numpy(split.targets)[taken.index]
        taken.keys = list(itertools.compress(self.keys, kept.tolist()))
        if self.skipped:
            asked = set(split.keys)
            taken.skipped = [key for key in self.skipped if key in asked]
        taken._source, taken._read = self, {}
        taken._rows = None if bool(kept.all()) else kept.nonzero().flatten()
        return taken

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_views(self) -> int:
        """Views there are: 1 unless augmented copies were asked for."""
        return len(self._views)

    @property
    def features(self) -> torch.Tensor:
        """[N, D] in the dtype that the encoder computed in: the only or the first view.

        Raises:
            DamagedShard: the stored bytes have changed.
        """
        return self.view(0)

    def view(self, number: int) -> torch.Tensor:
        """[N, D]: one view; see `features`."""
        if self._source is not None and number not in self._read:
            whole = self._source.view(number)
            self._read[number] = whole if self._rows is None else whole[self._rows]
        if number not in self._read:
            joined = join_shards(self._views[number], VerifiedShards(self._entry))
            self._read[number] = F.normalize(joined, dim=-1) if self.l2norm else joined
        return self._read[number]

    def _open(self, array: str) -> list[Shard]:
        """Headers of an array's shards."""
        shards = [read_shard(self._entry.path(array, number)) for number in range(self._entry.num_shards)]
        for number, shard in enumerate(shards):
            if (shard.start, shard.stop) != self._entry.span(number):
                raise DamagedShard(
                    shard.path, f"it covers {shard.start}..{shard.stop}, expected {self._entry.span(number)}"
                )
        return shards

    def _check_same_rows(self, first: list[Shard]) -> None:
        """Arrays made at different times can differ in what was readable then; such rows do not belong together."""
        for arrays in self._views:
            for shards in arrays:
                for one, other in zip(first, shards, strict=True):
                    if one.rows != other.rows or (
                        one.rows < one.stop - one.start and not torch.equal(map_shard(one)[1], map_shard(other)[1])
                    ):
                        raise ValueError(
                            f"{one.path} and {other.path} hold rows of different images: some could be read when one "
                            f"was made and not when the other was; delete the folder {self._entry.folder}"
                        )


def join_shards(arrays: Sequence[Sequence[Shard]], verified: VerifiedShards) -> torch.Tensor:
    """[N, D]: arrays side by side, their shards below each other, read by all processor cores.

    Shards that have changed since their checksums were last compared, or whose never were, are compared.

    Raises:
        DamagedShard: a checksum differs.
    """
    if len(arrays) == 1 and len(arrays[0]) == 1:
        verify_changed(arrays[0], verified)
        return map_shard(arrays[0][0])[0]
    unverified = {shard.path for shards in arrays for shard in shards if shard.path not in verified}
    stamps = verified.stamp(unverified)
    joined = _read_side_by_side(arrays, unverified)
    if stamps:
        verified.remember(stamps)
    return joined


def verify_changed(shards: Sequence[Shard], verified: VerifiedShards) -> None:
    """Compare the checksums that were not compared since the shards last changed. Raises DamagedShard."""
    unverified = [shard for shard in shards if shard.path not in verified]
    stamps = verified.stamp(shard.path for shard in unverified)
    for shard in unverified:
        verify_shard(shard)
    if stamps:
        verified.remember(stamps)


def _read_side_by_side(arrays: Sequence[Sequence[Shard]], unverified: set[Path]) -> torch.Tensor:
    dtype = map_shard(arrays[0][0])[0].dtype
    rows, widths = [shard.rows for shard in arrays[0]], [shards[0].width for shards in arrays]
    # NumPy asks for large pages: fresh memory is then filled in a third of the time (measured on Linux).
    memory = torch.from_numpy(np.empty(sum(rows) * sum(widths) * dtype.itemsize, dtype=np.uint8))
    joined = memory.view(dtype).view(sum(rows), sum(widths))
    parts, left = [], 0
    for shards, width in zip(arrays, widths, strict=True):
        top = 0
        for shard in shards:
            parts.append((shard, joined[top : top + shard.rows, left : left + width]))
            top += shard.rows
        left += width

    def read(item: tuple[Shard, torch.Tensor]) -> None:
        shard, part = item
        own = part if part.is_contiguous() else torch.empty_like(part, memory_format=torch.contiguous_format)
        if shard.rows:
            target = own.view(torch.uint8).flatten().numpy().data
            read_features(shard, target, check=shard.path in unverified)
        if own is not part:
            part.copy_(own)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(read, parts):
            pass
    return joined


def _checked_index(shard: Shard) -> torch.Tensor:
    index = map_shard(shard)[1].clone()
    ascending = bool((index[1:] > index[:-1]).all())
    if len(index) and not (ascending and index[0] >= shard.start and index[-1] < shard.stop):
        raise DamagedShard(shard.path, "its positions are not ascending within its range")
    return index
