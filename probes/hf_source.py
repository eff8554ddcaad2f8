"""Sets in the format of Hugging Face's `datasets`: saved to disk, parquet files, or by name. It is imported on use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from probes.label_sets import build_multi_hot
from probes.section_base import DataAbsent, RecipeError
from probes.source_contract import Samples

SPLIT_NAMES = {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}
"""What sets call each split."""


class HuggingFaceSource(Samples):
    """The rows of one split, with an image column and a label column.

    Labels are class names where the column has them, else texts or digits; a list of labels makes `multi_hot`. Keys are
    positions, which sort as they stand. It can be pickled.

    Args:
        dataset: `datasets.Dataset`.
        name: what messages and paths call it, such as "beans:train".
        image_column: null takes the only column of images.
        label_column: null takes the only column of classes, or "label" or "labels".

    Raises:
        RecipeError: no or several columns to choose from, or a row without a label.
    """

    def __init__(self, dataset: Any, name: str, image_column: str | None, label_column: str | None) -> None:
        import datasets

        super().__init__([name])
        self.image_column, label = _choose_columns(dataset.features, name, image_column, label_column)
        values = dataset[label][:]
        feature = dataset.features[label]
        inner = getattr(feature, "feature", None)
        names = getattr(feature if inner is None else inner, "names", None)
        rows = [value if inner is not None else [value] for value in values]
        wrong = next((n for n, row in enumerate(rows) if row is None or any(x in (None, -1) for x in row)), None)
        if wrong is not None:
            raise RecipeError(f"{name} row {wrong} has label {values[wrong]!r} in column {label}; expected a class")
        found = [[str(item if names is None else names[item]) for item in row] for row in rows]
        if names is not None or inner is not None:
            self.classes = names or sorted({item for row in found for item in row})
        if inner is not None:
            assert self.classes is not None
            self.multi_hot = build_multi_hot(found, self.classes)
        self.labels = [" + ".join(row) for row in found]
        width = len(str(len(self.labels)))
        self.keys = [f"{index:0{width}}" for index in range(len(self.labels))]
        self.rows = dataset.select_columns([self.image_column]).cast_column(
            self.image_column, datasets.Image(decode=False)
        )
        self.files = [str(entry["filename"]) for entry in dataset.cache_files]

    def read(self, index: int) -> bytes:
        """The encoded image."""
        entry = self.rows[index][self.image_column]
        data: bytes = entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()
        return data

    def location(self, index: int) -> str:
        """The set and the position in it."""
        return f"{self.paths[0]}, row {index}"

    def stamp(self, index: int) -> tuple[int, int]:
        """Size in bytes and modification time in nanoseconds of all files of the split."""
        return self._total_stamp

    def fingerprint(self, indices: Iterable[int] | None = None) -> str:
        """Hexadecimal sha256 over the name, the image column, and key, label, size and time of the samples."""
        content = [*self.paths, self.image_column, super().fingerprint(indices)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def _total_stamp(self) -> tuple[int, int]:
        statuses = [Path(file).stat() for file in self.files]
        return sum(item.st_size for item in statuses), max((item.st_mtime_ns for item in statuses), default=0)


def open_hf(
    path: str,
    split: str,
    *,
    root: str,
    download: bool,
    image_column: str | None = None,
    label_column: str | None = None,
) -> HuggingFaceSource:
    """One split of a set.

    Args:
        path: a folder of `save_to_disk`, a folder of parquet files or one of them, or a name on the hub; after a colon
            the split where it is not called `split`: "beans:validation".
        split: "train", "val" or "test".
        root: what `datasets` prepares from parquet files or downloads goes to its sub-folder "huggingface".
        download: let it fetch a set that is not there.
        image_column: see `HuggingFaceSource`.
        label_column: see `HuggingFaceSource`.

    Raises:
        DataAbsent: nothing is there.
        RecipeError: `datasets` is not installed, or the set has no such split or columns.
    """
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(
            f"data.format=hf needs a library that is not installed ({error}); run pip install 'eva-clip-transfer[hf]'"
        ) from error
    name, colon, chosen = (path, "", "") if Path(path).exists() else path.rpartition(":")
    name, chosen = (name, chosen) if colon else (path, "")
    try:
        found = _load(datasets, Path(name), name, str(Path(root) / "huggingface"), download)
    # The library raises what comes: its own errors, pyarrow's, ConnectionError, ValueError.
    except Exception as error:
        if not Path(name).exists():
            raise DataAbsent(
                f"nothing at {name}, and no set of that name is prepared below {root} ({error}); expected a folder of "
                "save_to_disk, parquet files, or a name on the hub with data.download=true"
            ) from error
        raise RecipeError(
            f"{name} cannot be read ({error}); expected a folder of save_to_disk or parquet files"
        ) from error
    if isinstance(found, datasets.Dataset):
        return HuggingFaceSource(found, path, image_column, label_column)
    wanted = (chosen,) if chosen else SPLIT_NAMES[split]
    taken = next((option for option in wanted if option in found), None)
    if taken is None:
        has = ", ".join(map(str, found))
        raise RecipeError(
            f"{name} has no split {' or '.join(wanted)}; it has {has}; name one as {name}:{next(iter(found))}"
        )
    return HuggingFaceSource(found[taken], f"{name}:{taken}", image_column, label_column)


def _load(datasets: Any, place: Path, name: str, cache: str, download: bool) -> Any:
    """A `Dataset`, or a `DatasetDict` of splits."""
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        return datasets.load_from_disk(str(place))
    if place.is_file():
        return datasets.load_dataset("parquet", data_files=str(place), split="train", cache_dir=cache)
    if place.is_dir():
        return datasets.load_dataset("parquet", data_dir=str(place), cache_dir=cache)
    local = datasets.DownloadConfig(local_files_only=not download)
    return datasets.load_dataset(name, cache_dir=cache, download_config=local)


def _choose_columns(features: Any, name: str, image: str | None, label: str | None) -> tuple[str, str]:
    """Names of the image and the label column."""
    kinds = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
    images = [column for column, kind in kinds.items() if type(kind).__name__ == "Image"]
    classes = [column for column, kind in kinds.items() if type(kind).__name__ == "ClassLabel"]
    if len(classes) != 1:
        classes = [column for column in ("label", "labels") if column in kinds]
    has = ", ".join(f"{column} ({type(kind).__name__})" for column, kind in kinds.items())
    for what, given, options in (("image", image, images), ("label", label, classes)):
        if given is not None and given not in kinds:
            raise RecipeError(f"{name} has no column {given!r} (data.{what}_column); it has {has}")
        if given is None and len(options) != 1:
            raise RecipeError(
                f"{name} has {len(options)} columns that could be the {what}; set data.{what}_column; it has {has}"
            )
    return image or images[0], label or classes[0]
