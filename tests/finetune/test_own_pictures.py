"""Fine-tunes on pictures of one's own: few and uneven classes, two classes, and several labels an image."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, recall_score

from finetune import evaluate
from finetune.__main__ import main

REPO = Path(__file__).resolve().parents[2]
SETTINGS = [
    "model.name=EVA01-CLIP-nano", "data.workers=0",
    "regularisation.drop_path=0.0", "optimizer.lr=1e-3", "optimizer.layer_decay=0.75",
    "trainer.precision=fp32", "ema.decay=null", "augment.policy=null", "augment.scale=0.6", "augment.flip=0.0",
    "schedule.warmup_epochs=1", "trainer.micro_batch=16", "trainer.global_batch=16",
]  # fmt: skip


def digit_picture(*positions: int) -> Image.Image:
    """scikit-learn's digits side by side, each 32 pixels wide."""
    images = [(load_digits().images[position] * 15.9).astype(np.uint8) for position in positions]
    return Image.fromarray(np.hstack(images)).resize((32 * len(images), 32), Image.Resampling.BICUBIC)


def write_folders(folder: Path, counts: dict[int, int]) -> Path:
    """Class folders of digits; so many to train of each, and 6 to test."""
    target = load_digits().target
    for digit, count in counts.items():
        for number, position in enumerate(np.flatnonzero(target == digit)[: count + 6]):
            path = folder / ("train" if number < count else "test") / f"digit {digit}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            digit_picture(position).save(path)
    return folder


def run(tmp_path: Path, recipe: str, *overrides: str) -> tuple[Path, dict]:
    folder = tmp_path / "run"
    assert main([str(REPO / "recipes" / recipe), *SETTINGS, *overrides, f"run.dir={folder}"]) == 0
    return folder, json.loads((folder / "result.json").read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_uneven_classes_of_a_folder(tmp_path):
    data = write_folders(tmp_path / "data", {0: 40, 1: 12, 7: 4})
    folder, result = run(
        tmp_path, "custom/finetune_folder.yaml", f"data.train={data / 'train'}", f"data.test={data / 'test'}",
        "data.holdout=0.25", "regularisation.class_weights=auto", "schedule.epochs=10",
    )  # fmt: skip
    assert result["split_sizes"] == {"train": 42, "holdout": 14, "test": 18}
    rows = rows_of(folder / "predictions.csv")
    balanced = 100 * recall_score([r["target"] for r in rows], [r["predicted"] for r in rows], average="macro")
    assert result["measured"]["mean_recall"] == pytest.approx(balanced)
    assert balanced > 60  # chance: 33
    assert result["scores"][0]["chosen_by"] == "holdout"
    assert f"{balanced:.1f}" in (folder / "report.html").read_text(encoding="utf-8")


def test_two_classes(tmp_path):
    data = write_folders(tmp_path / "data", {0: 16, 1: 16})
    _, result = run(
        tmp_path, "custom/finetune_folder.yaml", f"data.train={data / 'train'}", f"data.test={data / 'test'}",
        "data.holdout=0", "schedule.epochs=3",
    )  # fmt: skip
    assert result["scores"][0]["top5"] == 100.0
    assert result["scores"][0]["top1"] > 75


def write_pairs(folder: Path, train: int, test: int) -> Path:
    """Pictures of two digits out of 0, 1, 4 and 7, both of them its labels; every tenth has one of another class."""
    digits, generator = load_digits().target, np.random.default_rng(0)
    usable = np.flatnonzero(np.isin(digits, [0, 1, 4, 7, 8]))
    folder.mkdir()
    lines = ["path,label,split"]
    for number in range(train + test):
        first, second = generator.choice(usable, 2)
        shown = [f"digit {digits[position]}" for position in (first, second) if digits[position] != 8]
        digit_picture(first, second).resize((32, 32)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{'|'.join(dict.fromkeys(shown))},{'train' if number < train else 'test'}")
    (folder / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "labels.csv"


def test_several_labels_an_image(tmp_path):
    labels = write_pairs(tmp_path / "data", 160, 60)
    folder, result = run(
        tmp_path, "custom/finetune_csv_multi_label.yaml", f"data.train={labels}", "data.holdout=0.2",
        "schedule.epochs=8", "regularisation.class_weights=auto", "regularisation.label_smoothing=0.05",
        "augment.mixup=0.2",
    )  # fmt: skip
    classes = ["digit 0", "digit 1", "digit 4", "digit 7"]
    assert result["classes"] == classes
    assert result["split_sizes"]["test"] == 60
    rows = rows_of(folder / "predictions.csv")
    truth = {
        row["path"]: set(filter(None, row["label"].split("|"))) for row in rows_of(labels) if row["split"] == "test"
    }
    assert {row["key"] for row in rows} == set(truth)
    shown = np.array([[name in truth[row["key"]] for name in classes] for row in rows])
    scores = np.array([[float(row[f"probability of {name}"]) for name in classes] for row in rows])
    precision = 100 * average_precision_score(shown, scores, average="macro")
    measured = result["measured"]["mean_average_precision"]
    assert measured == pytest.approx(precision, abs=0.05)  # probabilities are written with six digits
    assert result["scores"][0]["mean_average_precision"] == pytest.approx(measured, abs=0.01)
    assert result["scores"][0]["chosen_by"] == "holdout"
    assert measured > 100 * shown.mean() + 20  # chance: the share of images that show a class
    log = [json.loads(line) for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]
    best = max(log, key=lambda row: row["holdout_mean_ap"])
    assert result["scores"][0]["epoch"] == best["epoch"]
    assert "mean average precision" in (folder / "report.html").read_text(encoding="utf-8")
    assert len(rows_of(folder / "average_precision.csv")) == 4

    evaluated = tmp_path / "evaluated"
    assert evaluate.main([str(folder), f"run.dir={evaluated}"]) == 0
    again = json.loads((evaluated / "result.json").read_text(encoding="utf-8"))
    assert again["measured"]["mean_average_precision"] == pytest.approx(measured, abs=1e-3), "of the exported file"
    assert again["classes"] == classes
    assert (evaluated / "report.html").exists()
