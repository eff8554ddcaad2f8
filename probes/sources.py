"""Open images of any kind behind one contract: class folders, CSV files, WebDataset shards, libraries' sets.

No torch, but for libraries' sets.

A source lists its samples once and reads the bytes of one on demand. It holds no open file, so that it can be
pickled or forked into loader workers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from probes.csv_source import CsvSource
from probes.dataset_builders import LIBRARY_FORMATS, open_dataset
from probes.folder_source import FolderSource
from probes.hf_source import open_hf
from probes.sections import DataAbsent, RecipeError
from probes.source_contract import EXPECTED, ImageSource, Samples, short_names
from probes.tar_source import TarSource


class ConcatSource(Samples):
    """Several sources read as one; keys begin with the part's name."""

    def __init__(self, parts: Sequence[ImageSource]) -> None:
        super().__init__([path for part in parts for path in part.paths], parts[0].media)
        self.parts = list(parts)
        self._place: list[tuple[int, int]] = []  # part, index in it
        for number, (name, part) in enumerate(zip(short_names(self.paths), parts, strict=True)):
            self.keys += [f"{name}/{key}" for key in part.keys]
            self.labels += part.labels
            self._place += [(number, index) for index in range(len(part))]

    def read(self, index: int) -> bytes:
        """The encoded image or video."""
        part, inner = self._place[index]
        return self.parts[part].read(inner)

    def caption(self, index: int) -> str | None:
        """A text that describes the image, where its part has one."""
        part, inner = self._place[index]
        return self.parts[part].caption(inner)

    def location(self, index: int) -> str:
        """Where a person finds the image."""
        part, inner = self._place[index]
        return self.parts[part].location(inner)

    def stamp(self, index: int) -> tuple[int, int]:
        """Size in bytes and modification time in nanoseconds."""
        part, inner = self._place[index]
        return self.parts[part].stamp(inner)


def open_source(
    format: str,
    path: str,
    split: str,
    *,
    media: str = "image",
    root: str = "data",
    download: bool = False,
    multi_label: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSource:
    """Open the images of one split.

    Args:
        format: "folder", "csv", "tar", "hf", or a library ("clip_benchmark", "torchvision").
        path: a path, or several separated by commas; `{000..012}` in shards' names is expanded. Of a library the name
            of one set, `SET` or `SET:SPLIT`.
        split: "train", "val" or "test"; chooses the rows of a CSV that has a `split` column, and the library's split.
        media: "image" or "video".
        root: folder of the libraries' sets.
        download: let the library fetch an absent set.
        multi_label: a CSV may leave the label of an image of no class empty.
        image_column: of format "hf".
        label_column: of format "hf".

    Raises:
        DataAbsent: nothing is there.
        RecipeError: what is there is wrong.
    """
    try:
        if format in LIBRARY_FORMATS:
            if media != "image":
                raise RecipeError(f"data.media is {media} with format {format}; its sets are of images")
            return open_dataset(format, path, split, root, download)
        if format == "hf":
            if media != "image":
                raise RecipeError(f"data.media is {media} with format {format}; its sets are of images")
            columns = {"image_column": image_column, "label_column": label_column}
            return open_hf(path, split, root=root, download=download, **columns)
        paths = split_paths(path, format)
        for item in paths:
            _check_exists(item, format)
        if len(set(paths)) < len(paths):
            raise RecipeError(f"{path} names the same path twice")
        if format == "tar":
            return TarSource(paths, media)
        parts = [
            FolderSource(item, media) if format == "folder" else CsvSource(item, split, media, multi_label=multi_label)
            for item in paths
        ]
        return parts[0] if len(parts) == 1 else ConcatSource(parts)
    except DataAbsent as error:
        raise DataAbsent(f"data.{split}: {error}") from error
    except (RecipeError, OSError) as error:
        raise RecipeError(f"data.{split}: {error}") from error


def split_paths(path: str, format: str) -> list[str]:
    """The paths of a comma-separated list, braces expanded for "tar"; a path that exists is one path."""
    if Path(path).exists():
        return [path]
    parts = [part.strip() for part in path.split(",") if part.strip()]
    return [item for part in parts for item in (expand_braces(part) if format == "tar" else [part])]


def expand_braces(pattern: str) -> list[str]:
    """`x-{000..012}.tar` as its 13 names; the width of the first number is kept.

    Raises:
        RecipeError: a range runs backwards.
    """
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    if int(first) > int(last):
        raise RecipeError(f"{pattern} counts backwards; write {{{last}..{first}}}")
    names = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [item for name in names for item in expand_braces(pattern[: found.start()] + name + pattern[found.end() :])]


def _check_exists(path: str, format: str) -> None:
    """Raise with the nearest name beside the first part of a path that is missing; a folder is no file."""
    target = Path(path)
    if target.is_dir() and format != "folder":
        raise RecipeError(f"{path} is a folder; expected {EXPECTED[format]} (or data.format=folder)")
    if target.exists():
        return
    absent = target
    while not absent.parent.exists():
        absent = absent.parent
    siblings = {entry.name.lower(): entry for entry in absent.parent.iterdir()} if absent.parent.is_dir() else {}
    near = difflib.get_close_matches(absent.name.lower(), siblings, n=3)
    hint = f"; did you mean {' or '.join(str(siblings[name]) for name in near)}?" if near else ""
    raise DataAbsent(f"nothing at {path}; expected {EXPECTED[format]}{hint}")
