"""The contract of image sources, and what the kinds of source share. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm"})
"""Extensions read as images, in any case."""


EXPECTED = {
    "folder": "a folder with one sub-folder of images per class",
    "csv": "a CSV file with the columns path,label[,split]",
    "tar": "WebDataset shards (.tar, .tar.gz, .tgz), such as shard-{000..012}.tar",
}


class ImageSource(Protocol):
    """A list of labelled images."""

    paths: list[str]
    """Folder, CSV file or shards that the samples come from."""
    keys: list[str]
    """Unique stable name of each sample: path inside the folder, path in the CSV, or shard and member."""
    labels: list[str]
    """Class name of each sample."""

    def read(self, index: int) -> bytes:
        """The encoded image."""
        ...

    def location(self, index: int) -> str:
        """Where a person finds the image."""
        ...

    def caption(self, index: int) -> str | None:
        """A text that describes the image, where the source has one."""
        ...

    def stamp(self, index: int) -> tuple[int, int]:
        """Size in bytes and modification time in nanoseconds."""
        ...

    def fingerprint(self, indices: Iterable[int] | None = None) -> str:
        """Hexadecimal sha256 over the sorted (key, label, size, time) of the chosen or of all samples."""
        ...

    def __len__(self) -> int: ...


class Samples:
    """What all sources share."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self.keys: list[str] = []
        self.labels: list[str] = []

    def __len__(self) -> int:
        return len(self.keys)

    def caption(self, index: int) -> str | None:
        """None: only some kinds of source have captions."""
        return None

    def stamp(self, index: int) -> tuple[int, int]:
        """Size in bytes and modification time in nanoseconds."""
        raise NotImplementedError

    def fingerprint(self, indices: Iterable[int] | None = None) -> str:
        """Hexadecimal sha256 over the sorted (key, label, size, time) of the chosen or of all samples."""
        chosen = range(len(self)) if indices is None else indices
        lines = sorted(json.dumps([self.keys[i], self.labels[i], *self.stamp(i)]) for i in chosen)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Files(Samples):
    """Samples that are files below a root; keys are their paths from it."""

    def __init__(self, paths: Sequence[str], root: Path) -> None:
        super().__init__(paths)
        self.root = root

    def read(self, index: int) -> bytes:
        """The encoded image."""
        return (self.root / self.keys[index]).read_bytes()

    def location(self, index: int) -> str:
        """Path of the file."""
        return str(self.root / self.keys[index])

    def stamp(self, index: int) -> tuple[int, int]:
        """Size in bytes and modification time in nanoseconds."""
        status = (self.root / self.keys[index]).stat()
        return status.st_size, status.st_mtime_ns


def is_image(name: str) -> bool:
    """Whether a file name is an image's: known extension, not hidden."""
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def some(items: Sequence[str], most: int = 5) -> str:
    """The first few items, and how many more there are."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + rest


def short_names(paths: Sequence[str]) -> list[str]:
    """Base names where they tell the paths apart, else the paths."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)
