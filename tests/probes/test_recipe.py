"""Recipes: all mistakes at once, near misses named, types kept as written."""

from __future__ import annotations

from pathlib import Path

import pytest

from probes.recipe import Recipe, RecipeError, dump_recipe, load_recipe
from probes.sections import TrainerSection


@pytest.fixture
def write(tmp_path):
    def write_recipe(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def mistakes(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_an_empty_file_is_all_defaults(write):
    assert load_recipe(write("")) == Recipe()
    assert load_recipe(write("# nothing\n")) == Recipe()


def test_values_and_overrides_are_merged(write):
    path = write("optimizer: {name: sgd, lr: 0.1}\ndata: {train: a}\n")
    recipe = load_recipe(path, ["optimizer.lr=5e-2", "data.test=b", "features.l2norm=true", "data.val=null"])
    assert (recipe.optimizer.name, recipe.optimizer.lr) == ("sgd", 0.05)
    assert (recipe.data.train, recipe.data.val, recipe.data.test) == ("a", None, "b")
    assert recipe.features.l2norm is True


def test_what_comes_out_is_plain(write):
    recipe = load_recipe(write("data: {train: a}\nschedule: {warmup_epochs: 3}\noptimizer: {lr: 1}"))
    assert type(recipe) is Recipe
    assert type(recipe.data.train) is str
    assert type(recipe.optimizer.lr) is float
    assert type(recipe.schedule.warmup_epochs) is float


def test_interpolations_are_resolved(write):
    path = write("trainer: {global_batch: 64, micro_batch: '${trainer.global_batch}'}")
    assert load_recipe(path).trainer.micro_batch == 64


def test_all_mistakes_are_named_at_once(write):
    path = write(
        "modle: {name: x}\n"
        "optimizer: {lr: fast, momentun: 0.9}\n"
        "data: {holdout: 2.0, format: zip}\n"
        "schedule: {epochs: 5, warmup_epochs: 6}\n"
        "trainer: {global_batch: 10, micro_batch: 3}\n"
        "features: {pool: gap, projected: true}\n"
        "head: linear\n"
    )
    message = mistakes(path, "run.seed=-1")
    for part in (
        "10 mistake(s)",
        "unknown section 'modle'; did you mean model?",
        "optimizer.lr is 'fast' (str); expected a number",
        "unknown key optimizer.momentun; did you mean optimizer.momentum?",
        "data.holdout is 2.0; expected at most 0.9",
        "data.format is 'zip'; expected one of folder, csv, tar",
        "schedule.warmup_epochs is 6.0; expected at most epochs (5)",
        "trainer.global_batch 10 is not a multiple of micro_batch 3",
        "features.projected is true with pool 'gap'",
        "head is 'linear'; expected a section with kind",
        "run.seed is -1; expected at least 0",
    ):
        assert part in message
    assert message.startswith(str(path))
    assert len(message.splitlines()) == 11


def test_a_key_of_another_section_is_found(write):
    assert "did you mean optimizer.lr?" in mistakes(write("optimiser: {}\nhead: {lr: 1.0}\n"))
    assert "unknown key head.seed; did you mean run.seed?" in mistakes(write("head: {seed: 1}"))


def test_a_key_like_no_other_lists_the_known_ones(write):
    assert "unknown key head.zzzzzz; known: kind" in mistakes(write("head: {zzzzzz: 1}"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schedule: {epochs: '7'}", "schedule.epochs is '7' (str); expected a whole number"),
        ("schedule: {epochs: true}", "schedule.epochs is True (bool); expected a whole number"),
        ("schedule: {epochs: 7.0}", "schedule.epochs is 7.0 (float); expected a whole number"),
        ("schedule: {epochs: null}", "schedule.epochs is None (NoneType); expected a whole number"),
        ("optimizer: {lr: false}", "optimizer.lr is False (bool); expected a number"),
        ("features: {l2norm: 1}", "features.l2norm is 1 (int); expected true or false"),
        ("features: {l2norm: 'yes'}", "features.l2norm is 'yes' (str); expected true or false"),
        ("data: {train: 7}", "data.train is 7 (int); expected text or null"),
        ("data: {train: [a, b]}", "data.train is ['a', 'b'] (list); expected text or null"),
        ("optimizer: {lr: .nan}", "optimizer.lr is nan"),
        ("optimizer: {lr: .inf}", "optimizer.lr is inf"),
    ],
)
def test_types_are_not_converted(write, text, said):
    assert said in mistakes(write(text))


def test_a_null_section_is_its_defaults(write):
    assert load_recipe(write("model:\ndata: null\n")) == Recipe()


def test_missing_recipe_suggests_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "custom").mkdir(parents=True)
    (tmp_path / "recipes" / "custom" / "linear_csv.yaml").touch()
    message = mistakes(Path("recipes/custom/linear_cvs.yaml"))
    assert message == "no recipe at recipes/custom/linear_cvs.yaml; did you mean recipes/custom/linear_csv.yaml?"
    assert "no recipe at" in mistakes(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["data: {train: a, train: b}", "data:\n  train: a\ndata:\n  train: b", "data: {train: [}", "- a\n- b", "7"],
    ids=["duplicate key", "duplicate section", "no YAML", "list", "number"],
)
def test_a_file_that_is_no_recipe_is_named(write, text):
    path = write(text)
    with pytest.raises((RecipeError, OSError)) as caught:
        load_recipe(path)
    assert str(caught.value)


def test_a_duplicate_key_is_named(write):
    assert "train" in mistakes(write("data: {train: a, train: b}"))


def test_a_number_as_section_is_a_mistake(write):
    assert "unknown section 7" in mistakes(write("7: {lr: 1}"))


def test_a_binary_file_is_no_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\x89PNG\r\n\xff\xfe\x00")
    assert "cannot be read" in mistakes(path)


def test_an_unknown_interpolation_is_a_mistake(write):
    assert "nowhere" in mistakes(write("data: {train: '${nowhere.at.all}'}"))


@pytest.mark.parametrize("override", ["optimizer.lr", "=3", "optimizer.lr 3"])
def test_a_malformed_override_is_named(write, override):
    message = mistakes(write(""), override)
    assert repr(override) in message
    assert "key=value" in message


def test_an_override_is_checked_like_the_file(write):
    assert "did you mean optimizer.lr?" in mistakes(write(""), "optimizer.lrr=3")
    assert "optimizer is 3" in mistakes(write(""), "optimizer=3")


def test_dump_and_load_give_the_same_recipe(write):
    overrides = ["optimizer.lr=1e-05", "data.train=a, b", "run.dir=logs/x", "expected.last_top1=86.384"]
    recipe = load_recipe(write(""), overrides)
    text = dump_recipe(recipe)
    assert load_recipe(write(text)) == recipe
    assert "on_existing: error" in text


def test_accumulation_is_derived():
    assert TrainerSection(global_batch=16000, micro_batch=400, devices=8).accumulate == 5
