"""Every mistake of the user's: exit code 2, one clear message that names thing and remedy, nothing overwritten."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
RECIPES = {kind: REPO / "recipes" / "custom" / f"linear_{kind}.yaml" for kind in ("folder", "csv")}
SMALL = ["trainer.global_batch=10", "trainer.micro_batch=5", "schedule.epochs=2", "schedule.warmup_epochs=1"]
SMALL += ["data.workers=0", "run.dir=run"]


@pytest.fixture
def digits(write_digits, tmp_path):
    """Images that a test may damage."""
    return write_digits(tmp_path / "digits", 3)


@pytest.fixture
def fail(run_cli, tiny_model, tmp_path):
    """Runs the command in an empty folder, expects it to fail as a user's mistake should, and gives the message."""

    def run(*argv: object, recipe: Path = RECIPES["folder"], leaves: bool = False, model: bool = True) -> str:
        cwd = tmp_path / "cwd"
        cwd.mkdir(exist_ok=True)
        overrides = tiny_model.overrides if model else []
        outcome = run_cli([recipe, *overrides, *SMALL, *argv], cwd)
        assert outcome.code == 2
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("error: ") == 1
        assert "Traceback" not in outcome.err
        if not leaves:
            assert not any(cwd.iterdir()), "found before any work: nothing may be left behind"
            assert outcome.out == ""
        return outcome.err

    return run


def expect(message: str, *parts: object) -> None:
    missing = [str(part) for part in parts if str(part) not in message]
    assert not missing, f"{missing} not in: {message}"


# The recipe


def test_missing_recipe(fail):
    expect(fail(recipe=Path("recipes/none.yaml"), model=False), "no recipe at recipes/none.yaml")


def test_misspelt_key_and_wrong_type_at_once(fail, digits):
    message = fail(f"data.train={digits.train}", "optimizer.momentun=0.9", "schedule.epochs=many")
    expect(message, "2 mistake(s)", "did you mean optimizer.momentum?", "schedule.epochs is 'many'", "whole number")


def test_unknown_section(fail):
    expect(fail("optimizr.lr=1"), "unknown section 'optimizr'", "did you mean optimizer?")


def test_override_without_a_value(fail):
    expect(fail("epochs"), "'epochs'", "key=value")


# The model


def test_unknown_model(fail, digits):
    message = fail(f"data.train={digits.train}", "model.name=EVA01-CLIP-g-15", model=False)
    expect(message, "EVA01-CLIP-g-15", "did you mean", "Known models")


def test_missing_weights(fail, digits):
    message = fail(f"data.train={digits.train}", "model.weights=none.safetensors")
    expect(message, "model.weights", "none.safetensors", "pretrained, random, or a checkpoint file")


def test_missing_model_configuration(fail, digits):
    message = fail(f"data.train={digits.train}", "model.config=none.json", model=False)
    expect(message, "none.json")


def test_weights_that_cannot_be_fetched(fail, digits, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as on a machine without a network
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(digits.csv.parent / "hub"))
    argv = (f"data.train={digits.train}", "model.name=EVA01-CLIP-g-14", "model.weights=pretrained")
    expect(fail(*argv, model=False, leaves=True), "eva_clip_psz14.pt", "HF_HUB_OFFLINE")


def test_resolution_that_patches_do_not_divide(fail, digits):
    expect(fail(f"data.train={digits.train}", "model.image_size=30"), "30", "patch_size 8", "24 and 32")


def test_half_precision_without_a_gpu(fail, digits):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    expect(fail(f"data.train={digits.train}", "trainer.precision=fp16"), "no GPU", "trainer.precision=auto")


def test_weights_of_another_model(fail, digits, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"visual.cls_token": torch.zeros(1, 1, 32), "mystery": torch.zeros(1)}, tmp_path / "w.safetensors")
    message = fail(f"data.train={digits.train}", f"model.weights={tmp_path / 'w.safetensors'}", leaves=True)
    expect(message, "w.safetensors", "does not fit", "missing", "mystery")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_weights_that_are_no_weights(fail, digits, tmp_path, name):
    (tmp_path / name).write_text("no weights")
    message = fail(f"data.train={digits.train}", f"model.weights={tmp_path / name}", leaves=True)
    expect(message, name)


# The data


def test_no_training_images_named(fail):
    expect(fail("data.train=null"), "data.train is null")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_missing_data_path(fail, digits, split):
    named = {"train": digits.train, "val": digits.test, "test": digits.test}
    named[split] = named[split].with_name(named[split].name + "s")
    expect(
        fail(*(f"data.{name}={path}" for name, path in named.items())),
        f"data.{split}: nothing at {named[split]}",
        "did you mean",
    )


def test_empty_class_folder(fail, digits):
    (digits.train / "seven").mkdir()
    expect(fail(f"data.train={digits.train}"), "without images", digits.train / "seven", "add images or remove")


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_unknown_to_train(fail, digits, split):
    (digits.test / "one").rename(digits.test / "ones")
    message = fail(f"data.train={digits.train}", f"data.{split}={digits.test}")
    expect(message, f"data.{split}", "'ones' (did you mean 'one'?)", "unknown to train", "rename")


def test_one_class(fail, write_digits, tmp_path):
    message = fail(f"data.train={write_digits(tmp_path / 'one', 1).train}")
    expect(message, "one class (zero)", "needs two")


def test_batch_larger_than_the_data(fail, digits):
    message = fail(f"data.train={digits.train}", "trainer.global_batch=500")
    expect(message, "trainer.global_batch 500", "30 training images", "trainer.micro_batch")


def test_nothing_to_score_on(fail, digits):
    expect(fail(f"data.train={digits.train}", "data.holdout=0"), "nothing to score on", "data.holdout=0.2")


@pytest.mark.parametrize("mode", ["cached", "online"])
@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image(fail, digits, mode, workers):
    broken = digits.train / "one" / "02.png"
    broken.write_bytes(broken.read_bytes()[:60])
    message = fail(
        f"data.train={digits.train}", f"features.mode={mode}", f"data.workers={workers}", "data.holdout=0",
        f"data.test={digits.test}", leaves=True,
    )  # fmt: skip
    expect(message, "unreadable image in train", broken, "data.on_corrupt=skip")
    assert len(message.splitlines()) == 1


def test_only_corrupt_images(fail, digits):
    for path in digits.test.rglob("*.png"):
        path.write_bytes(b"no image")
    argv = (f"data.train={digits.train}", f"data.test={digits.test}", "data.on_corrupt=skip")
    expect(fail(*argv, leaves=True), "no image of test could be read")


# CSV


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("image,label\na.png,one\n", ["no column path", "found image, label", "path,label[,split]"]),
        ("path,class\na.png,one\n", ["no column label"]),
        ("path,label\nnone.png,one\n", ["1 missing file(s)", "row 2", "none.png"]),
        ("path,label,split\ntrain/one/00.png,one,trian\n", ["row 2", "'trian'", "train, val or test"]),
        ("path,label\ntrain/one/00.png,\n", ["row 2 has an empty label"]),
        ("", ["no column path or label", "found nothing"]),
    ],
    ids=["no path", "no label", "missing file", "wrong split", "empty label", "empty file"],
)
def test_csv_mistakes(fail, digits, content, parts):
    path = digits.csv.with_name("mine.csv")
    path.write_text(content, encoding="utf-8")
    expect(fail(f"data.train={path}", recipe=RECIPES["csv"]), "mine.csv", *parts)


# Shards


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "C:\\evil.png"])
def test_tar_member_that_climbs_out(fail, digits, tmp_path, name):
    image = (digits.train / "one" / "00.png").read_bytes()
    write_tar(tmp_path / "shard.tar", {"a.png": image, "a.cls": b"one", name: image})
    before = sorted(tmp_path.rglob("*"))
    message = fail(f"data.train={tmp_path / 'shard.tar'}", "data.format=tar")
    expect(message, "shard.tar", "climbs out", "do not trust")
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "cwd"] == before


def test_truncated_shard(fail, digits, tmp_path):
    image = (digits.train / "one" / "00.png").read_bytes()
    write_tar(tmp_path / "shard.tar", {"a.png": image, "a.cls": b"one"})
    (tmp_path / "shard.tar").write_bytes((tmp_path / "shard.tar").read_bytes()[:700])
    expect(fail(f"data.train={tmp_path / 'shard.tar'}", "data.format=tar"), "shard.tar", "truncated")


# The output


def test_output_folder_with_a_run_in_it(fail, digits, tmp_path):
    run = tmp_path / "cwd" / "run"
    run.mkdir(parents=True)
    for name in ("recipe.yaml", "environment.json", "result.json"):
        (run / name).write_text("precious")
    message = fail(f"data.train={digits.train}", leaves=True)
    expect(message, "run.dir run already holds a finished run", "another run.dir", "run.on_existing=overwrite")
    assert {path.name: path.read_text() for path in run.iterdir()} == dict.fromkeys(
        ("recipe.yaml", "environment.json", "result.json"), "precious"
    )
    assert [path.name for path in run.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("on_existing", ["error", "resume", "overwrite"])
def test_output_folder_with_something_else_in_it(fail, digits, tmp_path, on_existing):
    run = tmp_path / "cwd" / "run"
    run.mkdir(parents=True)
    (run / "thesis.txt").write_text("precious")
    message = fail(f"data.train={digits.train}", f"run.on_existing={on_existing}", leaves=True)
    expect(message, "no run", "choose an empty or new folder")
    assert (run / "thesis.txt").read_text() == "precious"


# The command itself


def test_the_process_ends_with_the_same_code_and_no_traceback(run_process, tmp_path):
    outcome = run_process(["-m", "probes.linear", RECIPES["folder"], "optimizer.lrr=1"], tmp_path)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert outcome.err.splitlines()[-1].endswith("did you mean optimizer.lr?")
    assert outcome.out == ""
    assert not any(tmp_path.iterdir())


def test_a_tracebacks_can_be_asked_for(run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("EVA_CLIP_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"no recipe at none\.yaml"):
        run_cli(["none.yaml"], tmp_path)


def test_no_arguments_show_the_usage(run_cli, tmp_path):
    outcome = run_cli([], tmp_path)
    assert outcome.code == 2
    assert "usage: python -m probes.linear" in outcome.err


def test_help_names_what_can_be_given(run_cli, tmp_path):
    outcome = run_cli(["--help"], tmp_path)
    assert outcome.code == 0
    expect(outcome.out, "recipes/quickstart/linear.yaml", "key=value", "--plan")


@pytest.mark.parametrize("argument", ["optimizer.lrr=1", "data.train=none"])
def test_plan_refuses_the_same_mistakes(run_cli, tmp_path, argument):
    outcome = run_cli([RECIPES["folder"], "--plan", "model.weights=random", argument], tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
