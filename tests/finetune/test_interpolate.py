"""Mixtures of weights against the weights themselves, and what a command with one or several runs writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import timm
import torch

import finetune.__main__
from finetune.finished_run import FinishedRun
from finetune.interpolate import average, main, mix

REPO = Path(__file__).resolve().parents[2]


def test_a_mixture_is_a_weighted_mean():
    start, end = (
        {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(1)},
        {"w": torch.tensor([1.0, 4.0]), "n": torch.tensor(3)},
    )
    assert mix(start, end, 0.25)["w"].tolist() == [0.25, 2.5]
    assert mix(start, end, 0.25)["n"] == 3
    assert torch.equal(mix(start, end, 0.0)["w"], start["w"])
    assert torch.equal(mix(start, end, 1.0)["w"], end["w"])
    assert average([start, end])["w"].tolist() == [0.5, 3.0]


@pytest.fixture(scope="module")
def runs(png_digits, tiny_model, tmp_path_factory):
    """Two fine-tunes that start from a probe fitted first."""
    base = tmp_path_factory.mktemp("runs")
    recipe = REPO / "recipes" / "quickstart" / "finetune.yaml"
    argv = [str(recipe), *tiny_model.overrides, "data.format=folder", f"data.train={png_digits.train}"]
    argv += [f"data.test={png_digits.test}", "data.holdout=0.25", "data.workers=0", "trainer.global_batch=9"]
    argv += ["trainer.micro_batch=9", "schedule.epochs=3", "schedule.warmup_epochs=1", "head.start=linear_probe"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)  # the feature store goes under it
        for name, rate in (("one", 1e-3), ("two", 3e-3)):
            assert finetune.__main__.main([*argv, f"optimizer.lr={rate}", f"run.dir={name}"]) == 0
    return base


def read_table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_the_ends_of_the_curve_are_the_run(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    assert main(["one", "--weights", "raw", "--alphas", "0", "0.5", "1"]) == 0
    rows = read_table(Path("one/interpolate/table.csv"))
    assert [float(row["alpha"]) for row in rows] == [0.0, 0.5, 1.0]
    log = json.loads(Path("one/log.txt").read_text().splitlines()[-1])
    assert float(rows[-1]["test"]) == pytest.approx(log["test_acc1"])
    assert float(rows[-1]["holdout"]) == pytest.approx(log["holdout_acc1"])
    result = json.loads(Path("one/interpolate/result.json").read_text())
    best = max(float(row["holdout"]) for row in rows)
    assert result["chosen"]["holdout"] == pytest.approx(best)
    assert "chosen by holdout" in capsys.readouterr().out
    run = FinishedRun(Path("one"))
    expected = run.build()
    expected.load_state_dict(mix(run.start_state(), run.end_state("raw"), result["chosen"]["alpha"]))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    opened = timm.create_model(f"local-dir:{runs / 'one/interpolate'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(images), expected(images), atol=1e-5, rtol=0)
    assert "<svg" in Path("one/interpolate/curve.svg").read_text()
    assert main(["one"]) == 2, "nothing is overwritten"
    assert "holds files already" in capsys.readouterr().err


def test_the_start_is_the_probe(runs, monkeypatch):
    monkeypatch.chdir(runs)
    run = FinishedRun(Path("one"))
    start, end = run.start_state(), run.end_state("raw")
    assert start.keys() == end.keys()
    assert torch.equal(start["head.weight"], FinishedRun(Path("two")).start_state()["head.weight"])
    assert not torch.equal(start["head.weight"], end["head.weight"])


def test_soups_average_the_ends(runs, monkeypatch):
    monkeypatch.chdir(runs)
    assert main(["one", "two", "--weights", "raw", "--output", "soup"]) == 0
    rows = {row["name"]: row for row in read_table(Path("soup/table.csv"))}
    assert set(rows) == {"one", "two", "uniform soup", "greedy soup"}
    run = FinishedRun(Path("one"))
    model = run.build()
    ends = [FinishedRun(Path(name)).end_state("raw") for name in ("one", "two")]
    model.load_state_dict({name: (tensor + ends[1][name]) / 2 for name, tensor in ends[0].items()})
    assert run.score(model, run.splits.test)["acc1"] == pytest.approx(float(rows["uniform soup"]["test"]))
    best_single = max(float(rows[name]["holdout"]) for name in ("one", "two"))
    assert float(rows["greedy soup"]["holdout"]) >= best_single


def test_runs_that_do_not_belong_together(runs, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(runs)
    assert main([str(tmp_path)]) == 2
    assert "holds no finished fine-tune" in capsys.readouterr().err
