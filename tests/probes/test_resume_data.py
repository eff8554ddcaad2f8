"""A run goes on with the data and the recipe that it was started with; what cannot change its result may differ."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from probes.recipe import Recipe
from probes.resume import FREE_KEYS, FREE_SECTIONS, changed_keys, describe_changes
from probes.runs import RunFolder
from probes.sections import DataSection, FeaturesSection, RunSection

REPO = Path(__file__).resolve().parents[2]
LINEAR = ["data.holdout=0.25", "trainer.global_batch=12", "trainer.micro_batch=12", "schedule.epochs=6"]
LINEAR += ["schedule.warmup_epochs=1", "data.workers=0"]
TUNED = ["data.format=folder", "data.holdout=0.25", "data.workers=0", "trainer.global_batch=8", "trainer.micro_batch=4"]
TUNED += ["schedule.epochs=6", "schedule.warmup_epochs=1", "head.start=fresh"]
COMMANDS = {
    "cached": ("probes.linear", "custom/linear_folder.yaml", [*LINEAR, "features.mode=cached"]),
    "online": ("probes.linear", "custom/linear_folder.yaml", [*LINEAR, "features.mode=online"]),
    "bank": ("probes.linear", "custom/linear_folder.yaml", [*LINEAR, "features.mode=cached", "bank.lrs=[0.3,1.0]"]),
    "finetune": ("finetune.__main__", "quickstart/finetune.yaml", TUNED),
}


class Stop(Exception):
    """Ends a run in this process."""


@pytest.fixture
def stopped(write_digits, tiny_model, tmp_path, monkeypatch):
    """`stopped(command)`: a run stopped after two epochs on data that may change; how to resume it, and the data."""
    import importlib

    def stop(name: str):
        module, recipe, overrides = COMMANDS[name]
        digits = write_digits(tmp_path / "digits", 4)
        argv = [str(REPO / "recipes" / recipe), *tiny_model.overrides, f"data.train={digits.train}"]
        argv += [f"data.test={digits.test}", *overrides, f"run.dir={tmp_path / 'run'}"]
        main = importlib.import_module(module).main
        write = RunFolder.append_log

        def stopping(run, row):
            write(run, row)
            if row["epoch"] == 1:
                raise Stop

        monkeypatch.chdir(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "append_log", stopping)
            with pytest.raises(Stop):
                main(argv)
        return lambda *more: main([*argv, "run.on_existing=resume", *more]), digits

    return stop


@pytest.mark.parametrize("name", COMMANDS)
def test_changed_data_are_refused_and_restored_ones_welcome(name, stopped, tmp_path, capsys):
    resume, digits = stopped(name)
    described = (tmp_path / "run" / "data.json").read_bytes()
    added = digits.train / "one" / "new.png"
    shutil.copy(digits.train / "one" / "00.png", added)
    assert resume() == 2
    error = capsys.readouterr().err
    assert "the data are not those that the run in" in error
    assert "train had 36 images and has 37" in error
    assert "start a new run in another run.dir" in error
    added.unlink()
    for split in (digits.train, digits.test):
        (split / "zero").rename(split / "nil")
    assert resume() == 2
    assert "the classes are others, gone: 'zero'; new: 'nil' (renamed?)" in capsys.readouterr().err
    for split in (digits.train, digits.test):
        (split / "nil").rename(split / "zero")
        shutil.move(split / "one", tmp_path / f"one-{split.name}")
    assert resume() == 2
    assert "the classes are others, gone: 'one'" in capsys.readouterr().err
    for split in (digits.train, digits.test):
        shutil.move(tmp_path / f"one-{split.name}", split / "one")
    assert (tmp_path / "run" / "data.json").read_bytes() == described
    assert resume("data.workers=1") == 0, capsys.readouterr().err


def test_what_differs_is_named():
    split = {"paths": [], "count": 4, "per_class": {"cat": 2, "dog": 2}, "fingerprint": "a"}
    stored = {"classes": ["cat", "dog"], "splits": {"train": split, "test": split}}
    assert describe_changes(stored, stored) == []
    other = {**stored, "splits": {"train": {**split, "fingerprint": "b"}, "holdout": split}}
    assert describe_changes(stored, other) == [
        "train has as many images, but other names, labels, sizes or times of its files (fingerprint)",
        "there was a split test, and now there is none",
        "there was no split holdout, and now there is one",
    ]
    moved = {**split, "per_class": {"cat": 1, "dog": 3}, "fingerprint": "c"}
    assert describe_changes(stored, {**stored, "splits": {"train": moved, "test": split}}) == [
        "train has as many images, but other numbers of class 'cat', 'dog'"
    ]
    assert describe_changes(stored, {**stored, "classes": ["dog", "cat"]}) == ["the classes have another order"]


def test_a_run_that_has_trained_nothing_takes_the_data_of_now(tmp_path):
    recipe = Recipe(run=RunSection(dir=str(tmp_path / "run"), on_existing="resume"))
    RunFolder.create(recipe, "recipe.yaml").record_data({"classes": ["a"], "splits": {}})
    run = RunFolder.create(recipe, "recipe.yaml")
    run.record_data({"classes": ["b"], "splits": {}})
    assert '"b"' in (tmp_path / "run" / "data.json").read_text()


def test_seeds_are_compared_and_workers_are_not():
    cached = FeaturesSection(mode="cached")
    asked = Recipe(run=RunSection(dir="b", seeds=[3, 4]), data=DataSection(workers=9), features=cached)
    assert changed_keys(Recipe(run=RunSection(dir="a"), features=cached), asked) == ["run.seeds"]


def test_every_free_key_exists():
    from finetune.sections import FinetuneRecipe

    keys = {
        f"{section}.{key}"
        for schema in (Recipe, FinetuneRecipe)
        for section, values in dataclasses.asdict(schema()).items()
        for key in values
    }
    assert FREE_KEYS.keys() <= keys
    assert {key.split(".")[0] for key in keys} >= FREE_SECTIONS.keys()
