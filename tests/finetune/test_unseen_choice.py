"""What chooses was seen by nothing that is chosen: on random labels every score on the hold-out is chance."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import finetune.__main__
import finetune.evaluate
import probes.logistic
from finetune.interpolate import main

REPO = Path(__file__).resolve().parents[2]
CLASSES, PER_CLASS = ("a", "b", "c", "d"), 20
CHANCE = 52.5
"""Percent right of the 40 held-out images that guessing among 4 classes exceeds once in 10,000 times."""


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """Noise whose class is random: nothing can be learnt but by heart."""
    folder, generator = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for split, count in (("train", PER_CLASS), ("test", PER_CLASS // 2)):
        for label in CLASSES:
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST)
                image.save(folder / split / label / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def images(noise, tiny_model) -> list[str]:
    return [*tiny_model.overrides, f"data.train={noise / 'train'}", f"data.test={noise / 'test'}", "data.workers=0"]


@pytest.fixture(scope="module")
def train(images):
    """`train(folder, *overrides)`: a fine-tune that learns its images by heart."""

    def run(folder: Path, *more: str) -> int:
        argv = [str(REPO / "recipes" / "quickstart" / "finetune.yaml"), *images, "data.format=folder"]
        argv += ["data.holdout=0.5", "head.start=fresh", "head.kind=bn_linear", "head.pool=gap"]
        argv += ["trainer.global_batch=40", "trainer.micro_batch=40", "schedule.epochs=40", "schedule.warmup_epochs=1"]
        argv += ["optimizer.lr=1e-2", "optimizer.layer_decay=1.0"]
        argv += ["ema.decay=null", "augment.scale=1.0"]
        return finetune.__main__.main([*argv, f"run.dir={folder}", *more])

    return run


def read_table(folder: Path) -> dict[str, float]:
    rows = csv.DictReader((folder / "table.csv").read_text(encoding="utf-8").splitlines())
    return {row["name"]: float(row["holdout"]) for row in rows}


def read_result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def member(train, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("members")
    assert train(folder / "one") == 0
    last = json.loads((folder / "one" / "log.txt").read_text().splitlines()[-1])
    assert last["train_loss"] < 0.2, "learnt by heart"
    return folder / "one"


def test_members_of_other_seeds_share_a_holdout_and_soups_are_chance(member, train, tmp_path):
    assert train(tmp_path / "two", "run.seed=1") == 0
    assert main([str(member), str(tmp_path / "two"), "--output", str(tmp_path / "soup")]) == 0
    table = read_table(tmp_path / "soup")
    assert len(table) == 4
    assert max(table.values()) < CHANCE


def test_members_with_other_holdouts_are_named_and_refused(member, train, tmp_path, capsys):
    few = ["schedule.epochs=1", "schedule.warmup_epochs=0"]
    assert train(tmp_path / "other", "data.holdout_seed=1", *few) == 0
    assert main([str(member), str(tmp_path / "other"), "--output", str(tmp_path / "soup")]) == 2
    message = capsys.readouterr().err
    assert f"{member}: 40 images of holdout, data.holdout=0.5 data.holdout_seed=0" in message
    assert f"{tmp_path / 'other'}: 40 images of holdout, data.holdout=0.5 data.holdout_seed=1" in message
    assert "with the same data.train, data.holdout and data.holdout_seed" in message
    assert train(tmp_path / "none", "data.holdout=0.0", *few) == 0
    assert main([str(member), str(tmp_path / "none"), "--output", str(tmp_path / "soup")]) == 2
    assert f"{tmp_path / 'none'}: nothing" in capsys.readouterr().err
    assert not (tmp_path / "soup").exists()


def test_a_member_that_trained_on_what_chooses_is_refused(noise, member, train, tmp_path, capsys):
    """The same images as `val`: once kept out of train, once in it, and once through a CSV with other names."""
    few = ["schedule.epochs=1", "schedule.warmup_epochs=0", f"data.val={noise / 'test'}", "data.test=null"]
    assert train(tmp_path / "clean", *few) == 0
    rows = [(path, path.parent.name) for path in sorted(noise.glob("*/*/*.png"))]
    lines = ["path,label", *(f"{path.relative_to(noise)},{label}" for path, label in rows)]
    (noise / "all.csv").write_text("\n".join(lines), encoding="utf-8")
    lines = ["path,label", *(f"{label}/{path.name},{label}" for path, label in rows if path.parts[-3] == "test")]
    (noise / "test" / "val.csv").write_text("\n".join(lines), encoding="utf-8")
    files = [f"data.train={noise / 'all.csv'}", f"data.val={noise / 'test' / 'val.csv'}", "data.format=csv"]
    assert train(tmp_path / "all", *few, *files) == 0
    assert main([str(tmp_path / "clean"), str(tmp_path / "all"), "--output", str(tmp_path / "soup")]) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path / 'all'} was trained on 40 of the 40 images of val in {tmp_path / 'clean'}" in message
    assert main([str(tmp_path / "clean"), "--output", str(tmp_path / "alone")]) == 0


def test_a_run_from_before_the_key_keeps_its_holdout(train, tmp_path, capsys):
    few = ["schedule.epochs=1", "schedule.warmup_epochs=0"]
    assert train(tmp_path / "old", "run.seed=3", "data.holdout_seed=3", *few) == 0
    recipe = tmp_path / "old" / "recipe.yaml"
    lines = recipe.read_text().splitlines(keepends=True)
    recipe.write_text("".join(line for line in lines if "holdout_seed" not in line))
    assert main([str(tmp_path / "old")]) == 0


@pytest.fixture(scope="module")
def probe(images, tmp_path_factory):
    """`probe(name, *overrides)`: folder of a logistic probe of these images."""
    folder = tmp_path_factory.mktemp("probes")
    (folder / "probe.yaml").write_text("compute: {precision: fp32}\n", encoding="utf-8")

    def run(name: str, *more: str) -> Path:
        argv = [str(folder / "probe.yaml"), *images, "data.holdout=0.5", f"run.dir={folder / name}", *more]
        assert probes.logistic.main([*argv, f"features.cache={folder / 'features'}"]) == 0
        return folder / name

    return run


@pytest.fixture
def start(train, tmp_path, monkeypatch, capsys):
    """`start(head, *overrides)`: exit code, message and row of the epoch without learning from a probe."""
    monkeypatch.chdir(tmp_path)
    still = ["head.pool=cls", "head.kind=linear", "optimizer.lr=0.0", "schedule.epochs=1", "schedule.warmup_epochs=0"]

    def run(head: Path, *more: str) -> tuple[int, str, dict[str, float]]:
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        code = train(folder, *still, "head.start=probe", f"head.probe={head}", *more)
        log = (folder / "log.txt").read_text().splitlines() if code == 0 else ["{}"]
        found = capsys.readouterr()
        return code, found.err + found.out, json.loads(log[-1])

    return run


def test_a_probe_that_saw_what_chooses_is_refused(probe, start):
    code, message, row = start(probe("refitted", "logistic.low=4"))
    assert code == 2, f"the start scores {row['holdout_acc1']:.2f} on random labels that it has seen"
    assert "was fitted on 40 of the 40 images of holdout, which choose epoch and mixture here" in message
    assert "with the same data.train, data.holdout and data.holdout_seed" in message
    assert "logistic.refit=false" in message
    code, message, _ = start(probe("other", "logistic.refit=false", "data.holdout_seed=1"))
    assert code == 2
    assert "of the 40 images of holdout" in message
    code, _, row = start(probe("apart", "logistic.refit=false", "logistic.low=4"))
    assert code == 0
    assert row["holdout_acc1"] < CHANCE
    assert main(["run0", "--alphas", "0", "1", "--output", "mixed"]) == 0, "the start is no less unseen later"


def test_a_probe_that_saw_test_is_refused(noise, probe, start):
    code, message, _ = start(probe("on_test", f"data.train={noise / 'test'}"), "data.holdout=0")
    assert code == 2
    assert "was fitted on 40 of the 40 images of test, which are reported on here" in message


def test_a_head_that_does_not_say_what_it_saw(probe, start):
    head = probe("unsaid", "logistic.refit=false")
    (head / "fitted_on.npz").unlink()
    code, message, _ = start(head)
    assert code == 2
    assert "does not say on which images it was fitted" in message
    code, message, _ = start(head, "data.holdout=0")
    assert code == 0
    assert "it does not say on which images it was fitted" in message


def test_a_probe_of_other_weights_is_refused(probe, start, tiny_model, tmp_path):
    head, other = probe("weights", "logistic.refit=false", "compute.precision=bf16"), tmp_path / "other.safetensors"
    assert start(head)[0] == 0, "the hash is compared in the precision of the probe"
    state = load_file(tiny_model.weights)
    name = "visual.norm.weight"
    save_file(state | {name: state[name] * 1.01}, other)
    code, message, _ = start(head, f"model.weights={other}")
    assert code == 2
    assert "was fitted on features of an encoder with sha256" in message
    assert "name the weights of the probe" in message
    code, message, _ = start(head, "model.weights=random")
    assert code == 2
    assert "head.start is 'probe' with model.weights 'random'" in message


def test_images_that_the_weights_were_trained_on_are_noted(noise, member, probe, train, tmp_path):
    """Where a fine-tune is scored on its own images, and where its weights are another run's start."""
    assert finetune.evaluate.main([str(member), f"data.test={noise / 'train'}", f"run.dir={tmp_path / 'own'}"]) == 0
    own = read_result(tmp_path / "own")
    trained = f"{member / 'model.safetensors'} was trained on 40 of the 80 images of test"
    assert any(note.startswith(trained) for note in own["notes"])
    assert finetune.evaluate.main([str(member), f"run.dir={tmp_path / 'test'}"]) == 0
    assert not any("was trained on" in note for note in read_result(tmp_path / "test")["notes"])

    weights = member / "last_raw.safetensors"
    more = [f"model.weights={weights}", "features.pool=gap"]
    seen = probe("on_fine_tuned", *more, "data.holdout_seed=1")
    held = json.loads((seen / "data.json").read_text())["splits"]["holdout"]["count"]
    (note,) = (note for note in read_result(seen)["notes"] if "was trained on" in note)
    assert note.startswith(f"{weights} was trained on ")
    assert note.endswith(f"of the {held} images of holdout: what is measured on them is too favourable.")
    assert not any("was trained on" in note for note in read_result(probe("same_holdout", *more))["notes"])

    few = ["schedule.epochs=1", "schedule.warmup_epochs=0", "data.holdout_seed=1", f"model.weights={weights}"]
    assert train(tmp_path / "second", *few) == 0
    assert any("images of holdout" in note for note in read_result(tmp_path / "second")["notes"])
    assert main([str(tmp_path / "second")]) == 2, "what was trained on before counts as well"


def test_the_images_that_chose_are_noted(noise, train, tmp_path):
    few = ["schedule.epochs=1", "schedule.warmup_epochs=0", f"data.val={noise / 'test'}", "data.test=null"]
    assert train(tmp_path / "run", *few) == 0
    argv = [str(tmp_path / "run"), f"data.test={noise / 'test'}", f"run.dir={tmp_path / 'again'}"]
    assert finetune.evaluate.main(argv) == 0
    assert "data.test is the run's val, which chose its weights" in read_result(tmp_path / "again")["notes"][0]
