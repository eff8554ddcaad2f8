"""Runs against published logs: the logs themselves, changed logs, and a run against its own."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from probes.linear import main
from probes.reference_curve import ReferenceCurve, read_reference

REPO = Path(__file__).resolve().parents[2]
LOGS = sorted((REPO / "logs" / "reference").glob("*_[0-9]*.csv"))


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_a_published_log_is_on_its_own_track(path):
    curve = ReferenceCurve.read(path, 0.5)
    assert len(curve.rows) == {"linear": 90, "finetune": 20}[path.stem.split("_")[0]]
    assert curve.summarise(curve.rows) == f"{len(curve.rows)} of {len(curve.rows)} epochs on track"


def test_what_is_off_is_named():
    curve = ReferenceCurve.read(LOGS[0], 0.5)
    row = dict(curve.rows[3])
    assert curve.compare(row) == "on track (+0.00 points)"
    assert curve.compare(row | {"test_acc1": row["test_acc1"] - 0.45}) == "on track (-0.45 points)"
    assert curve.compare(row | {"test_acc1": row["test_acc1"] + 0.8}) == "off by test_acc1 +0.80 points at epoch 3"
    assert "off by test_acc1 +nan" in curve.compare(row | {"test_acc1": float("nan")})
    halved = curve.compare(row | {"train_lr": row["train_lr"] / 2})
    assert halved.startswith("off by train_lr ")
    assert halved.endswith(" at epoch 3")
    assert curve.compare({"epoch": 500}) == "the published run has no epoch 500"
    assert curve.compare({"epoch": 3}) == "nothing of the published run to compare"


def test_damaged_and_absent_logs(tmp_path):
    bad = tmp_path / "bad.csv"
    bad.write_text("epoch,test_acc1\n0,1.0\n1,abc\n")
    with pytest.raises(ValueError, match=r"bad\.csv, line 3: .*'abc'"):
        ReferenceCurve.read(bad, 0.5)
    bad.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'epoch'"):
        ReferenceCurve.read(bad, 0.5)
    notes: list[str] = []
    expected = SimpleNamespace(reference_log=str(tmp_path / "absent.csv"), reference_tolerance=0.5)
    assert read_reference(expected, notes) is None
    assert "absent.csv; the epochs are not compared" in notes[0]


def test_a_run_is_compared_as_it_trains(png_digits, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [str(REPO / "recipes" / "custom" / "linear_folder.yaml"), *tiny_model.overrides]
    argv += [f"data.train={png_digits.train}", f"data.test={png_digits.test}", "data.workers=0", "schedule.epochs=2"]
    argv += ["trainer.global_batch=20", "trainer.micro_batch=10", "schedule.warmup_epochs=1"]
    assert main([*argv, "run.dir=first"]) == 0
    rows = [json.loads(line) for line in Path("first/log.txt").read_text().splitlines()]
    rows[1]["test_acc1"] += 10
    with Path("published.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    capsys.readouterr()
    assert main([*argv, "run.dir=second", "expected.reference_log=published.csv"]) == 0
    out = capsys.readouterr().out
    assert "; on track (+0.00 points)" in out
    assert "; off by test_acc1 -10.00 points at epoch 1" in out
    result = json.loads(Path("second/result.json").read_text())
    assert result["facts"]["published curve"].startswith("1 of 2 epochs on track; first off by test_acc1")
    assert "published" in Path("second/report.html").read_text()


def test_the_published_recipe_at_reduced_size(png_digits, tiny_model, tmp_path, monkeypatch, capsys):
    """Online, augmented views, LARS, BatchNorm groups and accumulation as published, on few real images."""
    monkeypatch.chdir(REPO)  # where the recipe finds its published log
    argv = [str(REPO / "recipes" / "imagenet1k" / "linear_224.yaml"), *tiny_model.overrides]
    argv += ["model.image_size=null", f"data.train={png_digits.train}", f"data.test={png_digits.test}"]
    argv += ["data.train_size=48", "data.num_classes=4", "data.workers=0", "trainer.precision=bf16"]
    argv += ["trainer.global_batch=16", "trainer.micro_batch=8", "schedule.epochs=2", "schedule.warmup_epochs=1"]
    assert main([*argv, f"run.dir={tmp_path / 'run'}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    published = (REPO / "logs" / "reference" / "linear_224.csv").read_text().splitlines()[0].split(",")
    assert [set(row) for row in rows] == [set(published)] * 2
    assert rows[0]["train_lr"] == pytest.approx(sum(step / 2 for step in range(3)) / 3), "peak 1.0 after 3 steps"
    assert "off by train_lr" in capsys.readouterr().out, "this is not the published run, and it says so"
