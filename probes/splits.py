"""Named splits: classes frozen from train and aligned by name, and a seeded stratified hold-out. No torch."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probes.csv_source import csv_splits
from probes.holdout import choose_holdout as choose_holdout
from probes.label_sets import (
    build_multi_hot,
    check_multi_label,
    check_single_label,
    label_sets,
    rarest_classes,
)
from probes.sections import DataSection, RecipeError
from probes.source_contract import ImageSource, some
from probes.sources import open_source, split_paths


@dataclass
class Split:
    """Some samples of a source, in the order of `indices`."""

    name: str
    """"train", "holdout", "val" or "test"."""
    source: ImageSource
    indices: NDArray[np.int64]
    """[N] positions in the source, ascending."""
    targets: NDArray[np.int64]
    """[N] class index of each sample; with `multi_hot` its first class, and 0 for a sample of none."""
    multi_hot: NDArray[np.bool_] | None = None
    """[N, C] which classes each sample shows, where it may show several (`data.labels=multi`)."""
    _fingerprint: str | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def keys(self) -> list[str]:
        """Name of each sample, N of them."""
        return [self.source.keys[index] for index in self.indices]

    def take(self, name: str, positions: NDArray[np.int64] | NDArray[np.bool_]) -> Split:
        """Some of these samples as a split of their own; positions ascend, or are a mask."""
        shown = None if self.multi_hot is None else self.multi_hot[positions]
        return Split(name, self.source, self.indices[positions], self.targets[positions], shown)

    def fingerprint(self) -> str:
        """Hexadecimal sha256 over exactly these samples: names, labels, sizes and times of their files."""
        if self._fingerprint is None:
            self._fingerprint = self.source.fingerprint(self.indices)
        return self._fingerprint

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Splits:
    """The data of one run."""

    classes: list[str]
    """Class names; target i is classes[i] in every split."""
    train: Split
    selection: Split | None
    """"val", or "holdout" from train; what a run may choose by."""
    test: Split | None
    notes: list[str]
    """Sentences that a reader of the result must know."""

    @property
    def named(self) -> dict[str, Split]:
        """The splits there are by name, in the order train, holdout or val, test."""
        return {split.name: split for split in (self.train, self.selection, self.test) if split is not None}


@dataclass(frozen=True)
class Evaluation:
    """A test split with classes of its own."""

    classes: list[str]
    """Labels; target i is classes[i]."""
    test: Split
    notes: list[str]
    """Sentences that a reader of the result must know."""

    @property
    def multi_hot(self) -> NDArray[np.bool_]:
        """[N, C] which classes each sample shows; one a sample where it has one label."""
        shown = self.test.multi_hot
        return np.eye(len(self.classes), dtype=np.bool_)[self.test.targets] if shown is None else shown

    @property
    def named(self) -> dict[str, Split]:
        """The one split by its name."""
        return {"test": self.test}


def prepare_splits(data: DataSection, *, multi_label: bool = False) -> Splits:
    """Open the sources of a recipe, align their classes and carve the hold-out. Reads no image.

    A CSV with a `split` column given as `train` also fills `val` and `test` where the recipe names none.

    Args:
        data: the recipe's section.
        multi_label: the caller can train on images of several classes (`data.labels=multi`).

    Raises:
        RecipeError: nothing to train on, a path is missing or wrong, fewer than two classes, a class of
            val or test that train does not have, or images of several classes where the recipe or the caller
            expects one each.
    """
    notes: list[str] = []
    if data.train is None:
        raise RecipeError("data.train is null; name the training images, such as data.train=path/to/train")
    sources = {"train": _open(data, data.train, "train")}
    paths = _paths_by_split(data, data.train, notes)
    sources |= {name: _open(data, path, name) for name, path in paths.items() if name != "train"}
    multi = data.labels == "multi"
    if not multi:
        check_single_label(sources, notes)
    elif not multi_label:
        raise RecipeError(
            "data.labels is 'multi' and this command trains on one class an image; use another method, or "
            "data.labels=single"
        )
    sets = {name: label_sets(source) for name, source in sources.items()} if multi else {}
    labels = {name: set().union(*sets[name]) if multi else set(source.labels) for name, source in sources.items()}
    classes = sort_classes(labels["train"])
    if len(classes) < 2:
        only = f"one class ({classes[0]})" if classes else "no class"
        raise RecipeError(f"data.train: {paths['train']} has {only}; a classifier needs two")
    _check_unknown_classes(labels, classes)
    _note_differences(data, sources, labels, classes, notes)
    whole = {name: _whole_split(name, source, classes, sets.get(name)) for name, source in sources.items()}
    check_multi_label({name: split.multi_hot for name, split in whole.items() if split.multi_hot is not None}, notes)
    train, selection = whole["train"], whole.get("val")
    if selection is None and data.holdout > 0:
        train, selection = _carve_holdout(train, data.holdout, data.holdout_seed, notes)
    return Splits(classes, train, selection, whole.get("test"), notes)


def open_evaluation_split(data: DataSection) -> Evaluation:
    """`data.test` alone, or the rows of split "test" in CSVs given as `data.train`. Reads no image.

    The classes are those of its own labels; all classes of a library's set, in its order, also those that do not
    occur. Where an image shows several classes its target is the first of them, and `multi_hot` has them all.

    Raises:
        DataAbsent: nothing is there.
        RecipeError: `data.test` is null or wrong, or there are no classes.
    """
    notes: list[str] = []
    test = data.test or (_paths_by_split(data, data.train, notes).get("test") if data.train else None)
    if test is None:
        raise RecipeError("data.test is null; name the images to score, such as data.test=path/to/test")
    source = _open(data, test, "test")
    several = data.labels == "multi" or source.multi_hot is not None
    sets = label_sets(source) if several else None
    labels = set(source.labels) if sets is None else set().union(*sets)
    classes = sort_classes(labels) if source.classes is None else source.classes
    if not classes:
        raise RecipeError(f"data.test: {test} has no classes; expected labelled images")
    notes = [note for note in notes if note.startswith("test ")]
    return Evaluation(classes, _whole_split("test", source, classes, sets), notes)


def describe(splits: Splits | Evaluation) -> dict[str, Any]:
    """What `data.json` of a run folder holds: classes, notes, and paths, counts, fingerprint per split."""
    described = {}
    for name, split in splits.named.items():
        shown = split.multi_hot
        counts = np.bincount(split.targets, minlength=len(splits.classes)) if shown is None else shown.sum(axis=0)
        described[name] = {
            "paths": split.source.paths,
            "count": len(split),
            "per_class": {label: int(count) for label, count in zip(splits.classes, counts, strict=True)},
            "fingerprint": split.fingerprint(),
        }
    return {"classes": splits.classes, "splits": described, "notes": splits.notes}


def sort_classes(labels: set[str]) -> list[str]:
    """Class names in their frozen order: as numbers when all are integers, else as text."""
    if all(label.removeprefix("-").isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _open(data: DataSection, path: str, split: str) -> ImageSource:
    return open_source(
        data.format,
        path,
        split,
        media=data.media,
        root=data.root,
        download=data.download,
        multi_label=data.labels == "multi",
        image_column=data.image_column,
        label_column=data.label_column,
    )


def _paths_by_split(data: DataSection, train: str, notes: list[str]) -> dict[str, str]:
    """Path of each split that there is, in the order train, val, test."""
    named = {"train": train, "val": data.val, "test": data.test}
    if data.format == "csv":
        _fill_from_column(named, train, notes)
    return {name: path for name, path in named.items() if path is not None}


def _fill_from_column(named: dict[str, str | None], train: str, notes: list[str]) -> None:
    """Let the `split` column of the training CSVs stand for the splits that have no path."""
    splits = {path: csv_splits(path) for path in split_paths(train, "csv")}
    for name, given in named.items():
        holding = [path for path, found in splits.items() if name in found]
        if given is None and holding:
            named[name] = ",".join(holding)
            notes.append(f"{name} is the rows of split {name!r} in {named[name]}")


def _check_unknown_classes(labels: dict[str, set[str]], classes: list[str]) -> None:
    problems = []
    for name, found in labels.items():
        unknown = sort_classes(found - set(classes))
        if not unknown:
            continue
        hints = []
        for label in unknown:
            near = difflib.get_close_matches(label, classes, n=1)
            hints.append(repr(label) + (f" (did you mean {near[0]!r}?)" if near else ""))
        problems.append(f"data.{name} has {len(unknown)} class(es) unknown to train: {some(hints)}")
    if problems:
        known = some([repr(label) for label in classes])
        raise RecipeError("\n".join([*problems, f"classes are matched by name; train has {known}; rename or remove"]))


def _note_differences(
    data: DataSection,
    sources: dict[str, ImageSource],
    labels: dict[str, set[str]],
    classes: list[str],
    notes: list[str],
) -> None:
    found = {"train_size": len(sources["train"]), "num_classes": len(classes)}
    for key, value in found.items():
        expected = dataclasses.asdict(data)[key]
        if expected is not None and expected != value:
            notes.append(f"data.{key} is {expected:,} but {value:,} were found; the run follows what was found")
    for name, occurring in labels.items():
        absent = sort_classes(set(classes) - occurring)
        if absent:
            notes.append(f"{name} has no sample of {len(absent)} class(es) of train: {some(absent)}")
    if data.format != "csv":  # a CSV's splits are told apart by rows
        read = {name: source.paths for name, source in sources.items()}  # a library's set says which split it is
        for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
            if first in read and read[first] == read.get(second):
                notes.append(f"{first} and {second} are the same images; the score on {second} is not independent")


def _whole_split(name: str, source: ImageSource, classes: list[str], sets: list[list[str]] | None) -> Split:
    indices = np.arange(len(source), dtype=np.int64)
    if sets is not None:
        shown = build_multi_hot(sets, classes)
        return Split(name, source, indices, shown.argmax(axis=1).astype(np.int64), shown)
    position = {label: index for index, label in enumerate(classes)}
    targets = np.array([position[label] for label in source.labels], dtype=np.int64)
    return Split(name, source, indices, targets)


def _carve_holdout(train: Split, share: float, seed: int, notes: list[str]) -> tuple[Split, Split | None]:
    """A seeded hold-out, stratified by class; where images show several, by the rarest of each."""
    strata = train.targets if train.multi_hot is None else rarest_classes(train.multi_hot)
    held = choose_holdout(strata, train.keys, share, seed)
    if not held.any():
        notes.append(f"data.holdout {share} of train leaves no image out of any class; there is no selection split")
        return train, None
    rest, holdout = train.take("train", ~held), train.take("holdout", held)
    missing = len(_occurring(train) - _occurring(holdout))
    lost = len(_occurring(train) - _occurring(rest))
    if lost:
        notes.append(f"the hold-out takes every image of {lost} class(es); lower data.holdout or change its seed")
    if missing:
        notes.append(f"{missing} class(es) are too small to give an image to the hold-out")
    return rest, holdout


def _occurring(split: Split) -> set[int]:
    """Indices of the classes that a split shows."""
    found = split.targets if split.multi_hot is None else np.flatnonzero(split.multi_hot.any(axis=0))
    return set(found.tolist())
