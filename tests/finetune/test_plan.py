from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from finetune.__main__ import main
from finetune.module import FinetuneModule
from finetune.plan import check_recipe, plan_finetune
from finetune.sections import FinetuneRecipe
from probes.recipe import load_recipe
from probes.sections import RecipeError

REPO = Path(__file__).resolve().parents[2]


def recipe(name: str, *overrides: str) -> FinetuneRecipe:
    return load_recipe(REPO / "recipes" / f"{name}.yaml", overrides, FinetuneRecipe)


@pytest.mark.parametrize(("pixels", "parameters"), [(224, 1_012_555_112), (336, 1_013_005_672)])
def test_published_recipes_plan_what_the_logs_show(pixels, parameters):
    plan = plan_finetune(recipe(f"imagenet1k/finetune_{pixels}"))
    with (REPO / "logs" / "reference" / f"finetune_{pixels}.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert plan["steps_per_epoch"] == 2502
    assert plan["lr_by_epoch"] == pytest.approx([float(row["train_lr"]) for row in rows], rel=1e-9)
    assert plan["min_lr_by_epoch"] == pytest.approx([float(row["train_min_lr"]) for row in rows], rel=1e-9)
    assert plan["total_parameters"] == parameters
    assert len(plan["param_groups"]) == 83
    assert plan["micro_batch"] * plan["accumulate"] * plan["devices"] == plan["global_batch"] == 512
    published = recipe(f"imagenet1k/finetune_{pixels}").expected
    assert published.best_raw_top1 == pytest.approx(max(float(row["test_acc1"]) for row in rows), abs=5e-4)
    assert published.last_ema_top1 == pytest.approx(float(rows[-1]["ema_test_acc1"]), abs=5e-4)
    assert published.best_ema_top1 == pytest.approx(max(float(row["ema_test_acc1"]) for row in rows), abs=5e-4)


def test_with_the_patch_embedding_there_is_one_group_more():
    assert len(plan_finetune(recipe("imagenet1k/finetune_224", "tune.patch_embed=true"))["param_groups"]) == 84


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [4, 12])
def test_a_run_takes_the_planned_steps(repeats, micro_batch, png_digits, tiny_model, tmp_path, monkeypatch):
    """48 images in batches of 12, each seen `repeats` times in its epoch."""
    monkeypatch.chdir(tmp_path)
    steps = []
    step = FinetuneModule.optimizer_step
    monkeypatch.setattr(FinetuneModule, "optimizer_step", lambda self, *args: (steps.append(1), step(self, *args)))
    overrides = [*tiny_model.overrides, "data.format=folder", f"data.train={png_digits.train}", "data.holdout=0.0"]
    overrides += [f"data.test={png_digits.test}", "trainer.global_batch=12", f"trainer.micro_batch={micro_batch}"]
    overrides += ["head.start=fresh", "schedule.epochs=2", f"augment.repeats={repeats}", "run.dir=run"]
    path = str(REPO / "recipes" / "quickstart" / "finetune.yaml")
    planned = plan_finetune(load_recipe(path, overrides, FinetuneRecipe))
    assert planned["accumulate"] == 12 // micro_batch
    assert main([path, *overrides]) == 0
    rows = [json.loads(line) for line in Path("run/log.txt").read_text().splitlines()]
    assert len(steps) == 2 * planned["steps_per_epoch"] == 8
    assert [row["train_lr"] for row in rows] == pytest.approx(planned["lr_by_epoch"])


def test_a_batch_of_more_images_than_there_are_is_refused_with_repeats_too():
    with pytest.raises(RecipeError, match="global_batch 512 is larger than the 300 training images"):
        check_recipe(recipe("imagenet1k/finetune_224", "augment.repeats=3", "model.weights=random"), 300)


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(RecipeError, match=r"global_batch 512 is not a multiple .* 48"):
        check_recipe(recipe("imagenet1k/finetune_224", "trainer.micro_batch=48", "model.weights=random"))


@pytest.mark.parametrize(
    ("name", "layers", "grid"), [("224_to_336", 40, 24), ("eva02_b16", 12, 14), ("eva02_l14_336", 24, 24)]
)
def test_the_other_recipes_plan(name, layers, grid):
    plan = plan_finetune(recipe(f"imagenet1k/finetune_{name}"))
    assert plan["pos_embed"]["to"] == grid
    assert plan["steps_per_epoch"] == 2502
    assert max(group["layer"] for group in plan["param_groups"]) == layers + 1
