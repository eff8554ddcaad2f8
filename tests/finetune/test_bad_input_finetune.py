"""Mistakes in a fine-tune end with exit code 2 and a message that names what was found, expected and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eva_clip import build_classifier
from eva_clip.export import save_for_timm
from finetune.__main__ import main

REPO = Path(__file__).resolve().parents[2]
RECIPE = str(REPO / "recipes" / "custom" / "finetune_folder.yaml")


@pytest.fixture
def fail(png_digits, tmp_path, monkeypatch, capsys):
    """`fail(*overrides)`: what a run on four classes says on its way out with code 2."""

    def run(*overrides: str) -> str:
        monkeypatch.chdir(tmp_path)
        common = ["data.workers=0", "trainer.global_batch=8", "trainer.precision=fp32", "schedule.epochs=2"]
        argv = [RECIPE, f"data.train={png_digits.train}", "model.name=EVA01-CLIP-nano", *common, *overrides]
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error.splitlines()[-1]

    return run


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory) -> Path:
    """A fine-tuned file with a head of three classes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("three")
    save_for_timm(build_classifier("EVA01-CLIP-nano", 3, pool="cls", checkpoint="pretrained"), folder)
    return folder / "model.safetensors"


def test_a_checkpoint_whose_head_has_other_classes(fail, three_classes):
    message = fail(f"model.weights={three_classes}", "head.start=checkpoint")
    assert "has a head of 3 classes; expected one of 4 classes" in message
    assert "use head.start=fresh" in message


def test_a_checkpoint_without_a_head(fail):
    assert "pretrained has no head; expected one of 4 classes; use head.start=fresh" in fail("head.start=checkpoint")


def test_class_folders_without_images(fail, write_digits, tmp_path):
    data = write_digits(tmp_path / "data", 3)
    (data.train / "empty").mkdir()
    message = fail(f"data.train={data.train}")
    assert f"1 class folder(s) without images: {data.train / 'empty'}; add images or remove the folder" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["tune.what=lora", "tune.lora_targets=[]"], r"tune.lora_targets [] match no layer of EVA01-CLIP-nano; it has"),
        (["tune.what=lora", "tune.lora_targets=[attn.q]"], "it has such as ['blocks.0.attn.qkv'"),
        (["tune.what=last_blocks", "tune.blocks=99"], "tune.blocks is 99; EVA01-CLIP-nano has 6"),
    ],
)
def test_nothing_to_train(fail, overrides, expected):
    assert expected in fail(*overrides)


def test_an_encoder_is_not_frozen_by_no_blocks(fail):
    assert "tune.blocks is 0; expected at least 1" in fail("tune.what=last_blocks", "tune.blocks=0")


def test_a_resolution_that_patches_do_not_divide(fail):
    message = fail("model.image_size=50")
    assert "image_size 50 is not a multiple of patch_size 8; the nearest multiples are 48 and 56" in message


def test_more_images_in_a_step_than_there_are(fail):
    assert "trainer.global_batch 512 is larger than the 40 training images" in fail("trainer.global_batch=512")


@pytest.mark.parametrize(
    "overrides",
    [
        ("tune.what=lora", "tune.lora_targets=[nothing]"),
        ("tune.what=last_blocks", "tune.blocks=99"),
        ("head.start=checkpoint",),
        ("head.start=probe", "head.probe=absent", "head.pool=cls"),
    ],
)
def test_mistakes_in_what_is_trained_leave_no_run_folder(fail, tmp_path, overrides):
    fail(*overrides, f"run.dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()
