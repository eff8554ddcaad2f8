"""Run folders: created first, never overwritten unasked, resumed only by the same recipe."""

from __future__ import annotations

import json

import pytest

from probes.recipe import Recipe, RecipeError, load_recipe
from probes.runs import RunFolder
from probes.sections import DataSection, OptimizerSection, RunSection


def recipe_for(folder, on_existing: str = "error", **sections) -> Recipe:
    return Recipe(run=RunSection(dir=str(folder), on_existing=on_existing), **sections)


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_folder_holds_recipe_and_environment(tmp_path):
    recipe = recipe_for(tmp_path / "a" / "run")
    run = RunFolder.create(recipe, "recipe.yaml")
    assert set(contents(run.path)) == {"recipe.yaml", "environment.json"}
    assert load_recipe(run.path / "recipe.yaml") == recipe
    environment = json.loads((run.path / "environment.json").read_text())
    assert {"command", "started", "python", "platform", "processors", "commit", "torch"} <= environment.keys()
    assert not run.resumed


def test_an_empty_folder_may_be_used(tmp_path):
    assert RunFolder.create(recipe_for(tmp_path), "recipe.yaml").path == tmp_path


def test_a_run_is_not_overwritten_unasked(tmp_path):
    RunFolder.create(recipe_for(tmp_path), "recipe.yaml")
    before = contents(tmp_path)
    with pytest.raises(RecipeError, match="already holds a run that never finished an epoch") as caught:
        RunFolder.create(recipe_for(tmp_path), "recipe.yaml")
    for remedy in ("run.dir", "run.on_existing=resume to start it again", "run.on_existing=overwrite"):
        assert remedy in str(caught.value)
    assert contents(tmp_path) == before


def test_the_refusal_says_how_far_the_run_came(tmp_path):
    run = RunFolder.create(recipe_for(tmp_path), "recipe.yaml")
    run.append_log({"epoch": 0})
    run.append_log({"epoch": 1})
    with pytest.raises(RecipeError, match=r"stopped after 2 epoch\(s\).*to start it again"):
        RunFolder.create(recipe_for(tmp_path), "recipe.yaml")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000002.ckpt").write_text("")
    with pytest.raises(RecipeError, match=r"stopped after 2 epoch\(s\).*run.on_existing=resume to continue it"):
        RunFolder.create(recipe_for(tmp_path), "recipe.yaml")
    run.write_json("result.json", {})
    with pytest.raises(RecipeError, match="already holds a finished run") as caught:
        RunFolder.create(recipe_for(tmp_path), "recipe.yaml")
    assert "resume" not in str(caught.value)


def test_overwrite_removes_the_old_run(tmp_path):
    RunFolder.create(recipe_for(tmp_path), "recipe.yaml").write_text("log.txt", "old\n")
    run = RunFolder.create(recipe_for(tmp_path, "overwrite"), "recipe.yaml")
    assert set(contents(tmp_path)) == {"recipe.yaml", "environment.json"}
    assert not run.resumed


@pytest.mark.parametrize("on_existing", ["error", "resume", "overwrite"])
def test_a_folder_of_something_else_is_never_touched(tmp_path, on_existing):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="no run"):
        RunFolder.create(recipe_for(tmp_path, on_existing), "recipe.yaml")
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("left", [{}, {"data.json": "{}", "tensorboard/hparams.yaml": "{}"}])
def test_a_run_that_failed_before_its_first_epoch_is_resumed_from_its_beginning(tmp_path, left):
    RunFolder.create(recipe_for(tmp_path), "recipe.yaml")
    for name, text in left.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    assert RunFolder.create(recipe_for(tmp_path, "resume"), "recipe.yaml").path == tmp_path
    assert contents(tmp_path) == before


def test_a_recipe_beside_pictures_is_no_run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {train: .}")
    (tmp_path / "cat.png").write_text("x")
    with pytest.raises(RecipeError, match="no run"):
        RunFolder.create(recipe_for(tmp_path, "overwrite"), "recipe.yaml")
    assert (tmp_path / "cat.png").exists()


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RecipeError, match="is a file"):
        RunFolder.create(recipe_for(tmp_path / "run", "overwrite"), "recipe.yaml")
    assert (tmp_path / "run").read_text() == "x"


def test_resume_reopens_without_touching(tmp_path):
    RunFolder.create(recipe_for(tmp_path), "recipe.yaml").append_log({"epoch": 0})
    before = contents(tmp_path)
    assert RunFolder.create(recipe_for(tmp_path, "resume"), "recipe.yaml").resumed
    assert contents(tmp_path) == before


def test_resume_of_nothing_starts_a_run(tmp_path):
    assert not RunFolder.create(recipe_for(tmp_path / "new", "resume"), "recipe.yaml").resumed


def test_resume_with_another_recipe_names_the_keys(tmp_path):
    RunFolder.create(recipe_for(tmp_path), "recipe.yaml")
    other = recipe_for(tmp_path, "resume", optimizer=OptimizerSection(lr=0.5), data=DataSection(train="elsewhere"))
    other.run.seed = 7
    with pytest.raises(RecipeError) as caught:
        RunFolder.create(other, "recipe.yaml")
    assert "other values of data.train, optimizer.lr, run.seed; it never finished an epoch" in str(caught.value)
    RunFolder(tmp_path).append_log({"epoch": 0})
    with pytest.raises(RecipeError, match=r"run\.seed$"):
        RunFolder.create(other, "recipe.yaml")


def test_resume_may_differ_in_expectations(tmp_path):
    RunFolder.create(recipe_for(tmp_path), "recipe.yaml")
    other = recipe_for(tmp_path, "resume")
    other.expected.last_top1 = 90.0
    assert RunFolder.create(other, "recipe.yaml").resumed


def test_a_finished_run_is_not_resumed(tmp_path):
    RunFolder.create(recipe_for(tmp_path), "recipe.yaml").write_json("result.json", {})
    with pytest.raises(RecipeError, match="finished"):
        RunFolder.create(recipe_for(tmp_path, "resume"), "recipe.yaml")


def test_a_run_whose_recipe_is_damaged_is_not_resumed(tmp_path):
    RunFolder.create(recipe_for(tmp_path), "recipe.yaml").write_text("recipe.yaml", "run: [")
    with pytest.raises(RecipeError, match=r"recipe\.yaml .* cannot be read"):
        RunFolder.create(recipe_for(tmp_path, "resume"), "recipe.yaml")


def test_fresh_folders_are_named_after_the_recipe_and_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = RunFolder.create(Recipe(), "recipes/custom/linear_csv.yaml")
    second = RunFolder.create(Recipe(), "recipes/custom/linear_csv.yaml")
    assert first.path != second.path
    for run in (first, second):
        assert run.path.parent.name == "logs"
        assert run.path.name.startswith("custom-linear_csv-")


def test_log_is_one_json_object_an_epoch(tmp_path):
    run = RunFolder(tmp_path)
    rows = [{"train_loss": 0.1 + epoch, "epoch": epoch} for epoch in range(3)]
    for row in rows:
        run.append_log(row)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert run.read_log() == rows


def test_a_repeated_epoch_is_kept_as_it_was(tmp_path):
    run = RunFolder(tmp_path)
    run.append_log({"epoch": 0, "loss": 1.0})
    run.append_log({"epoch": 0, "loss": 9.0})
    assert run.read_log() == [{"epoch": 0, "loss": 1.0}]


def test_a_line_cut_short_by_a_kill_is_left_out_and_its_epoch_written_anew(tmp_path):
    run = RunFolder(tmp_path)
    run.append_log({"epoch": 0, "loss": 1.0})
    with (tmp_path / "log.txt").open("a") as stream:
        stream.write('{"epoch": 1, "lo')
    assert run.read_log() == [{"epoch": 0, "loss": 1.0}]
    run.append_log({"epoch": 1, "loss": 2.0})
    assert run.read_log() == [{"epoch": 0, "loss": 1.0}, {"epoch": 1, "loss": 2.0}]


def test_the_log_of_a_new_run_is_empty(tmp_path):
    assert RunFolder(tmp_path).read_log() == []


def test_files_are_written_whole_or_not_at_all(tmp_path):
    run = RunFolder(tmp_path)
    run.write_json("result.json", {"a": 1})
    with pytest.raises(TypeError):
        run.write_json("result.json", {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        run.write_text("result.json", "\ud800")
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 1}
