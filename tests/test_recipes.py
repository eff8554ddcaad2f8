"""Every recipe loads; the published ones plan exactly what the published logs show."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from probes.linear import plan
from probes.recipe import dump_recipe, load_recipe
from probes.sources import split_paths

REPO = Path(__file__).resolve().parents[1]
RECIPES = sorted((REPO / "recipes").rglob("*.yaml"))
LINEAR = [path for path in RECIPES if path.stem.startswith("linear")]
PUBLISHED = {
    "linear_224": {"peak": 1.0, "total": 1_012_555_112, "size": 224, "grid": 16},
    "linear_336": {"peak": 0.6, "total": 1_013_005_672, "size": 336, "grid": 24},
}


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def published_log(name: str) -> list[dict[str, float]]:
    with (REPO / "logs" / "reference" / f"{name}.csv").open(encoding="utf-8") as stream:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]


def independent_rate(step: int, peak: float, warmup: int, total: int) -> float:
    """The published rule, step by step."""
    if step < warmup:
        return peak * step / (warmup - 1)
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@pytest.mark.parametrize("path", LINEAR, ids=name_of)
def test_recipe_loads_and_dumps(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_opens_with_its_command_and_its_cost(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert len(header) >= 3
    assert any(line.startswith("#   python -m ") and name_of(path) in line for line in header)
    assert any("Cost:" in line for line in header)
    assert len(lines) <= 60, "a recipe says what, in about 40 lines"


@pytest.mark.parametrize("path", [p for p in LINEAR if p.parent.name == "quickstart"], ids=name_of)
def test_quickstart_data_are_in_the_checkout(path):
    data = load_recipe(path).data
    named = [part for paths in (data.train, data.val, data.test) if paths for part in split_paths(paths, data.format)]
    assert named
    assert all((REPO / part).is_file() for part in named)


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))  # no images here: a plan follows the recipe's own figures
        return {name: plan(load_recipe(REPO / "recipes" / "imagenet1k" / f"{name}.yaml")) for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
class TestPublished:
    @pytest.fixture
    def planned(self, name, plans):
        return plans[name]

    def test_plan_has_the_published_layout(self, name, planned):
        assert planned["global_batch"] == 16_000
        assert planned["micro_batch"] * planned["accumulate"] * planned["devices"] == 16_000
        assert planned["micro_batch"] == 400
        assert planned["steps_per_epoch"] == 80
        assert planned["epochs"] == 90
        assert planned["trainable_parameters"] == 1_409_000
        assert planned["total_parameters"] == PUBLISHED[name]["total"]
        assert planned["feature_dim"] == 1408
        assert planned["image_size"] == PUBLISHED[name]["size"]
        assert planned["pos_embed"] == {"from": 16, "to": PUBLISHED[name]["grid"], "mode": "eva"}

    def test_rates_follow_the_rule(self, name, planned):
        peak = PUBLISHED[name]["peak"]
        for epoch, (rate, lowest) in enumerate(zip(planned["lr_by_epoch"], planned["min_lr_by_epoch"], strict=True)):
            steps = range(80 * epoch, 80 * (epoch + 1))
            expected = math.fsum(independent_rate(step, peak, 800, 7200) for step in steps) / 80
            assert rate == pytest.approx(expected, rel=1e-9, abs=0)
            assert lowest == rate

    def test_rates_are_the_published_ones(self, name, planned):
        rows = published_log(name)
        assert [row["epoch"] for row in rows] == list(range(90))
        for row in rows:
            epoch = int(row["epoch"])
            assert planned["lr_by_epoch"][epoch] == pytest.approx(row["train_lr"], rel=1e-9, abs=0)
            assert planned["min_lr_by_epoch"][epoch] == pytest.approx(row["train_min_lr"], rel=1e-9, abs=0)

    def test_expected_scores_are_those_of_the_log(self, name):
        rows = published_log(name)
        expected = load_recipe(REPO / "recipes" / "imagenet1k" / f"{name}.yaml").expected
        last, best = max(rows, key=lambda row: row["epoch"]), max(rows, key=lambda row: row["test_acc1"])
        assert expected.last_top1 == pytest.approx(last["test_acc1"], abs=5e-4)
        assert expected.best_top1 == pytest.approx(best["test_acc1"], abs=5e-4)
        for row in (last, best):
            assert f"epoch {int(row['epoch'])}" in str(expected.source)
        assert rows[0]["n_parameters"] == 1_409_000


@pytest.mark.parametrize("name", ["finetune_224", "finetune_336"])
def test_published_fine_tune_curves_are_whole(name):
    rows = published_log(name)
    assert [row["epoch"] for row in rows] == list(range(20))
    total = PUBLISHED[f"linear_{name[-3:]}"]["total"]
    assert {row["n_parameters"] for row in rows} == {total}


def test_plan_reads_no_image_and_makes_no_folder(run_cli, write_digits, tiny_model, tmp_path):
    digits = write_digits(tmp_path / "digits", 3)
    for path in digits.train.rglob("*.png"):
        path.write_bytes(b"no image")
    recipe = REPO / "recipes" / "custom" / "linear_folder.yaml"
    (tmp_path / "cwd").mkdir()
    batch = ["trainer.global_batch=8", "trainer.micro_batch=4"]
    argv = [recipe, "--plan", *tiny_model.overrides, f"data.train={digits.train}", *batch]
    outcome = run_cli(argv, tmp_path / "cwd")
    assert (outcome.code, outcome.err) == (0, "")
    assert '"steps_per_epoch": 3' in outcome.out  # 36 less a hold-out of 2 in 12 of each class, by batches of 8
    assert not any((tmp_path / "cwd").iterdir())
