"""Images of several classes: read from a CSV, aligned by name, held out by their rarest class, refused elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from probes import linear
from probes.data import SplitDataset, collate
from probes.label_sets import build_multi_hot, rarest_classes
from probes.sections import DataSection, RecipeError
from probes.splits import Splits, describe, open_evaluation_split, prepare_splits

REPO = Path(__file__).resolve().parents[2]


def write_csv(folder: Path, rows: list[tuple[str, str]]) -> str:
    """A CSV of (label, split) with one small picture a row."""
    lines = ["path,label,split"]
    for number, (label, split) in enumerate(rows):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{label},{split}")
    (folder / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    return str(folder / "labels.csv")


def prepare(train: str, seed: int = 0, **options: object) -> Splits:
    data = DataSection(format="csv", labels="multi", train=train, holdout_seed=seed, **options)  # type: ignore[arg-type]
    return prepare_splits(data, multi_label=True)


def names(splits: Splits, split: str) -> list[set[str]]:
    shown = splits.named[split].multi_hot
    assert shown is not None
    return [{splits.classes[index] for index in np.flatnonzero(row)} for row in shown]


def test_labels_are_taken_apart_and_aligned_by_name(tmp_path):
    rows = [("dog | cat", "train"), ("10|2", "train"), ("", "train"), ("cat|cat|", "train"), ("cat|10", "test")]
    splits = prepare(write_csv(tmp_path, rows))
    assert splits.classes == ["10", "2", "cat", "dog"]
    assert names(splits, "train") == [{"cat", "dog"}, {"10", "2"}, set(), {"cat"}]
    assert names(splits, "test") == [{"10", "cat"}]
    assert splits.train.targets.tolist() == [2, 0, 0, 2]
    assert describe(splits)["splits"]["train"]["per_class"] == {"10": 1, "2": 1, "cat": 2, "dog": 1}
    assert "1 image(s) of train have no class" in splits.notes
    batch = collate([SplitDataset(splits.train, lambda _: torch.zeros(3, 2, 2), 0, "fail")[i] for i in range(4)])
    assert batch["target"].dtype == torch.bool
    assert batch["target"].numpy().tolist() == splits.train.multi_hot.tolist()  # type: ignore[union-attr]


def test_the_hold_out_gives_every_class_its_share(tmp_path):
    rows = [("common|rare" if number < 5 else "common", "train") for number in range(50)]
    train = write_csv(tmp_path, rows)
    for seed in range(3):
        splits = prepare(train, seed, holdout=0.2)
        held = names(splits, "holdout")
        assert len(held) == 10
        assert sum("rare" in found for found in held) == 1
        assert sum("rare" in found for found in names(splits, "train")) == 4
        keys = set(splits.train.keys) | set(splits.named["holdout"].keys)
        assert len(keys) == 50
    shown = build_multi_hot([["a"], ["a", "b"], []], ["a", "b"])
    assert rarest_classes(shown).tolist() == [0, 1, 2]


def test_classes_unknown_to_train_are_named(tmp_path):
    with pytest.raises(
        RecipeError, match=r"data\.test has 1 class\(es\) unknown to train: 'cats' \(did you mean 'cat'"
    ):
        prepare(write_csv(tmp_path, [("cat|dog", "train"), ("cats|dog", "test")]))


def test_several_labels_where_one_is_expected_are_refused_or_noted(tmp_path, capsys):
    train = write_csv(tmp_path, [("cat|dog", "train"), ("cat", "train"), ("dog", "train")])
    single = prepare_splits(DataSection(format="csv", train=train))
    assert single.classes == ["cat", "cat|dog", "dog"]
    assert "data.labels=multi takes them apart" in single.notes[-1]
    argv = [str(REPO / "recipes/custom/linear_csv.yaml"), f"data.train={train}", "data.labels=multi", "bank.lrs=[0.1]"]
    assert linear.main(argv) == 2
    assert "this command trains on one class an image" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="labels is 'multi' with format 'folder'"):
        DataSection(labels="multi")
    empty = write_csv(tmp_path, [("", "train"), ("dog", "train")])
    with pytest.raises(RecipeError, match="row 2 has an empty label"):
        prepare_splits(DataSection(format="csv", train=empty))


def test_an_evaluation_takes_them_apart_too(tmp_path):
    found = open_evaluation_split(
        DataSection(format="csv", labels="multi", test=write_csv(tmp_path, [("b|a", "test"), ("", "test")]))
    )
    assert found.classes == ["a", "b"]
    assert found.multi_hot.tolist() == [[True, True], [False, False]]
