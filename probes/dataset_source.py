"""Map-style sets of other libraries, which yield (PIL image, target), behind the contract of sources."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from probes.sections import RecipeError
from probes.source_contract import Samples

if TYPE_CHECKING:
    from PIL import Image

TARGET_ATTRIBUTES = ("targets", "labels", "_labels", "y")
"""Where sets keep the class index of every sample."""
ROW_ATTRIBUTES = ("samples", "_samples")
"""Where sets keep (file, class index) of every sample."""
FILE_ATTRIBUTES = (*ROW_ATTRIBUTES, "_image_files", "_images", "fnames")
"""Where sets keep the file of every sample."""
CHECKED_SAMPLES = 5
"""Samples that are decoded to see whether the targets of an attribute are those that the set yields."""


class DatasetSource(Samples):
    """A set that yields (PIL image, class index) or (PIL image, multi-hot vector).

    A label is the name of its class, or the digits of the index where two classes share a name; `classes` are all
    classes of the set, in its own order. It can be pickled as far as the set can.

    Args:
        dataset: has `len`, is indexed by integers, and decodes on access.
        name: what messages and paths call it, such as "CIFAR10:test".
        library: name and version of the library it comes from; part of the fingerprint.
        root: folder of its files.

    Raises:
        RecipeError: it is empty, or yields something else.
    """

    def __init__(self, dataset: Any, *, name: str, library: str, root: Path) -> None:
        super().__init__([name])
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or not len(dataset):
            raise RecipeError(f"{library} {name} has no samples that can be counted and indexed; expected such a set")
        self.dataset, self.library, self.root = dataset, library, root
        targets = read_targets(dataset, name)
        texts = class_names(dataset, targets)
        self.class_texts = texts
        self.classes = texts if len(set(texts)) == len(texts) else [str(index) for index in range(len(texts))]
        if targets.ndim == 2:
            self.multi_hot = targets.astype(np.bool_)
            self.labels = [" + ".join(np.array(self.classes, dtype=object)[row]) for row in self.multi_hot]
        else:
            self.labels = [self.classes[target] for target in targets.tolist()]
        self._files = sample_files(dataset)
        self.keys = self._name_samples()

    def read(self, index: int) -> bytes:
        """Not possible: the set decodes by itself; see `image`."""
        raise NotImplementedError(f"{self.paths[0]} yields pictures, not files")

    def image(self, index: int) -> Image.Image:
        """The picture that the set yields."""
        image: Image.Image = self.dataset[index][0]
        return image

    def location(self, index: int) -> str:
        """Path of the file, or the set and the position in it."""
        return self._files[index] if self._files else f"{self.paths[0]}, sample {index}"

    def stamp(self, index: int) -> tuple[int, int]:
        """Size in bytes and modification time in nanoseconds; of all files below the root where samples have none."""
        if self._files is None:
            return self._total_stamp
        status = Path(self._files[index]).stat()
        return status.st_size, status.st_mtime_ns

    def fingerprint(self, indices: Iterable[int] | None = None) -> str:
        """Hexadecimal sha256 over set, split, library, its version, and key, label, size and time of the samples."""
        content = [self.library, *self.paths, super().fingerprint(indices)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def _total_stamp(self) -> tuple[int, int]:
        statuses = [path.stat() for path in self.root.rglob("*") if path.is_file()]
        return sum(item.st_size for item in statuses), max((item.st_mtime_ns for item in statuses), default=0)

    def _name_samples(self) -> list[str]:
        """Files from the root where they tell samples apart, else positions, which sort as they stand."""
        if self._files and len(set(self._files)) == len(self._files):
            return [os.path.relpath(file, self.root) for file in self._files]
        width = len(str(len(self.labels)))
        return [f"{index:0{width}}" for index in range(len(self.labels))]


def read_targets(dataset: Any, name: str) -> NDArray[Any]:
    """Class indices int64 [N], or multi-hot bool [N, C]; without decoding where the set exposes them.

    An attribute counts only when it agrees with what the set yields for a few samples: ImageNet-like subsets keep
    indices of their parents there.

    Raises:
        RecipeError: the set yields something other than (PIL image, class index or multi-hot vector).
    """
    from PIL import Image

    checked: dict[int, Any] = {}
    for index in sorted({round(share) for share in np.linspace(0, len(dataset) - 1, CHECKED_SAMPLES)}):
        try:
            picture, target = dataset[index]
        except Exception:  # an unreadable picture is met again, and named, where it is used
            continue
        if not isinstance(picture, Image.Image):
            raise RecipeError(f"{name} yields a {type(picture).__name__}; expected a picture (PIL) and its class")
        checked[index] = np.asarray(target)
    for exposed in _exposed_targets(dataset):
        if len(exposed) == len(dataset) and all(np.array_equal(exposed[i], checked[i]) for i in checked):
            return exposed
    print(f"{name} does not list its classes: reading all {len(dataset):,} samples for them", flush=True)
    try:
        read = _as_targets([dataset[index][1] for index in range(len(dataset))])
    except (TypeError, ValueError):
        read = None
    if read is None:
        found = type(next(iter(checked.values()), None)).__name__
        raise RecipeError(
            f"{name} yields no class index or multi-hot vector (but {found}); it is no classification set"
        )
    return read


def class_names(dataset: Any, targets: NDArray[Any]) -> list[str]:
    """All class names in index order; digits where the set has no names.

    Raises:
        RecipeError: there are fewer names than classes.
    """
    needed = targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if not isinstance(names, Sequence) or isinstance(names, str):
        return [str(index) for index in range(needed)]
    if len(names) < needed:
        raise RecipeError(f"the set has {needed} classes and names {len(names)} of them")
    return [", ".join(name) if isinstance(name, (tuple, list)) else str(name) for name in names]


def sample_files(dataset: Any) -> list[str] | None:
    """File of each sample, where the set exposes them."""
    for attribute in FILE_ATTRIBUTES:
        rows = getattr(dataset, attribute, None)
        if not isinstance(rows, (list, tuple)) or len(rows) != len(dataset):
            continue
        files = [row[0] if isinstance(row, (list, tuple)) else row for row in rows]
        if all(isinstance(file, (str, Path)) for file in files) and Path(files[0]).is_file():
            return [str(file) for file in files]
    return None


def _exposed_targets(dataset: Any) -> Iterator[NDArray[Any]]:
    """What the set's attributes offer as targets, most specific first."""
    offered: list[Any] = []
    samples, label_map = getattr(dataset, "samples", None), getattr(dataset, "label_map", None)
    if samples and label_map:  # ObjectNet: folder name -> index among the classes that overlap with ImageNet
        offered.append([label_map.get(Path(row[0]).parent.name, -1) for row in samples])
    offered += [getattr(dataset, attribute, None) for attribute in TARGET_ATTRIBUTES]
    offered += [[row[1] for row in getattr(dataset, attribute, None) or []] for attribute in ROW_ATTRIBUTES]
    offered.append([row[2] for row in getattr(dataset, "bndboxes", [])])  # VOC2007: one object a sample
    files = getattr(dataset, "fnames", [])  # ImageNet-V2: folders 0 to 999
    offered.append([int(Path(file).parent.name) for file in files if Path(file).parent.name.isdecimal()])
    transform = getattr(dataset, "target_transform", None)
    for values in offered:
        if values is None or not len(values):
            continue
        try:
            targets = _as_targets(values if transform is None else [transform(value) for value in values])
        except (TypeError, ValueError):
            continue
        if targets is not None:
            yield targets


def _as_targets(values: Any) -> NDArray[Any] | None:
    """int64 [N] or bool [N, C]; None for anything else, also for negative indices."""
    array = np.stack([np.asarray(value) for value in values]) if isinstance(values, list) else np.asarray(values)
    if array.ndim == 1 and np.issubdtype(array.dtype, np.integer) and array.min() >= 0:
        return array.astype(np.int64)
    if array.ndim == 2 and array.dtype.kind in "biuf" and set(np.unique(array).tolist()) <= {0, 1}:
        return array.astype(np.bool_)
    return None
