"""`python -m probes.linear` from recipe to report, on images the project does not ship."""

from __future__ import annotations

import csv
import json
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from eva_clip.encoder import FeatureDefinition, build_encoder
from eva_clip.export import save_model
from probes.linear import EpochLines
from probes.recipe import load_recipe

REPO = Path(__file__).resolve().parents[2]
FOLDER_RECIPE = REPO / "recipes" / "custom" / "linear_folder.yaml"
CSV_RECIPE = REPO / "recipes" / "custom" / "linear_csv.yaml"
EPOCHS = 6
SMALL = [
    "trainer.global_batch=20",
    "trainer.micro_batch=10",
    f"schedule.epochs={EPOCHS}",
    "schedule.warmup_epochs=1",
    "data.workers=0",
    "features.pool=gap",
    "optimizer.lr=1.0",
    "run.dir=run",
]
FILES = {
    "recipe.yaml",
    "environment.json",
    "data.json",
    "log.txt",
    "head.safetensors",
    "fitted_on.npz",
    "predictions.csv",
    "report.html",
    "result.json",
    "tensorboard/hparams.yaml",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.txt").read_text(encoding="utf-8").splitlines()]


def published_columns() -> list[str]:
    first = (REPO / "logs" / "reference" / "linear_224.csv").read_text(encoding="utf-8").splitlines()[0]
    return first.split(",")


@pytest.fixture
def folder_argv(png_digits, tiny_model):
    data = [f"data.train={png_digits.train}", f"data.test={png_digits.test}"]
    return [FOLDER_RECIPE, *tiny_model.overrides, *data, *SMALL]


@pytest.fixture(scope="module")
def finished(png_digits, tiny_model, run_process, tmp_path_factory):
    """A run as a process of its own: where it ran, and what it said."""
    cwd = tmp_path_factory.mktemp("folder")
    data = [f"data.train={png_digits.train}", f"data.test={png_digits.test}"]
    argv = ["-m", "probes.linear", FOLDER_RECIPE, *tiny_model.overrides, *data, *SMALL]
    return cwd, run_process(argv, cwd)


class TestFolderRun:
    """One run of the folder recipe, looked at from all sides."""

    def test_it_succeeds_and_says_where_the_report_is(self, finished):
        _, outcome = finished
        assert outcome.code == 0, outcome.err
        assert "Traceback" not in outcome.err
        assert "run folder: run" in outcome.out
        assert "report: run/report.html" in outcome.out
        assert f"epoch {EPOCHS - 1}/{EPOCHS - 1}" in outcome.out

    def test_the_run_folder_holds_exactly_these_files(self, finished):
        cwd, _ = finished
        found = set(contents(cwd / "run"))
        events = {name for name in found if name.startswith("tensorboard/events.")}
        checkpoints = {name for name in found if name.startswith("checkpoints/step-")}
        assert found - events - checkpoints == FILES
        assert len(checkpoints) == 4, "the newest two, with their sums"
        assert len(events) == 1
        assert {path.name for path in cwd.iterdir()} == {"run", "logs"}
        assert len(list((cwd / "logs" / "features").glob("*/key.json"))) == 2

    def test_the_log_has_the_published_columns_and_those_of_the_hold_out(self, finished):
        rows = read_log(finished[0] / "run")
        assert [row["epoch"] for row in rows] == list(range(EPOCHS))
        added = {"holdout_loss", "holdout_acc1", "holdout_acc5"}
        for row in rows:
            assert set(row) == {*published_columns(), *added}
        assert rows[0]["n_parameters"] == 32 * 4 + 4

    def test_the_probe_learns(self, finished):
        rows = read_log(finished[0] / "run")
        assert rows[-1]["train_loss"] < rows[0]["train_loss"] - 0.2
        assert rows[-1]["train_class_acc"] > 0.6  # chance is 0.25; the encoder is a random one

    def test_result_and_predictions_tell_one_story(self, finished, png_digits):
        run = finished[0] / "run"
        result, rows = read_json(run / "result.json"), read_log(run)
        with (run / "predictions.csv").open(encoding="utf-8") as stream:
            predictions = list(csv.DictReader(stream))
        selected, last, best = result["scores"]
        assert (selected["name"], last["name"], best["name"]) == ("selected", "last", "best")
        assert result["classes"] == png_digits.classes
        assert result["split_sizes"] == {"train": 40, "holdout": 8, "test": 20}
        assert selected["samples"] == len(predictions) == 20
        correct = sum(row["target"] == row["predicted"] for row in predictions)
        assert selected["top1"] == pytest.approx(100 * correct / 20, abs=1e-4)
        holdout = [row["holdout_acc1"] for row in rows]
        assert selected["epoch"] == holdout.index(max(holdout))
        assert (selected["split"], selected["chosen_by"]) == ("test", "holdout")
        assert selected["top1"] == rows[selected["epoch"]]["test_acc1"]
        assert (last["epoch"], last["top1"]) == (EPOCHS - 1, rows[-1]["test_acc1"])
        assert (best["top1"], best["chosen_by"]) == (max(row["test_acc1"] for row in rows), "test")

    def test_predictions_name_the_files_with_their_true_classes(self, finished, png_digits):
        with (finished[0] / "run" / "predictions.csv").open(encoding="utf-8") as stream:
            predictions = list(csv.DictReader(stream))
        assert all((png_digits.test / row["key"]).is_file() for row in predictions)
        assert all(row["key"].split("/")[0] == row["target"] for row in predictions)
        assert all(0.25 <= float(row["confidence"]) <= 1 for row in predictions)

    def test_the_saved_head_gives_the_predictions(self, finished, tiny_model, png_digits):
        """Head and metadata suffice to classify anew."""
        from PIL import Image

        from eva_clip.transforms import build_eval_transform

        run = finished[0] / "run"
        with safe_open(run / "head.safetensors", framework="pt") as stored:
            probe = json.loads(stored.metadata()["probe"])
        tensors, classes = load_file(run / "head.safetensors"), probe["classes"]
        definition = FeatureDefinition(**probe["features"])
        precision = load_recipe(run / "recipe.yaml").trainer.precision  # what "auto" was settled to on this machine
        encoder, _ = build_encoder(probe["model"], str(tiny_model.weights), definition=definition, precision=precision)
        assert probe["encoder_sha256"] == encoder.weights_sha256()
        view = build_eval_transform(probe["image_size"])
        with (run / "predictions.csv").open(encoding="utf-8") as stream:
            predictions = list(csv.DictReader(stream))
        images = torch.stack([view(Image.open(png_digits.test / row["key"])) for row in predictions])
        features = encoder(images).float()
        normalised = (features - tensors["0.running_mean"]) / (tensors["0.running_var"] + 1e-6).sqrt()
        probability = (normalised @ tensors["1.weight"].T + tensors["1.bias"]).softmax(1)
        for row, values in zip(predictions, probability, strict=True):
            index = classes.index(row["predicted"])
            assert float(row["confidence"]) == pytest.approx(values[index].item(), abs=5e-3)  # features may be bf16

    def test_the_stored_recipe_repeats_the_run(self, finished, tiny_model):
        stored = load_recipe(finished[0] / "run" / "recipe.yaml")
        assert stored.model.weights == str(tiny_model.weights)
        assert stored.schedule.epochs == EPOCHS
        assert stored.run.dir == "run"

    def test_data_and_environment_are_recorded(self, finished, png_digits):
        data = read_json(finished[0] / "run" / "data.json")
        assert data["classes"] == png_digits.classes
        assert {name: split["count"] for name, split in data["splits"].items()} == {
            "train": 40,
            "holdout": 8,
            "test": 20,
        }
        assert data["splits"]["train"]["per_class"] == dict.fromkeys(png_digits.classes, 10)
        assert "probes.linear" in read_json(finished[0] / "run" / "environment.json")["command"]

    def test_the_report_is_one_file_with_the_result_in_it(self, finished):
        page = (finished[0] / "run" / "report.html").read_text(encoding="utf-8")
        top1 = read_json(finished[0] / "run" / "result.json")["scores"][0]["top1"]
        assert f"{top1:.1f}" in page
        assert 'src="http' not in page
        assert "data:image/png;base64," in page

    def test_a_second_run_is_refused_and_changes_nothing(self, finished, png_digits, tiny_model, run_cli):
        cwd, _ = finished
        before = contents(cwd)
        data = [f"data.train={png_digits.train}", f"data.test={png_digits.test}"]
        outcome = run_cli([FOLDER_RECIPE, *tiny_model.overrides, *data, *SMALL], cwd)
        assert outcome.code == 2
        assert outcome.err.startswith("error: run.dir run already holds a finished run")
        assert "run.on_existing=overwrite" in outcome.err
        assert "Traceback" not in outcome.err
        assert contents(cwd) == before


def test_the_csv_recipe_runs_on_its_split_column(run_cli, png_digits, tiny_model, tmp_path):
    outcome = run_cli([CSV_RECIPE, *tiny_model.overrides, f"data.train={png_digits.csv}", *SMALL], tmp_path)
    assert outcome.code == 0, outcome.err
    result = read_json(tmp_path / "run" / "result.json")
    assert result["split_sizes"] == {"train": 40, "holdout": 8, "test": 20}
    with (tmp_path / "run" / "predictions.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert all(row["key"].startswith(f"test/{row['target']}/") for row in rows)


def test_cached_features_are_used_by_a_second_run(run_cli, folder_argv, tmp_path):
    assert run_cli(folder_argv, tmp_path).code == 0
    again = run_cli([*folder_argv, "run.dir=again"], tmp_path)
    assert again.code == 0, again.err
    for name in ("train", "test"):
        assert f"features of {name}" in again.out
    assert again.out.count("from the cache") == 2
    for name in ("log.txt", "head.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_online_mode_trains_on_fresh_views(run_cli, folder_argv, tmp_path):
    outcome = run_cli([*folder_argv, "features.mode=online", "schedule.epochs=3"], tmp_path)
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "logs").exists(), "nothing is cached"
    rows = read_log(tmp_path / "run")
    assert set(rows[0]) >= set(published_columns())
    assert read_json(tmp_path / "run" / "result.json")["scores"][0]["samples"] == 20
    cached = run_cli([*folder_argv, "schedule.epochs=3", "run.dir=cached"], tmp_path)
    assert cached.code == 0, cached.err
    same = read_log(tmp_path / "cached")
    assert [row["train_lr"] for row in rows] == [row["train_lr"] for row in same]
    # The hold-out is scored on the evaluation view in both modes; training is on other images.
    assert [row["train_loss"] for row in rows] != [row["train_loss"] for row in same]


class Stop(BaseException):
    """Stands for a kill: nothing in the run may catch it."""


def stop_after(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next run die in the epoch after `epoch`, before its row is written."""
    whole = EpochLines.__call__

    def killed(self: EpochLines, row: dict[str, float]) -> None:
        if row["epoch"] > epoch:
            raise Stop
        whole(self, row)

    monkeypatch.setattr(EpochLines, "__call__", killed)


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_a_resumed_run_is_the_uninterrupted_one(mode, run_cli, folder_argv, tmp_path):
    argv = [*folder_argv, f"features.mode={mode}"]
    assert run_cli(argv, tmp_path).code == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stop):
            run_cli([*argv, "run.dir=resumed"], tmp_path)
    assert len(read_log(tmp_path / "resumed")) == 3
    assert not (tmp_path / "resumed" / "result.json").exists()
    outcome = run_cli([*argv, "run.dir=resumed", "run.on_existing=resume"], tmp_path)
    assert outcome.code == 0, outcome.err
    for name in ("log.txt", "predictions.csv", "head.safetensors"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    whole, resumed = (read_json(tmp_path / name / "result.json") for name in ("run", "resumed"))
    assert resumed["scores"] == whole["scores"]


def test_a_run_killed_before_its_first_checkpoint_starts_again(run_cli, folder_argv, tmp_path):
    assert run_cli(folder_argv, tmp_path).code == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(-1, patch)
        with pytest.raises(Stop):
            run_cli([*folder_argv, "run.dir=resumed"], tmp_path)
    outcome = run_cli([*folder_argv, "run.dir=resumed", "run.on_existing=resume"], tmp_path)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "resumed" / "log.txt").read_bytes() == (tmp_path / "run" / "log.txt").read_bytes()


def test_ctrl_c_says_how_to_resume(run_cli, folder_argv, tmp_path, monkeypatch):
    def interrupt(self: EpochLines, row: dict[str, float]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EpochLines, "__call__", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    try:
        outcome = run_cli(folder_argv, tmp_path)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning switches it off
    assert outcome.code == 130
    assert "run.on_existing=resume" in outcome.err


def test_overwrite_replaces_a_run(run_cli, folder_argv, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("recipe.yaml", "environment.json", "old.txt"):
        (tmp_path / "run" / name).write_text("{}")
    outcome = run_cli([*folder_argv, "run.on_existing=overwrite", "schedule.epochs=2"], tmp_path)
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "run" / "old.txt").exists()
    assert len(read_log(tmp_path / "run")) == 2


def test_without_a_test_split_the_result_says_so(run_cli, folder_argv, tmp_path):
    outcome = run_cli([*folder_argv, "data.test=null", "schedule.epochs=2"], tmp_path)
    assert outcome.code == 0, outcome.err
    result = read_json(tmp_path / "run" / "result.json")
    assert any("no test split" in note and "optimistic" in note for note in result["notes"])
    assert "no test split" in outcome.out
    assert result["scores"][0]["split"] == "holdout"
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "There is no test split" in page


def test_without_a_selection_split_the_last_epoch_is_reported(run_cli, folder_argv, tmp_path):
    outcome = run_cli([*folder_argv, "data.holdout=0", "schedule.epochs=3"], tmp_path)
    assert outcome.code == 0, outcome.err
    result = read_json(tmp_path / "run" / "result.json")
    assert [score["name"] for score in result["scores"]] == ["last", "best"]
    assert result["scores"][0]["epoch"] == 2
    assert set(read_log(tmp_path / "run")[0]) == set(published_columns())


def test_two_classes(run_cli, write_digits, tiny_model, tmp_path):
    digits = write_digits(tmp_path / "two", 2)
    data = [f"data.train={digits.train}", f"data.test={digits.test}"]
    outcome = run_cli(
        [FOLDER_RECIPE, *tiny_model.overrides, *data, *SMALL, "head.kind=linear", "schedule.epochs=2"], tmp_path
    )
    assert outcome.code == 0, outcome.err
    score = read_json(tmp_path / "run" / "result.json")["scores"][0]
    assert score["top5"] == 100
    assert score["samples"] == 10


def test_measured_stands_beside_expected(run_cli, folder_argv, tmp_path):
    expected = ["expected.last_top1=100", "expected.best_top1=0", "expected.tolerance=0.5"]
    outcome = run_cli([*folder_argv, *expected, "schedule.epochs=2"], tmp_path)
    assert outcome.code == 0, outcome.err
    result = read_json(tmp_path / "run" / "result.json")
    verdicts = {item["name"]: item["verdict"] for item in result["expectations"]}
    assert verdicts == {"last top-1": "below", "best top-1": "above"}
    assert "last top-1 100.00, measured" in outcome.out


def test_baselines_are_scored_on_the_same_samples(run_cli, folder_argv, tmp_path):
    baselines = [f"baselines.{name}=true" for name in ("random_encoder", "raw_pixels", "zero_shot")]
    outcome = run_cli([*folder_argv, *baselines, "schedule.epochs=2"], tmp_path)
    assert outcome.code == 0, outcome.err
    result = read_json(tmp_path / "run" / "result.json")
    found = {item["name"]: item["top1"] for item in result["baselines"]}
    assert set(found) == {"same probe, random encoder", "raw pixels", "zero-shot"}
    assert all(top1 == pytest.approx(5 * round(top1 / 5), abs=1e-4) for top1 in found.values()), "of 20 samples"
    assert found["raw pixels"] > 70  # digits are easy for pixels; chance is 25


def test_weights_without_a_text_tower_leave_the_zero_shot_baseline_out(run_cli, png_digits, tmp_path):
    encoder, _ = build_encoder("nano", "pretrained")
    weights = save_model(encoder, tmp_path / "vision.safetensors")
    data = [f"data.train={png_digits.train}", f"data.test={png_digits.test}", f"model.weights={weights}"]
    baselines = ["baselines.zero_shot=true", "baselines.raw_pixels=true", "schedule.epochs=2"]
    outcome = run_cli([FOLDER_RECIPE, "model.name=nano", *data, *SMALL, *baselines], tmp_path)
    assert outcome.code == 0, outcome.err
    result = read_json(tmp_path / "run" / "result.json")
    assert [item["name"] for item in result["baselines"]] == ["raw pixels"]
    (note,) = [note for note in result["notes"] if "zero-shot" in note]
    assert "vision.safetensors holds a vision encoder alone and no text tower" in note
    assert note in outcome.out


def test_corrupt_images_are_skipped_counted_and_named(run_cli, write_digits, tiny_model, tmp_path):
    digits = write_digits(tmp_path / "damaged", 3)
    for broken in (digits.train / "one" / "02.png", digits.test / "two" / "13.png"):
        broken.write_bytes(broken.read_bytes()[:40])
    data = [f"data.train={digits.train}", f"data.test={digits.test}", "data.on_corrupt=skip"]
    outcomes = {}
    for mode in ("cached", "online"):
        run = [f"run.dir={mode}", f"features.mode={mode}", "schedule.epochs=2", "data.holdout=0"]
        argv = [FOLDER_RECIPE, *tiny_model.overrides, *data, *SMALL, *run, "baselines.raw_pixels=true"]
        outcomes[mode] = run_cli(argv, tmp_path)
        assert outcomes[mode].code == 0, outcomes[mode].err
        result = read_json(tmp_path / mode / "result.json")
        assert result["scores"][0]["samples"] == 14
        assert sum("1 unreadable image(s)" in note for note in result["notes"]) >= 1
        assert any("two/13.png" in note for note in result["notes"])
        with (tmp_path / mode / "predictions.csv").open(encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        assert Counter(row["target"] for row in rows) == {"zero": 5, "one": 5, "two": 4}
    assert "one/02.png" in outcomes["cached"].out


def test_skipped_images_shorten_the_schedule_with_the_data(run_cli, write_digits, tiny_model, tmp_path):
    """48 images of which one is unreadable make one step of 24 an epoch: the cosine must still reach its end."""
    digits = write_digits(tmp_path / "damaged", 4)
    broken = digits.train / "one" / "02.png"
    broken.write_bytes(broken.read_bytes()[:40])
    data = [f"data.train={digits.train}", f"data.test={digits.test}", "data.on_corrupt=skip", "data.holdout=0"]
    size = ["trainer.global_batch=24", "trainer.micro_batch=12"]
    outcome = run_cli([FOLDER_RECIPE, *tiny_model.overrides, *data, *SMALL, *size], tmp_path)
    assert outcome.code == 0, outcome.err
    assert read_log(tmp_path / "run")[-1]["train_lr"] < 0.3, "of a peak of 1.0"
