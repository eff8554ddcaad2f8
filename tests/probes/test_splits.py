"""Splits: classes by name, the hold-out, CSV columns, and what is said about mistakes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from probes.sections import DataSection, RecipeError
from probes.splits import Splits, choose_holdout, describe, prepare_splits, sort_classes


def make_folder(root: Path, counts: dict[str, int]) -> str:
    """Class folders with stand-ins for images: splitting must not read them."""
    for label, count in counts.items():
        for number in range(count):
            path = root / label / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no image")
    return str(root)


def prepare(seed: int = 0, **options: object) -> Splits:
    return prepare_splits(DataSection(holdout_seed=seed, **options))  # type: ignore[arg-type]


def test_integer_classes_sort_as_numbers_and_others_as_text():
    assert sort_classes({"10", "9", "100"}) == ["9", "10", "100"]
    assert sort_classes({"10", "9", "x"}) == ["10", "9", "x"]


def test_targets_follow_names_on_every_split(tmp_path):
    train = make_folder(tmp_path / "train", {"2": 2, "10": 1, "1": 1})
    test = make_folder(tmp_path / "test", {"10": 2, "2": 1})
    splits = prepare(train=train, test=test)
    assert splits.classes == ["1", "2", "10"]
    assert splits.test is not None
    assert splits.selection is None
    for split in (splits.train, splits.test):
        assert [splits.classes[target] for target in split.targets] == [key.split("/")[0] for key in split.keys]
    assert splits.test.targets.dtype == np.int64
    assert splits.test.targets.tolist() == [2, 2, 1]
    assert splits.notes == ["test has no sample of 1 class(es) of train: 1"]
    assert list(splits.named) == ["train", "test"]


def test_classes_unknown_to_train_are_all_named_with_near_ones(tmp_path):
    train = make_folder(tmp_path / "train", {"cat": 1, "dog": 1})
    val = make_folder(tmp_path / "val", {"cats": 1, "dog": 1})
    test = make_folder(tmp_path / "test", {"zebra": 1})
    with pytest.raises(RecipeError) as caught:
        prepare(train=train, val=val, test=test)
    lines = str(caught.value).splitlines()
    assert lines[0] == "data.val has 1 class(es) unknown to train: 'cats' (did you mean 'cat'?)"
    assert lines[1] == "data.test has 1 class(es) unknown to train: 'zebra'"
    assert "train has 'cat'; 'dog'" in lines[2]


def test_train_is_needed_and_needs_two_classes(tmp_path):
    with pytest.raises(RecipeError, match=r"data\.train is null"):
        prepare()
    with pytest.raises(RecipeError, match=r"has one class \(cat\)"):
        prepare(train=make_folder(tmp_path, {"cat": 3}))


def test_differences_from_the_expected_sizes_are_noted(tmp_path):
    train = make_folder(tmp_path, {"cat": 3, "dog": 2})
    agreeing = prepare(train=train, train_size=5, num_classes=2, holdout=0.4)
    assert agreeing.notes == []
    differing = prepare(train=train, train_size=1281167, num_classes=1000)
    assert differing.notes == [
        "data.train_size is 1,281,167 but 5 were found; the run follows what was found",
        "data.num_classes is 1,000 but 2 were found; the run follows what was found",
    ]


def test_the_same_path_for_two_splits_is_noted(tmp_path):
    train = make_folder(tmp_path, {"cat": 3, "dog": 2})
    (note,) = prepare(train=train, test=train).notes
    assert note == "train and test are the same images; the score on test is not independent"


def test_val_is_the_selection_and_leaves_train_whole(tmp_path):
    train = make_folder(tmp_path / "train", {"cat": 4, "dog": 4})
    val = make_folder(tmp_path / "val", {"cat": 1, "dog": 1})
    splits = prepare(train=train, val=val, holdout=0.5)
    assert splits.selection is not None
    assert (splits.selection.name, len(splits.selection), len(splits.train)) == ("val", 2, 8)


# The hold-out


def test_holdout_takes_its_share_of_each_class_of_the_digits():
    targets = load_digits().target.astype(np.int64)
    keys = [f"{index:04d}" for index in range(len(targets))]
    held = choose_holdout(targets, keys, 0.1, seed=3)
    sizes = np.bincount(targets)
    assert np.bincount(targets[held]).tolist() == [round(0.1 * int(size)) for size in sizes]
    assert held.sum() == 179
    assert not np.array_equal(held, choose_holdout(targets, keys, 0.1, seed=4))
    # Chosen at random: the held-out positions spread over the whole list instead of crowding at one end.
    assert abs(np.flatnonzero(held).mean() / len(held) - 0.5) < 0.1


def test_holdout_splits_train_into_two_disjoint_parts(tmp_path):
    counts = {"ten": 10, "five": 5, "two": 2, "one": 1}
    train = make_folder(tmp_path, counts)
    splits = prepare(train=train, holdout=0.9)
    assert splits.selection is not None
    assert splits.selection.name == "holdout"
    described = describe(splits)["splits"]
    assert described["holdout"]["per_class"] == {"five": 4, "one": 0, "ten": 9, "two": 1}
    assert described["train"]["per_class"] == {"five": 1, "one": 1, "ten": 1, "two": 1}
    held, rest = set(splits.selection.keys), set(splits.train.keys)
    assert not held & rest
    assert len(held | rest) == sum(counts.values())
    assert splits.notes == ["1 class(es) are too small to give an image to the hold-out"]


def test_holdout_depends_on_seed_and_names_alone(tmp_path):
    train = make_folder(tmp_path, {"cat": 20, "dog": 20})
    first = prepare(0, train=train, holdout=0.25)
    np.random.seed(7)
    random.seed(7)
    again = prepare(0, train=train, holdout=0.25)
    other = prepare(1, train=train, holdout=0.25)
    chosen = [splits.selection.keys for splits in (first, again, other) if splits.selection is not None]
    assert chosen[0] == chosen[1] != chosen[2]
    prints = [splits.selection.fingerprint() for splits in (first, again, other) if splits.selection is not None]
    assert prints[0] == prints[1] != prints[2]
    assert first.train.fingerprint() not in (other.train.fingerprint(), prints[0])
    keys = [*(f"cat/{i}" for i in range(20)), *(f"dog/{i}" for i in range(20))]
    targets = np.repeat(np.arange(2), 20)
    order = np.random.default_rng(0).permutation(40)
    held = choose_holdout(targets, keys, 0.25, 0)
    shuffled = choose_holdout(targets[order], [keys[i] for i in order], 0.25, 0)
    assert np.array_equal(shuffled, held[order])


def test_holdout_too_small_to_take_anything_is_noted(tmp_path):
    splits = prepare(train=make_folder(tmp_path, {"cat": 1, "dog": 1}), holdout=0.5)
    assert splits.selection is None
    assert len(splits.train) == 2
    assert "no selection split" in splits.notes[0]


# CSV


def test_a_csv_with_a_split_column_fills_val_and_test(tmp_path):
    make_folder(tmp_path, {"images": 6})
    names = ("train", "train", "val", "test", "train", "test")
    rows = [f"images/{i:03d}.png,{'ab'[i % 2]},{name}" for i, name in enumerate(names)]
    path = tmp_path / "data.csv"
    path.write_text("\n".join(["path,label,split", *rows]))
    splits = prepare(format="csv", train=str(path), holdout=0.3)
    assert {name: split.indices.tolist() for name, split in splits.named.items()} == {
        "train": [0, 1, 2],
        "val": [0],
        "test": [0, 1],
    }
    assert splits.train.keys == ["images/000.png", "images/001.png", "images/004.png"]
    assert splits.notes[:2] == [
        f"val is the rows of split 'val' in {path}",
        f"test is the rows of split 'test' in {path}",
    ]
    other = tmp_path / "other.csv"
    other.write_text("path,label\nimages/005.png,b\n")
    named = prepare(format="csv", train=str(path), test=str(other))
    assert named.test is not None
    assert named.test.keys == ["images/005.png"]


def test_a_csv_without_a_split_column_is_all_train(tmp_path):
    make_folder(tmp_path, {"images": 2})
    path = tmp_path / "data.csv"
    path.write_text("path,label\nimages/000.png,a\nimages/001.png,b\n")
    splits = prepare(format="csv", train=str(path))
    assert list(splits.named) == ["train"]
    assert describe(splits) == {
        "classes": ["a", "b"],
        "splits": {
            "train": {
                "paths": [str(path)],
                "count": 2,
                "per_class": {"a": 1, "b": 1},
                "fingerprint": splits.train.fingerprint(),
            }
        },
        "notes": [],
    }
