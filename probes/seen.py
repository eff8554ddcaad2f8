"""Which images weights were fitted on: noted beside them, and compared with images that would judge them. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from probes.runs import RunFolder
    from probes.splits import Evaluation, Split, Splits

FILE = "fitted_on.npz"
"""In the folder of the weights."""


@dataclass(frozen=True)
class Seen:
    """Images that weights were fitted on."""

    images: NDArray[np.uint64]
    """[N] digests, ascending: 8 bytes an image."""
    splits: frozenset[str]
    """Fingerprints of the splits that they are of, which tell them also where the data were moved."""

    @classmethod
    def of(cls, splits: Iterable[Split]) -> Seen:
        """All images of some splits."""
        splits = list(splits)
        images = np.concatenate([digest_images(split) for split in splits])
        return cls(np.unique(images), frozenset(split.fingerprint() for split in splits))

    def joined(self, other: Seen | None) -> Seen:
        """These and the other's."""
        if other is None:
            return self
        return Seen(np.union1d(self.images, other.images), self.splits | other.splits)

    def count(self, split: Split) -> int:
        """How many images of a split are among these."""
        if split.fingerprint() in self.splits:
            return len(split)
        return int(np.isin(digest_images(split), self.images).sum())

    def write(self, run: RunFolder) -> None:
        """Note them in a run folder, whole or not at all."""
        if not run.writes:
            return
        partial = run.path / f".{FILE}.partial"
        with partial.open("wb") as stream:
            np.savez(stream, images=self.images, splits=np.array(sorted(self.splits)))
        partial.replace(run.path / FILE)


def read_seen(weights: Path) -> Seen | None:
    """What a weights file was fitted on; None where nothing beside it says so."""
    file = weights.with_name(FILE)
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as stored:
        return Seen(stored["images"], frozenset(stored["splits"].tolist()))


def digest_images(split: Split) -> NDArray[np.uint64]:
    """A digest of where each image of a split lies, [N]: the same through a folder and through a CSV of its files."""
    source = split.source
    local = all(Path(path).exists() for path in source.paths)  # a library's set is a name, whatever folder this is
    found = bytearray()
    for index in split.indices:
        place = source.location(int(index))
        place = os.path.abspath(place) if local else place  # noqa: PTH100 (of a shard's member it is no path)
        found += hashlib.blake2b(place.encode(), digest_size=8).digest()
    return np.frombuffer(bytes(found), dtype="<u8").astype(np.uint64)


def note_seen_weights(weights: str, splits: Splits | Evaluation) -> Seen | None:
    """Note which images judge here that the weights, those of an earlier run, were trained on; returns all of those."""
    seen = read_seen(Path(weights)) if weights not in ("pretrained", "random") else None
    for name, split in splits.named.items() if seen is not None else ():
        count = seen.count(split) if seen is not None and name != "train" else 0
        if count:
            splits.notes.append(
                f"{weights} was trained on {count} of the {len(split)} images of {name}: what is measured on them is "
                "too favourable."
            )
    return seen
