"""Scores that are not finite are refused wherever they would become predictions, and no epoch is chosen by them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import finetune.__main__
import finetune.evaluate
import probes.zeroshot
from eva_clip import build_classifier
from finetune.finish import scored_epochs
from finetune.finished_run import FinishedRun
from finetune.module import FinetuneModule
from finetune.sections import FinetuneRecipe
from probes.bank import BankHead, HeadBank
from probes.bank_fit import FeatureSplit, evaluate_bank
from probes.draws import Repetition
from probes.feature_run import LinearScorer, fit_once
from probes.finite import best_row, check_finite
from probes.heads import build_head
from probes.metrics import SplitMeter
from probes.module import LinearProbe
from probes.multi_label_meter import MultiLabelMeter
from probes.multi_label_probe import collect_precisions
from probes.multi_label_run import score_settings
from probes.ranking import recall_at_k
from probes.recipe import load_recipe
from probes.scoring import collect_scores, label_scores, predict
from probes.sections import DataSection, OptimizerSection
from probes.splits import Splits, prepare_splits
from probes.zeroshot import score_logits

REPO = Path(__file__).resolve().parents[2]
BROKEN = [math.nan, math.inf, -math.inf]


@pytest.fixture
def splits(png_digits) -> Splits:
    return prepare_splits(DataSection(train=str(png_digits.train), test=str(png_digits.test), holdout=0.25))


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("way", [predict, score_logits, label_scores])
def test_scores_that_are_not_finite_are_no_predictions(way, value, splits):
    test = splits.test
    test.multi_hot = np.eye(4, dtype=bool)[test.targets]
    index = torch.arange(2, 20)
    logits = torch.randn(18, 4)
    way(logits, index, test)
    logits[[3, 7], 1] = value
    with pytest.raises(
        ValueError, match=r"^2 of 18 rows of scores of test are not finite, the first of (\S+); "
    ) as error:
        way(logits, index, test)
    assert test.keys[5] in str(error.value)
    assert "compute.precision=fp32" in str(error.value)
    assert "lower optimizer.lr" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_scores_are_scores(dtype):
    rows = torch.full((3, 8), torch.finfo(dtype).max, dtype=dtype)  # whose sum is none
    check_finite(rows, "rows")
    check_finite(rows[:0], "rows")
    rows[1, 7] = math.nan
    with pytest.raises(ValueError, match="1 of 3 rows are not finite, the first of number 1"):
        check_finite(rows, "rows")


def test_retrieval_refuses_in_the_same_words():
    queries, gallery = torch.eye(3), torch.eye(3)
    queries[2, 0] = math.nan
    owner = torch.arange(3)
    with pytest.raises(ValueError, match=r"1 of 3 embedding\(s\) of the queries are not finite, the first of number 2"):
        recall_at_k(queries, owner, gallery, owner)


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("several", [False, True])
def test_a_meter_with_a_broken_sample_measures_nothing(several, value):
    """With NaN taken as a class, these would be 100 % right."""
    meter = MultiLabelMeter(3) if several else SplitMeter(3)
    targets = torch.zeros(4, dtype=torch.int64)
    shown = torch.nn.functional.one_hot(targets, 3).bool() if several else targets
    right = torch.tensor([[9.0, -9.0, -9.0]]).repeat(4, 1)
    broken = right.clone()
    broken[1, 0] = value
    meter.update(right, shown)
    meter.update(broken, shown)
    assert all(math.isnan(found) for found in meter.compute_and_reset().values())
    meter.update(right, shown)
    found = meter.compute_and_reset()
    assert found["mean_ap" if several else "acc1"] == 100
    assert found["loss"] < 1e-3


class BreaksAnEpoch(Callback):
    """The head's bias is NaN during the validation of epoch 0."""

    def __init__(self, bias: torch.nn.Parameter) -> None:
        self.bias, self.kept = bias, bias.detach().clone()

    def on_validation_start(self, trainer, module):
        self.kept = self.bias.detach().clone()
        if module.current_epoch == 0:
            self.bias.data.fill_(math.nan)

    def on_validation_end(self, trainer, module):
        self.bias.data.copy_(self.kept)


def fit(module: pl.LightningModule, bias: torch.nn.Parameter, batches: list[dict], splits: int) -> None:
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        callbacks=[BreaksAnEpoch(bias)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(module, loader, [DataLoader(batches, batch_size=None) for _ in range(splits)])


@pytest.mark.parametrize("several", [False, True])
def test_a_probes_diverged_epoch_is_neither_chosen_nor_the_best(several):
    torch.manual_seed(0)
    targets = torch.arange(8) % 2
    shown = torch.nn.functional.one_hot(targets, 2).bool() if several else targets
    batch = {"features": torch.randn(8, 4), "target": shown, "index": torch.arange(8), "skipped": []}
    module = LinearProbe(
        build_head("linear", 4, 2),
        optimizer=OptimizerSection(name="sgd", lr=0.1),
        schedule=np.full(3, 0.1),
        num_classes=2,
        evaluation_names=["holdout", "test"],
        multi_label=several,
    )
    fit(module, module.head[0].bias, [batch], 2)
    assert math.isnan(module.history[0]["holdout_mean_ap" if several else "holdout_acc1"])
    assert math.isnan(module.history[0]["holdout_loss"])
    assert module.selected["epoch"] in (1, 2)
    scores = {score.name: score for score in (collect_precisions if several else collect_scores)(module, 8, "test")}
    assert scores["best"].epoch in (1, 2)
    assert math.isfinite(scores["best"].mean_average_precision if several else scores["best"].top1)


def test_a_fine_tunes_diverged_epoch_is_neither_chosen_nor_the_best():
    torch.manual_seed(0)
    changes = ["ema.decay=null", "schedule.epochs=3", "trainer.precision=fp32", "optimizer.lr=1e-4"]
    recipe = load_recipe(REPO / "recipes" / "quickstart" / "finetune.yaml", changes, FinetuneRecipe)
    model = build_classifier("EVA01-CLIP-nano", 3, pool="gap", checkpoint="pretrained", drop_path_rate=0.0)
    module = FinetuneModule(model, recipe, np.ones(3), ["holdout", "test"])
    images = torch.randn(4, 3, 64, 64)
    batch = {"image": images, "target": torch.tensor([0, 1, 2, 0]), "index": torch.arange(4), "skipped": []}
    fit(module, model.head.bias, [batch], 2)
    assert [math.isnan(row["holdout_acc1"]) for row in module.history] == [True, False, False]
    assert module.selected["epoch"] in (1, 2)
    best = next(row for name, _, row, _ in scored_epochs(module, "test", "acc1") if name == "best_raw")
    assert best["epoch"] in (1, 2)


def test_a_skipped_step_has_no_part_in_the_training_scores():
    changes = ["ema.decay=null", "schedule.epochs=3", "trainer.precision=fp32", "trainer.non_finite=skip"]
    recipe = load_recipe(REPO / "recipes" / "quickstart" / "finetune.yaml", changes, FinetuneRecipe)
    model = build_classifier("EVA01-CLIP-nano", 3, pool="gap", checkpoint="pretrained", drop_path_rate=0.0)
    module = FinetuneModule(model, recipe, np.full(6, 1e-3), ["holdout"])
    good = {"image": torch.randn(4, 3, 64, 64), "target": torch.arange(4) % 3, "index": torch.arange(4), "skipped": []}
    bad = {**good, "image": torch.full((4, 3, 64, 64), math.nan)}
    fit(module, torch.nn.Parameter(torch.zeros(1)), [good], 1)
    alone = SplitMeter(3)
    with torch.no_grad():
        alone.update(module(good["image"]), good["target"])
        module._meter("train").update(module(good["image"]), good["target"])
        assert module.training_step(bad, 0).isnan()
    assert module._meter("train").compute_and_reset() == pytest.approx(alone.compute_and_reset())


def test_the_best_row_is_never_one_without_a_figure():
    rows = [{"a": math.nan}, {"a": 1.0}, {"a": 3.0}, {"a": math.nan}, {"a": 3.0}]
    assert best_row(rows, "a") is rows[2]


def test_a_head_of_a_bank_without_a_finite_score_has_no_accuracy():
    bank = HeadBank([BankHead("f", 0.1), BankHead("f", 0.2)], {"f": 3}, 2, optimizer="sgd")
    features = torch.tensor([[1.0, 0, 0], [3e38, 3e38, 3e38]])
    rows = evaluate_bank(bank, FeatureSplit({"f": features * 3}, torch.tensor([0, 1]), "test"))
    assert all(math.isnan(value) for row in rows for value in row.values())


class Overflows:
    """A method whose second setting gives infinite weights."""

    name, setting, fixed, refit = "made up", "C", 1.0, True

    def path(self, train):
        yield from ((value, self.fit(train, value)) for value in (1.0, 2.0))

    def fit(self, train, value):
        weight = torch.full((4, train.features.shape[1]), math.inf if value == 2 else 1.0)
        return LinearScorer(weight, torch.zeros(4))


def test_a_setting_that_overflows_is_named_and_not_chosen(splits, png_digits, tiny_model, tmp_path):
    from probes.extraction import load_tables
    from probes.method_sections import MethodRecipe
    from probes.multi_label_run import samples_of

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {workers: 0}\ncompute: {precision: fp32}\n")
    changes = [*tiny_model.overrides, f"features.cache={tmp_path / 'cache'}"]
    tables = load_tables(load_recipe(recipe, changes, MethodRecipe), splits)
    held = splits.selection
    with pytest.raises(
        ValueError, match=f"12 of 12 rows of scores of holdout are not finite, the first of {held.keys[0]}"
    ):
        fit_once(Overflows(), Repetition(0, 0, splits, splits.test), tables)
    for split in splits.named.values():
        split.multi_hot = np.eye(4, dtype=bool)[split.targets]
    train, samples = samples_of(tables, splits.train), samples_of(tables, held)
    with pytest.raises(ValueError, match="12 of 12 rows of scores of holdout are not finite"):
        score_settings(Overflows(), train, samples, held, tables["holdout"].index)


def damage(source: Path, name: str, target: Path) -> Path:
    """A copy of a file of weights in which a tensor is so large that what it gives is infinite."""
    from safetensors import safe_open

    with safe_open(source, framework="pt") as stored:
        metadata = stored.metadata()
    state = load_file(source)
    state[name] = torch.full_like(state[name], 3e38)
    save_file(state, target, metadata)
    return target


@pytest.mark.parametrize("kind", ["single", "multi_label"])
def test_zero_shot_that_overflows_ends_with_a_sentence(kind, png_digits, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = damage(tiny_model.weights, "visual.norm.weight", tmp_path / "large.safetensors")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"scoring: {{kind: {kind}}}\ncompute: {{precision: fp32}}\ndata: {{workers: 0}}\n")
    overrides = [*tiny_model.overrides, f"model.weights={weights}", f"data.test={png_digits.test}", "run.dir=run"]
    assert probes.zeroshot.main([str(recipe), *overrides]) == 2
    error = capsys.readouterr().err
    assert "20 of 20 rows of scores of test are not finite, the first of one/12.png" in error
    assert not Path("run/result.json").exists()


def test_a_broken_checkpoint_is_neither_evaluated_nor_mixed(png_digits, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [str(REPO / "recipes" / "quickstart" / "finetune.yaml"), *tiny_model.overrides, "data.format=folder"]
    argv += [f"data.train={png_digits.train}", f"data.test={png_digits.test}", "data.workers=0", "ema.decay=null"]
    argv += ["trainer.global_batch=12", "trainer.micro_batch=12", "schedule.epochs=1", "schedule.warmup_epochs=0"]
    assert finetune.__main__.main([*argv, "head.start=fresh", "trainer.precision=fp32", "run.dir=run"]) == 0
    assert json.loads(Path("run/result.json").read_text(encoding="utf-8"))["scores"][0]["split"] == "test"
    run = FinishedRun(Path("run"))
    model = run.build()
    model.load_state_dict({name: tensor * math.nan for name, tensor in run.end_state().items()})
    with pytest.raises(ValueError, match="20 of 20 rows of scores of test are not finite"):
        run.score(model, run.splits.test)
    damage(Path("run/model.safetensors"), "head.weight", Path("run/model.safetensors"))
    capsys.readouterr()
    assert finetune.evaluate.main(["run", "run.dir=again"]) == 2
    assert "of 20 rows of scores of test are not finite, the first of" in capsys.readouterr().err
