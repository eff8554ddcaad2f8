"""The zero-shot recipes against the published figures, and the suite end to end on present, absent and broken sets."""

from __future__ import annotations

import csv
import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.flop_counter import FlopCounterMode

from eva_clip import build_model
from eva_clip.flops import vision_gflop
from eva_clip.specs import get_model_spec
from probes import suite, zeroshot
from probes.prompts import resolve_prompts
from probes.recipe import load_recipe
from probes.retrieval_sections import RetrievalRecipe
from probes.splits import open_evaluation_split
from probes.suite_tables import format_table
from probes.zeroshot_sections import ZeroShotRecipe

REPO = Path(__file__).resolve().parents[2]
ZEROSHOT = REPO / "recipes/zeroshot"
NO_FIGURES = {"voc2007_multilabel"}
SLIPS = {("caltech101", "OpenCLIP-ViT-H-14", "top5"), ("cifar100", "EVA01-CLIP-g-14", "top5")}
"""Published figures that the recipes leave out, and say so: each all but equals the top-1 beside it."""
MODELS = ("OpenAI-CLIP-ViT-L-14", "OpenCLIP-ViT-H-14", "OpenCLIP-ViT-g-14", "EVA01-CLIP-g-14")
DIGITS_PER_CLASS = 2


def published(kind):
    """(recipe, model, metric) -> percent, from the reference figures."""
    with (REPO / f"logs/reference/zeroshot_{kind}.csv").open(encoding="utf-8") as stream:
        return {
            (row["recipe"], row["model"], metric): float(value)
            for row in csv.DictReader(stream)
            for metric, value in row.items()
            if metric not in ("recipe", "model") and value
        }


def write_mnist(root, count=10 * DIGITS_PER_CLASS):
    """torchvision's raw MNIST test files, of scikit-learn's digits."""
    digits = load_digits()
    chosen = np.concatenate([np.flatnonzero(digits.target == c)[: count // 10] for c in range(10)])
    pixels = np.stack(
        [np.asarray(Image.fromarray((digits.images[i] * 15.9).astype(np.uint8)).resize((28, 28))) for i in chosen]
    )
    raw = root / "mnist/MNIST/raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        images = struct.pack(">IIII", 0x803, len(pixels), 28, 28) + pixels.tobytes()
        labels = struct.pack(">II", 0x801, len(pixels)) + digits.target[chosen].astype(np.uint8).tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels)


@pytest.fixture
def run_suite(tmp_path, tiny_model, monkeypatch, capsys):
    """`run_suite(*overrides)` of a small suite: MNIST, Birdsnap and Flickr30k below tmp_path/data."""
    monkeypatch.chdir(tmp_path)
    listed = [ZEROSHOT / f"classification/{name}.yaml" for name in ("mnist", "birdsnap")]
    recipe = tmp_path / "suite.yaml"
    recipe.write_text(
        f"suite:\n  zeroshot: {json.dumps([str(path) for path in listed])}\n"
        f"  retrieval: {json.dumps([str(ZEROSHOT / 'retrieval/flickr30k.yaml')])}\n"
        f"  models: [{tiny_model.name}]\n  weights: {{{tiny_model.name}: {tiny_model.weights}}}\n"
        f"run: {{dir: {tmp_path / 'run'}}}\ncompute: {{precision: fp32, workers: 0}}\n"
    )

    def run(*overrides):
        code = suite.main([str(recipe), *overrides])
        captured = capsys.readouterr()
        file = tmp_path / "run/suite.json"
        rows = json.loads(file.read_text()) if file.is_file() else []
        return code, captured, {row["recipe"]: row for row in rows}

    return run


# The recipes


@pytest.mark.parametrize("kind", ["classification", "video", "retrieval"])
def test_recipes_hold_every_published_figure_and_no_other(kind):
    schema = RetrievalRecipe if kind == "retrieval" else ZeroShotRecipe
    held = {
        (path.stem, model, metric): value
        for path in (ZEROSHOT / kind).glob("*.yaml")
        for model, figures in load_recipe(path, schema=schema).expected.figures.items()
        for metric, value in figures.items()
    }
    rows = published(kind)
    wanted = {key: value for key, value in rows.items() if key[1] != "FLIP-L" and key not in SLIPS}
    assert held == wanted
    assert {model for _, model, _ in held} == set(MODELS)
    assert {path.stem for path in (ZEROSHOT / kind).glob("*.yaml")} - NO_FIGURES == {name for name, *_ in rows}


def test_the_published_benchmarks_number_35_with_retrieval_counted_both_ways():
    counts = {kind: len({name for name, *_ in published(kind)}) for kind in ("classification", "video", "retrieval")}
    assert counts == {"classification": 27, "video": 4, "retrieval": 2}


def test_the_means_of_the_published_videos_are_of_their_own_figures():
    rows = published("video")
    for name, model, metric in rows:
        if metric == "mean_top1_top5":
            mean = (rows[name, model, "top1"] + rows[name, model, "top5"]) / 2
            assert rows[name, model, metric] == pytest.approx(mean, abs=0.011)


def test_the_slips_are_what_the_recipes_say():
    rows = published("classification")
    for name, model, _ in SLIPS:
        assert rows[name, model, "top5"] - rows[name, model, "top1"] < 0.1
        assert "evidently a slip" in re.sub(r"\n# ", " ", (ZEROSHOT / f"classification/{name}.yaml").read_text())


@pytest.mark.parametrize("path", sorted(ZEROSHOT.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_the_stated_cost_is_images_times_534_gflop(path):
    header = path.read_text(encoding="utf-8")
    count, pflop = re.search(r"Cost: ([\d,]+) forward passes x 534 GFLOP = ([\d.]+) PFLOP", header).groups()
    assert f"{count} " in header.splitlines()[0]
    assert float(pflop) == pytest.approx(int(count.replace(",", "")) * 534e9 / 1e15, abs=0.051)


def test_ucf_names_are_as_many_as_its_classes_and_sorted_as_its_folders():
    names = (ZEROSHOT / "video/ucf101_names.txt").read_text(encoding="utf-8").splitlines()
    folders = [name.replace(" ", "") for name in names]
    assert len(set(names)) == 101
    assert folders == sorted(folders)


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_the_robust_sets_are_named_by_their_own_classes(name, tmp_path):
    from timm.data.imagenet_info import ImageNetInfo

    labels = ImageNetInfo("imagenet-1k").label_names()
    recipe = load_recipe(ZEROSHOT / f"classification/{name}.yaml", [f"data.root={tmp_path}"], schema=ZeroShotRecipe)
    from clip_benchmark.datasets import builder

    source = Path(builder.__file__).read_text(encoding="utf-8")
    listed = re.search(rf"{name}_wnids = [\[{{](.*?)[\]}}]", source).group(1)
    chosen = sorted(re.findall(r"n\d{8}", listed))
    for label in chosen:
        (tmp_path / recipe.data.test / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / recipe.data.test / label / "1.png")
    prompts = resolve_prompts(recipe.prompts, open_evaluation_split(recipe.data))
    published_names = json.loads((Path(builder.__file__).parent / "en_classnames.json").read_text(encoding="utf-8"))[
        "imagenet1k"
    ]
    assert prompts.names == [published_names[labels.index(label)] for label in chosen]
    assert (len(prompts.names), len(prompts.templates)) == (200, 80)


# The suite


def test_with_no_data_everything_is_absent_beside_its_published_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(REPO)
    arguments = [str(ZEROSHOT / "suite.yaml"), f"suite.root={tmp_path / 'none'}"]
    assert suite.main([*arguments, f"run.dir={tmp_path / 'run'}"]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "run/suite.json").read_text(encoding="utf-8"))
    assert {row["state"] for row in rows} == {"absent"}
    assert len(rows) == 34
    for figure in ("78.53", "65.23", "72.64", "62.34"):  # one of each table of the published README
        assert f"absent ({figure})" in shown
    assert "(76.65)" in shown  # the other systems, published alone
    assert shown.count("\n| OpenCLIP-ViT-H-14 ") == 2
    assert not (tmp_path / "none").exists()
    assert suite.main([*arguments, "--plan"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (len(planned["absent"]), planned["present"], planned["images"]) == (34, {}, 0)
    assert round(planned["models"]["EVA01-CLIP-g-14"]["gflop_per_image"]) == 534


def test_a_present_set_is_scored_as_by_its_own_command_and_kept_on_resuming(run_suite, tmp_path, tiny_model):
    write_mnist(tmp_path / "data")
    code, captured, rows = run_suite()
    assert code == 0
    assert {name: row["state"] for name, row in rows.items()} == {
        "mnist": "measured",
        "birdsnap": "absent",
        "flickr30k": "absent",
    }
    alone = [str(ZEROSHOT / "classification/mnist.yaml"), *tiny_model.overrides, f"run.dir={tmp_path / 'alone'}"]
    assert zeroshot.main([*alone, "compute.precision=fp32", "data.workers=0"]) == 0
    score = json.loads((tmp_path / "alone/result.json").read_text())["scores"][0]
    assert score["samples"] == 10 * DIGITS_PER_CLASS
    assert rows["mnist"]["measured"]["top1"] == pytest.approx(score["top1"])
    assert rows["mnist"]["measured"]["top5"] == pytest.approx(score["top5"])
    assert f"{score['top1']:.2f}" in captured.out
    assert (tmp_path / "run/suite.md").read_text() in captured.out

    result = tmp_path / "run" / tiny_model.name / "mnist/result.json"
    before = result.stat().st_mtime_ns
    code, _, again = run_suite("run.on_existing=resume")
    assert (code, again["mnist"]["kept"], result.stat().st_mtime_ns) == (0, True, before)
    assert again["mnist"]["measured"] == rows["mnist"]["measured"]
    result.unlink()  # as if it had been cut short
    code, _, again = run_suite("run.on_existing=resume")
    assert (code, again["mnist"]["kept"]) == (0, False)
    assert again["mnist"]["measured"] == rows["mnist"]["measured"]
    code, captured, _ = run_suite("run.on_existing=resume", "compute.precision=bf16")
    assert code == 2
    assert "other values of compute.precision" in captured.err


def test_a_broken_set_fails_and_the_others_go_on(run_suite, tmp_path):
    write_mnist(tmp_path / "data")
    for species in ("wren", "robin"):
        (tmp_path / "data/birdsnap/test" / species).mkdir(parents=True)
        (tmp_path / "data/birdsnap/test" / species / "1.jpg").write_bytes(b"no picture")
    code, captured, rows = run_suite()
    assert code == 2
    assert (rows["birdsnap"]["state"], rows["mnist"]["state"]) == ("failed", "measured")
    assert "1.jpg" in rows["birdsnap"]["message"]
    assert "1 of 3 evaluations failed" in captured.err
    assert "| failed" in (tmp_path / "run/suite.md").read_text().replace("  ", "")
    shutil.rmtree(tmp_path / "data/birdsnap")
    assert run_suite("run.on_existing=resume")[0] == 0


def test_mistakes_are_named_before_any_work(run_suite, tmp_path, tiny_model):
    weights = tmp_path / "none.pt"
    write_mnist(tmp_path / "data")
    code, _, rows = run_suite(f"suite.weights={{{tiny_model.name}: {weights}}}")
    assert (code, rows["mnist"]["state"]) == (2, "failed")
    shutil.rmtree(tmp_path / "run")
    code, captured, _ = run_suite(f"suite.models=[{tiny_model.name},EVA01-CLIP-h-14]")
    assert (code, (tmp_path / "run").exists()) == (2, False)
    assert "EVA01-CLIP-h-14" in captured.err
    code, captured, _ = run_suite("suite.zeroshot=[nowhere.yaml]")
    assert (code, "nowhere.yaml" in captured.err) == (2, True)
    code, captured, _ = run_suite(f"suite.zeroshot=[{ZEROSHOT}/video/ucf101.yaml,{ZEROSHOT}/video/ucf101.yaml]")
    assert (code, "several recipes are called ucf101" in captured.err) == (2, True)


def test_the_quickstart_suite_reaches_its_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(REPO)
    assert suite.main([str(REPO / "recipes/quickstart/suite.yaml"), f"run.dir={tmp_path / 'run'}"]) == 0
    rows = json.loads((tmp_path / "run/suite.json").read_text(encoding="utf-8"))
    assert [row["state"] for row in rows] == ["measured"] * len(rows)
    for row in rows:
        for metric, figure in row["published"].items():
            assert row["measured"][metric] == pytest.approx(figure, abs=0.5)
    assert re.search(r"(\d+) of \1 figures are within", capsys.readouterr().out)


def test_the_cost_of_a_tower_is_what_torch_counts():
    model, _ = build_model("EVA01-CLIP-nano", "random")
    spec = get_model_spec("EVA01-CLIP-nano")
    import torch

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_image(torch.zeros(1, 3, spec.vision.image_size, spec.vision.image_size))
    assert vision_gflop(spec.vision) == pytest.approx(counter.get_total_flops() / 1e9, rel=0.02)


def test_tables_are_aligned():
    lines = format_table(["set", "top-1"], [["cifar10", "98.31 (98.30)"], ["x", "absent"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].endswith("-:|")


def test_several_processes_are_refused(run_suite, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, captured, _ = run_suite()
    assert (code, (tmp_path / "run").exists()) == (2, False)
    assert "the suite is one process" in captured.err
