"""The contract of image sources, and what the kinds of source share. No torch."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm"})
"""Extensions read as images, in any case."""


VIDEO_EXTENSIONS = frozenset({"mp4", "m4v", "mov", "avi", "mkv", "webm", "mpg", "mpeg", "ogv", "flv", "wmv", "3gp"})
"""Extensions read as videos, in any case."""


EXTENSIONS = {"image": IMAGE_EXTENSIONS, "video": VIDEO_EXTENSIONS}
"""Extensions of each kind of `data.media`."""


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
    media: str
    """"image" or "video"."""
    classes: list[str] | None
    """All labels in the order of the source's own class indices; None where a source has only what occurs."""
    class_texts: list[str] | None
    """What each of `classes` is called, where that differs from its label; names may repeat."""
    multi_hot: NDArray[np.bool_] | None
    """[N, C] which of `classes` each sample shows; None where each sample has one."""

    def read(self, index: int) -> bytes:
        """The encoded image or video."""
        ...

    def image(self, index: int) -> Image.Image:
        """The decoded image, or the centre frame of the video."""
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

    def __init__(self, paths: Sequence[str], media: str = "image") -> None:
        self.paths = list(paths)
        self.keys: list[str] = []
        self.labels: list[str] = []
        self.media = media
        self.classes: list[str] | None = None
        self.class_texts: list[str] | None = None
        self.multi_hot: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        """The encoded image or video."""
        raise NotImplementedError

    def image(self, index: int) -> Image.Image:
        """The decoded image, or the centre frame of the video.

        Raises:
            Exception: of many kinds, where it cannot be decoded.
        """
        if self.media == "video":
            from probes.video import decode_centre_frame

            return decode_centre_frame(self.read(index))
        return decode(self.read(index))

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

    def __init__(self, paths: Sequence[str], root: Path, media: str = "image") -> None:
        super().__init__(paths, media)
        self.root = root

    def read(self, index: int) -> bytes:
        """The encoded image or video."""
        return (self.root / self.keys[index]).read_bytes()

    def location(self, index: int) -> str:
        """Path of the file."""
        return str(self.root / self.keys[index])

    def stamp(self, index: int) -> tuple[int, int]:
        """Size in bytes and modification time in nanoseconds."""
        status = (self.root / self.keys[index]).stat()
        return status.st_size, status.st_mtime_ns


def decode(data: bytes) -> Image.Image:
    """An encoded image, decoded in full (the first frame of several).

    Raises:
        Exception: of many kinds, where Pillow cannot decode all of it or it is a decompression bomb.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def is_media(name: str, media: str = "image") -> bool:
    """Whether a file name is an image's (or a video's): known extension, not hidden."""
    return not name.startswith(".") and name.rpartition(".")[2].lower() in EXTENSIONS[media]


def some(items: Sequence[str], most: int = 5) -> str:
    """The first few items, and how many more there are."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + rest


def short_names(paths: Sequence[str]) -> list[str]:
    """Base names where they tell the paths apart, else the paths."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)
