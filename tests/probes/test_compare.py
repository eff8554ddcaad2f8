"""Finished runs side by side."""

from __future__ import annotations

from pathlib import Path

import probes.knn
import probes.ridge
from probes.compare import main


def test_runs_are_ranked_and_other_images_are_noticed(png_digits, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("data: {holdout: 0.25, workers: 0}\ncompute: {precision: fp32}\n")
    argv = ["recipe.yaml", *tiny_model.overrides, f"data.train={png_digits.train}", f"data.test={png_digits.test}"]
    assert probes.knn.main([*argv, "run.dir=knn"]) == 0
    assert probes.ridge.main([*argv, "run.dir=ridge", "run.seeds=[0,1]"]) == 0
    capsys.readouterr()
    assert main(["knn", "ridge"]) == 0
    out = capsys.readouterr().out
    header, _, first, second = out.splitlines()
    assert header == "| run | method | chosen | top-1 | 95 % interval | mean recall | over seeds |"
    scores = [float(line.split("|")[4]) for line in (first, second)]
    assert scores == sorted(scores, reverse=True)
    assert "(2)" in next(line for line in (first, second) if "probes.ridge" in line)

    assert probes.ridge.main([*argv[:-1], f"data.test={png_digits.train}", "run.dir=other"]) == 0
    capsys.readouterr()
    assert main(["knn", "other"]) == 0
    assert "scored on different images" in capsys.readouterr().out


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no finished run; expected result.json" in capsys.readouterr().err
