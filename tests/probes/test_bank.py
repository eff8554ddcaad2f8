"""A bank of heads against each of its heads trained alone, what it chooses, marks and keeps, and runs of it."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from probes.bank import BankHead, HeadBank, build_grid
from probes.bank_fit import BankFit, FeatureSplit, evaluate_bank
from probes.bank_loss import binary_errors, cross_entropy_errors
from probes.bank_plan import plan_bank
from probes.heads import build_head
from probes.optim import build_optimizer
from probes.recipe import load_recipe
from probes.sampling import EpochSampler
from probes.schedule import warmup_cosine
from probes.sections import OptimizerSection

REPO = Path(__file__).resolve().parents[2]
FOLDER_RECIPE = REPO / "recipes" / "custom" / "linear_folder.yaml"
CLASSES, EPOCHS, BATCH = 5, 5, 16
DIMS = {"last": 12, "last4": 20}
RATES = {"sgd": (1e-3, 0.03, 0.3), "lars": (0.1, 1.0, 5.0), "adamw": (1e-4, 1e-3, 1e-2)}


@pytest.fixture(scope="module")
def splits() -> tuple[FeatureSplit, FeatureSplit]:
    """160 + 80 samples: ten steps of 16 an epoch, five epochs are fifty steps."""
    generator = torch.Generator().manual_seed(0)
    made = []
    centres = {name: torch.randn(CLASSES, width, generator=generator) for name, width in DIMS.items()}
    for count in (160, 80):
        targets = torch.randint(CLASSES, (count,), generator=generator)
        features = {
            name: 3 + centre[targets] + torch.randn(count, centre.shape[1], generator=generator)
            for name, centre in centres.items()
        }
        made.append(FeatureSplit(features, targets))
    return made[0], made[1]


def train_alone(
    head: BankHead, split: FeatureSplit, optimizer: str, criterion: Callable | None = None, seed: int = 0
) -> nn.Sequential:
    """The plain loop: autograd, torch's loss, `build_optimizer`, the same batches and rates."""
    torch.manual_seed(seed)
    single = build_head(head.kind, DIMS[head.features], CLASSES)
    section = OptimizerSection(name=optimizer, lr=head.lr, weight_decay=head.weight_decay)
    stepper = build_optimizer(single.parameters(), section)
    criterion = criterion or nn.CrossEntropyLoss()
    steps = len(split) // BATCH
    rates = iter(warmup_cosine(head.lr, 0.0, EPOCHS, steps, 1))
    for epoch in range(EPOCHS):
        sampler = EpochSampler(len(split), steps * BATCH, seed)
        sampler.set_epoch(epoch)
        for rows in torch.tensor([row for _, row in sampler]).split(BATCH):
            rate = float(next(rates))
            for group in stepper.param_groups:
                group["lr"] = rate
            stepper.zero_grad()
            criterion(single(split.features[head.features][rows].float()), split.targets[rows]).backward()
            stepper.step()
    return single.eval()


def fit(bank: HeadBank, splits: tuple[FeatureSplit, FeatureSplit], **changes: object) -> BankFit:
    return BankFit(bank, [splits[0]], splits[1], **{"epochs": EPOCHS, "batch": BATCH, "warmup_epochs": 1, **changes})  # type: ignore[arg-type]


def assert_same(ours: nn.Sequential, theirs: nn.Sequential) -> None:
    for key, wanted in theirs.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            found = ours.state_dict()[key]
            error = (found.double() - wanted.double()).norm() / wanted.double().norm()
            assert error < 1e-5, f"{key}: {error}"


# Each head is its twin


@pytest.mark.parametrize("optimizer", RATES)
def test_every_head_is_its_twin_trained_alone(optimizer, splits):
    heads = [
        head
        for kind in ("bn_linear", "linear")
        for head in build_grid(DIMS, RATES[optimizer], (0.0, 0.05), kind)
    ]  # fmt: skip
    bank = HeadBank(heads, DIMS, CLASSES, optimizer=optimizer)
    fit(bank, splits).run()
    for number, head in enumerate(heads):
        assert_same(bank.build_single(number), train_alone(head, splits[0], optimizer))


def test_weighted_losses_are_divided_by_the_number_of_samples(splits):
    weights = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])
    head = BankHead("last", 0.1)
    bank = HeadBank([head, BankHead("last", 0.2)], DIMS, CLASSES, class_weights=weights)
    fit(bank, splits).run()
    summed = nn.CrossEntropyLoss(weights, reduction="sum")
    single = train_alone(head, splits[0], "sgd", lambda logits, targets: summed(logits, targets) / BATCH)
    assert_same(bank.build_single(0), single)
    with pytest.raises(AssertionError):
        assert_same(bank.build_single(0), train_alone(head, splits[0], "sgd"))


@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])], ids=["even", "weighted"])
def test_many_labels_are_torchs(weights, splits):
    labels = tuple(
        FeatureSplit(split.features, F.one_hot(split.targets, CLASSES) | F.one_hot(split.targets.flip(0), CLASSES))
        for split in splits
    )
    head = BankHead("last", 0.5)
    bank = HeadBank([BankHead("last", 0.2), head], DIMS, CLASSES, loss="bce", class_weights=weights)
    fit(bank, labels).run()
    floats = FeatureSplit(labels[0].features, labels[0].targets.float())
    assert_same(bank.build_single(1), train_alone(head, floats, "sgd", nn.BCEWithLogitsLoss(weights)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_read_as_float32(dtype, splits):
    halves = tuple(FeatureSplit({k: v.to(dtype) for k, v in s.features.items()}, s.targets) for s in splits)
    head = BankHead("last4", 0.1)
    bank = HeadBank([head], DIMS, CLASSES)
    fit(bank, halves).run()
    assert_same(bank.build_single(0), train_alone(head, halves[0], "sgd"))


# Losses


def test_cross_entropy_and_its_derivative_are_autograds():
    generator = torch.Generator().manual_seed(1)
    logits = (10 * torch.randn(3, CLASSES, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    targets, weights = torch.randint(CLASSES, (7,), generator=generator), torch.rand(CLASSES, dtype=torch.float64)
    for chosen in (None, weights):
        wanted = torch.stack([F.cross_entropy(head.T, targets, chosen, reduction="none").mean() for head in logits])
        slope = torch.autograd.grad(wanted.sum(), logits)[0]
        errors, losses = cross_entropy_errors(logits.detach(), targets, chosen)
        torch.testing.assert_close(losses, wanted.detach())
        torch.testing.assert_close(errors, slope)


def test_a_target_of_vanishing_probability_has_a_finite_loss():
    logits = torch.tensor([0.0, 300.0]).view(1, 2, 1)
    assert cross_entropy_errors(logits, torch.tensor([0]))[1].tolist() == [300.0]


def test_binary_derivative_is_autograds():
    logits = torch.randn(3, CLASSES, 7, dtype=torch.float64).requires_grad_()
    targets = (torch.rand(7, CLASSES) > 0.5).double()
    wanted = torch.stack([F.binary_cross_entropy_with_logits(head.T, targets) for head in logits])
    errors, losses = binary_errors(logits.detach(), targets)
    torch.testing.assert_close(losses, wanted.detach())
    torch.testing.assert_close(errors, torch.autograd.grad(wanted.sum(), logits)[0])


# Heads that diverge


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_diverged_head_is_marked_and_leaves_the_others_bit_equal(optimizer, broken, splits):
    heads = build_grid(["last"], RATES[optimizer], kind="linear")
    calm, stormy = (HeadBank(heads, DIMS, CLASSES, optimizer=optimizer) for _ in range(2))
    stormy.groups[0].weight[1, 0, 0] = broken
    fits = [fit(bank, splits) for bank in (calm, stormy)]
    for one in fits:
        one.run()
    assert stormy.diverged.tolist() == [False, True, False]
    assert not calm.diverged.any()
    for number in (0, 2):
        for key, value in calm.build_single(number).state_dict().items():
            assert torch.equal(value, stormy.build_single(number).state_dict()[key])
    assert all(torch.isfinite(value).all() for value in stormy.state_dict().values() if isinstance(value, torch.Tensor))
    assert not stormy.build_single(1)[-1].weight.any()
    rows = [row for row in fits[1].history if row["head"] == 1]
    assert all(row["diverged"] and math.isnan(row["selection_acc1"]) for row in rows)
    assert fits[1].selected["head"] != 1


def test_a_learning_rate_too_large_diverges_by_itself(splits):
    heads = [BankHead("last", 0.1, kind="linear"), BankHead("last", 1e30, 1e8, kind="linear")]
    bank = HeadBank(heads, DIMS, CLASSES)
    fit(bank, splits).run()
    assert bank.diverged.tolist() == [False, True]
    assert_same(bank.build_single(0), train_alone(heads[0], splits[0], "sgd"))


# Scores and choice


def test_scores_are_those_of_each_head_alone(splits, monkeypatch):
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    monkeypatch.setattr("probes.bank_fit.EVALUATION_LOGITS", 7 * 4 * CLASSES)  # blocks of 7 of the 80
    bank = HeadBank(build_grid(DIMS, (0.01, 0.3)), DIMS, CLASSES)
    done = fit(bank, splits)
    done.run_epoch()
    for number, row in enumerate(evaluate_bank(bank, splits[1])):
        with torch.no_grad():
            logits = bank.build_single(number)(splits[1].features[bank.heads[number].features])
        predicted, targets = logits.argmax(1), splits[1].targets
        assert row["acc1"] == pytest.approx(100 * accuracy_score(targets, predicted))
        assert row["balanced_acc1"] == pytest.approx(100 * balanced_accuracy_score(targets, predicted))
        assert row["loss"] == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
        assert done.history[number]["selection_acc1"] == row["acc1"]


def test_balanced_accuracy_ignores_absent_classes(splits):
    from sklearn.metrics import recall_score

    bank = HeadBank(build_grid(["last"], (0.3,)), DIMS, CLASSES)
    kept = splits[1].targets < 3
    part = FeatureSplit({name: values[kept] for name, values in splits[1].features.items()}, splits[1].targets[kept])
    predicted = bank.logits(part.features)[0].argmax(0)
    wanted = recall_score(part.targets, predicted, labels=[0, 1, 2], average="macro")
    assert evaluate_bank(bank, part)[0]["balanced_acc1"] == pytest.approx(100 * wanted)


def test_many_label_scores(splits):
    bank = HeadBank([BankHead("last", 0.1)], DIMS, CLASSES, loss="bce")
    labels = F.one_hot(splits[1].targets, CLASSES)
    row = evaluate_bank(bank, FeatureSplit(splits[1].features, labels))[0]
    answers = bank.logits(splits[1].features)[0].T > 0
    assert row["label_acc"] == pytest.approx(100 * float((answers == labels).double().mean()))
    assert row["exact_match"] == pytest.approx(100 * float((answers == labels).all(1).double().mean()))


def choice(rows: list[tuple[float, float]], lrs: list[float], splits: tuple[FeatureSplit, FeatureSplit]) -> int:
    done = fit(HeadBank(build_grid(["last"], lrs), DIMS, CLASSES), splits)
    done.history = [
        {"head": number, "epoch": 0, "diverged": False, "selection_acc1": acc1, "selection_loss": loss}
        for number, (acc1, loss) in enumerate(rows)
    ]
    done._select()
    assert done.selected is not None
    return int(done.selected["head"])


def test_the_best_head_is_chosen_then_the_lower_loss_then_the_smaller_rate(splits):
    assert choice([(50, 0.1), (60, 0.9), (55, 0.2)], [0.1, 0.2, 0.3], splits) == 1
    assert choice([(60, 0.8), (60, 0.9), (60, 0.7)], [0.1, 0.2, 0.3], splits) == 2
    assert choice([(60, 0.5), (60, 0.5), (60, 0.5)], [0.3, 0.1, 0.2], splits) == 1


def test_the_selected_weights_are_of_the_best_epoch_seen(splits):
    done = fit(HeadBank(build_grid(DIMS, (0.01, 0.3, 3.0)), DIMS, CLASSES), splits)
    done.run()
    assert done.selected is not None
    best = max(done.history, key=lambda row: (row["selection_acc1"], -row["selection_loss"]))
    assert (done.selected["epoch"], done.selected["head"]) == (best["epoch"], best["head"])
    head = done.bank.heads[best["head"]]
    single = build_head(head.kind, DIMS[head.features], CLASSES).eval()
    single.load_state_dict(done.selected["weights"])
    predicted = single(splits[1].features[head.features]).argmax(1)
    assert 100 * float((predicted == splits[1].targets).double().mean()) == pytest.approx(best["selection_acc1"])


# Start, stop, continue


def test_initial_weights_are_where_heads_start(splits):
    zero_shot = torch.randn(CLASSES, DIMS["last"])
    bank = HeadBank(build_grid(DIMS, (0.1,), kind="linear"), DIMS, CLASSES, initial={"last": zero_shot})
    torch.testing.assert_close(bank.logits(splits[0].features)[0], zero_shot @ splits[0].features["last"].T)
    assert torch.equal(bank.build_single(0)[-1].weight, zero_shot)
    assert not torch.equal(bank.build_single(1)[-1].weight[:, : DIMS["last"]], zero_shot)


def test_building_a_bank_leaves_the_ambient_generator_alone():
    before = torch.get_rng_state()
    HeadBank(build_grid(DIMS, (0.1,)), DIMS, CLASSES, seed=3).build_single(0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("optimizer", RATES)
def test_a_stopped_fit_continues_bit_for_bit(optimizer, splits, tmp_path):
    def build() -> BankFit:
        heads = [*build_grid(DIMS, RATES[optimizer], (0.0, 0.05)), BankHead("last", 1e38, 1e8)]
        return fit(HeadBank(heads, DIMS, CLASSES, optimizer=optimizer), splits)

    whole, first, second = build(), build(), build()
    whole.run()
    for _ in range(2):
        first.run_epoch()
    torch.save(first.state_dict(), tmp_path / "fit.pt")
    first.run()  # a state once taken does not move with the fit
    second.load_state_dict(torch.load(tmp_path / "fit.pt", weights_only=True))
    assert second.epoch == 2
    second.run()
    for key, value in whole.bank.state_dict().items():
        same = second.bank.state_dict()[key]
        assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same
    assert repr(second.history) == repr(whole.history)  # repr: a diverged head's NaN equals nothing
    assert second.selected["row"] == whole.selected["row"]


def test_another_banks_state_is_refused(splits):
    heads = build_grid(["last"], (0.1, 0.2))
    state = fit(HeadBank(heads, DIMS, CLASSES), splits).state_dict()
    other = HeadBank(build_grid(["last"], (0.1, 0.3)), DIMS, CLASSES)
    with pytest.raises(ValueError, match="other heads than this one"):
        fit(other, splits).load_state_dict(copy.deepcopy(state))
    with pytest.raises(ValueError, match="epochs, batch, seed"):
        fit(HeadBank(heads, DIMS, CLASSES), splits, seed=1).load_state_dict(state)


# Mistakes


def test_all_mistakes_are_named_at_once():
    heads = [BankHead("first", 0.1), BankHead("last", -1.0), BankHead("last", 0.1, kind="mlp")]
    with pytest.raises(ValueError, match="first bn_linear") as caught:
        HeadBank(
            [*heads, *build_grid(["last"], [0.1, 0.1])],
            DIMS,
            CLASSES,
            optimizer="adam",
            loss="hinge",
            class_weights=torch.ones(2),
            initial={"last": torch.ones(2, 2)},
        )
    text = str(caught.value)
    for part in ("last, last4", "lr is -1.0", "unknown kind", "more than once", "'adam'", "'hinge'", "[5]", "[5, 12]"):
        assert part in text


def test_a_criterion_that_there_is_not(splits):
    with pytest.raises(ValueError, match="expected acc1 or balanced_acc1"):
        fit(HeadBank([BankHead("last", 0.1)], DIMS, CLASSES), splits, criterion="f1")


# Runs, from recipe to report

FILES = {
    *("recipe.yaml", "environment.json", "data.json", "log.txt", "bank.csv", "head.safetensors", "predictions.csv"),
    "fitted_on.npz",
    *("report.html", "result.json"),
}
GRID = ["bank.lrs=[0.3,1.0,3.0]", "bank.weight_decays=[0.0,0.01]", "bank.kinds=[cls,cls_last2+gap]"]
Start = Callable[..., object]


@pytest.fixture
def argv(png_digits, tiny_model) -> list[str]:
    data = [f"data.train={png_digits.train}", f"data.test={png_digits.test}", "data.workers=0", "data.holdout=0.25"]
    small = ["trainer.global_batch=12", "trainer.micro_batch=12", "schedule.epochs=6", "schedule.warmup_epochs=1"]
    features = ["features.mode=cached", "features.pool=gap", "trainer.precision=fp32", "optimizer.lr=1.0"]
    return [str(FOLDER_RECIPE), *tiny_model.overrides, *data, *small, *features]


@pytest.fixture
def start(run_cli, argv, tmp_path) -> Start:
    """`start(folder, *overrides)`: a run in this process."""
    return lambda folder, *overrides: run_cli([*argv, *overrides, f"run.dir={folder}"], tmp_path)


def read_rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.txt").read_text(encoding="utf-8").splitlines()]


def read_table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("kind", ["bn_linear", "linear"])
def test_a_bank_of_one_head_is_the_ordinary_run(kind, optimizer, start, tmp_path):
    shared = [f"head.kind={kind}", f"optimizer.name={optimizer}", "optimizer.weight_decay=0.01", "features.views=2"]
    lr = max(RATES[optimizer])
    alone = start("alone", *shared, f"optimizer.lr={lr}", "head.class_weights=auto")
    assert alone.code == 0, alone.err
    banked = start("bank", *shared, f"bank.lrs=[{lr}]", "head.class_weights=auto")
    assert banked.code == 0, banked.err
    theirs, ours = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("alone", "bank"))
    for key in ("top1", "top5", "split", "samples"):
        assert ours["scores"][1][key] == theirs["scores"][1][key], key  # of the last epoch
    for mine, other in zip(read_rows(tmp_path / "bank"), read_rows(tmp_path / "alone"), strict=True):
        for key in ("train_lr", "train_loss", "holdout_loss", "holdout_acc1", "epoch", "n_parameters"):
            assert mine[key] == pytest.approx(other[key], rel=1e-4), key


def test_a_bank_starts_from_texts_as_the_ordinary_run(start, tmp_path):
    shared = ["features.projected=true", "features.l2norm=true", "features.pool=cls", "head.kind=linear"]
    shared += ["head.start=zero_shot", "optimizer.name=sgd"]
    assert start("alone", *shared, "optimizer.lr=0.01").code == 0
    banked = start("bank", *shared, "bank.lrs=[0.01]")
    assert banked.code == 0, banked.err
    alone, bank = (read_rows(tmp_path / name) for name in ("alone", "bank"))
    assert bank[0]["train_loss"] == pytest.approx(alone[0]["train_loss"], rel=1e-4)
    assert bank[-1]["holdout_loss"] == pytest.approx(alone[-1]["holdout_loss"], rel=1e-4)


def test_unreadable_images_are_left_out_of_every_kind(run_cli, argv, write_digits, tmp_path):
    digits = write_digits(tmp_path / "digits", 4)
    (digits.train / "one" / "03.png").write_bytes(b"no image")
    more = [f"data.train={digits.train}", f"data.test={digits.test}", "data.on_corrupt=skip", "run.dir=run", *GRID]
    outcome = run_cli([*argv, *more], tmp_path)
    assert outcome.code == 0, outcome.err
    assert "1 unreadable image(s) of" in outcome.out
    assert "one/03.png" in outcome.out


def test_a_run_chooses_among_the_heads_and_reads_test_once(start, tmp_path, png_digits):
    outcome = start("run", *GRID)
    assert outcome.code == 0, outcome.err
    run = tmp_path / "run"
    found = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    checkpoints = {name for name in found if name.startswith("checkpoints/step-")}
    assert found - checkpoints == FILES
    assert {"checkpoints/step-00000018.ckpt", "checkpoints/step-00000018.sha256"} <= checkpoints, "of the last epoch"
    assert len(checkpoints) == 4, "the newest two"
    heads = read_table(run / "bank.csv")
    assert len(heads) == 12
    assert {(row["features"], row["weight_decay"]) for row in heads} == {
        (kind, decay) for kind in ("cls", "cls_last2+gap") for decay in ("0.0", "0.01")
    }
    result = json.loads((run / "result.json").read_text())
    selected, last, best = result["scores"]
    assert [score["name"] for score in result["scores"]] == ["selected", "last", "best"]
    assert [score["chosen_by"] for score in result["scores"]] == ["holdout", "holdout", "test"]
    assert {score["split"] for score in result["scores"]} == {"test"}
    chosen = max(heads, key=lambda row: (float(row["best_holdout_acc1"]), -float(row["best_holdout_loss"])))
    assert f"{chosen['features']} {chosen['kind']} lr={float(chosen['lr']):g}" in selected["setting"]
    assert selected["epoch"] == int(chosen["best_epoch"])
    at_end = max(heads, key=lambda row: (float(row["last_holdout_acc1"]), -float(row["last_holdout_loss"])))
    assert f"lr={float(at_end['lr']):g} wd={float(at_end['weight_decay']):g}" in last["setting"]
    assert best["top1"] >= max(selected["top1"], last["top1"])
    predictions = read_table(run / "predictions.csv")
    right = sum(row["target"] == row["predicted"] for row in predictions)
    assert selected["top1"] == pytest.approx(100 * right / len(predictions), abs=1e-4)
    assert not any("test" in key for row in read_rows(run) for key in row), "test is read at the end alone"
    assert not any("test" in key for key in heads[0])
    with safe_open(run / "head.safetensors", framework="pt") as stored:
        probe = json.loads(stored.metadata()["probe"])
    assert probe["features"]["pool"] == chosen["features"]
    width = 32 if chosen["features"] == "cls" else 96
    assert load_file(run / "head.safetensors")["1.weight"].shape == (4, width)
    assert outcome.out.count("from the cache") == 2, "train and test: the second kind was stored by the first's pass"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert selected["setting"].rpartition(",")[0] in page


def test_the_selected_head_gives_the_reported_score(start, tmp_path):
    """Recomputed from the stored head and features of the chosen kind."""
    assert start("run", *GRID, "head.kind=linear").code == 0
    from probes.extraction import load_tables
    from probes.splits import prepare_splits

    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    recipe.features.pool = result["facts"]["chosen head"].split()[0]
    table = load_tables(recipe, prepare_splits(recipe.data))["test"]
    state = load_file(tmp_path / "run" / "head.safetensors")
    predicted = (table.features.float() @ state["0.weight"].T + state["0.bias"]).argmax(1)
    top1 = 100 * float((predicted == table.targets).double().mean())
    assert result["scores"][0]["top1"] == pytest.approx(top1, abs=1e-4)


def test_a_stopped_run_continues_to_the_same_bytes(start, tmp_path, monkeypatch):
    assert start("whole", *GRID).code == 0
    whole_epoch = BankFit.run_epoch

    def stopping(fit: BankFit) -> None:
        if fit.epoch == 4:
            raise KeyboardInterrupt
        whole_epoch(fit)

    with monkeypatch.context() as patch:
        patch.setattr(BankFit, "run_epoch", stopping)
        assert start("stopped", *GRID).code != 0
    assert len(read_rows(tmp_path / "stopped")) == 4
    other = start("stopped", "bank.lrs=[0.3]", "run.on_existing=resume")
    assert other.code == 2
    assert "was started with other values of bank.kinds, bank.lrs, bank.weight_decays" in other.err
    assert start("stopped", *GRID, "run.on_existing=resume").code == 0
    for name in ("head.safetensors", "bank.csv", "log.txt", "predictions.csv"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_killed_runs_continue_to_the_same_bytes(argv, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "probes.linear", *argv, *GRID, "schedule.epochs=150", "run.on_existing=resume"]

    def train(folder: str, rows: int | None = None) -> int:
        child = subprocess.Popen([*command, f"run.dir={folder}"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
        log = tmp_path / folder / "log.txt"
        while rows is not None and child.poll() is None:
            if log.exists() and log.read_bytes().count(b"\n") >= rows:
                child.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        child.communicate(timeout=120)
        return child.returncode

    assert [train("killed", rows) for rows in (1, 60)] == [-signal.SIGKILL] * 2
    assert train("killed") == train("whole") == 0
    for name in ("head.safetensors", "bank.csv", "log.txt", "predictions.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_bank_whose_heads_all_diverge_says_so(start, tmp_path):
    outcome = start("run", "bank.lrs=[1.0e+38]", "optimizer.weight_decay=1.0e+8", "schedule.warmup_epochs=0")
    assert outcome.code != 0
    assert "every head of the bank has a loss that is not finite in epoch 0; set lower bank.lrs" in outcome.err


def test_seeds_are_the_banks_of_each_seed(start, tmp_path):
    assert start("both", "bank.lrs=[0.03,0.3,3.0]", "run.seeds=[3,4]").code == 0
    both = json.loads((tmp_path / "both" / "result.json").read_text())
    for row in both["repeats"]:
        of_seed = [f"run.seed={row['seed']}", f"data.holdout_seed={row['seed']}"]
        assert start(f"seed{row['seed']}", "bank.lrs=[0.03,0.3,3.0]", *of_seed).code == 0
        alone = json.loads((tmp_path / f"seed{row['seed']}" / "result.json").read_text())
        assert alone["scores"][0]["top1"] == pytest.approx(row["top1"])
        assert alone["scores"][0]["setting"] == row["chosen"]
        if row["seed"] == 3:
            assert alone["scores"] == both["scores"]
    assert [row["seed"] for row in both["repeats"]] == [3, 4]


def test_a_run_on_the_split_that_chose_says_so(start, tmp_path):
    outcome = start("run", "bank.lrs=[0.3,1.0]", "data.test=null")
    assert outcome.code == 0, outcome.err
    assert "There is no test split" in outcome.out
    scores = json.loads((tmp_path / "run" / "result.json").read_text())["scores"]
    assert {score["split"] for score in scores} == {"holdout"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["features.mode=online"], "set features.mode=cached"),
        (["data.holdout=0.0"], "set data.holdout=0.15"),
        (["schedule.final_lr=0.1"], "the rates of a bank end at 0"),
        (["trainer.devices=2", "trainer.micro_batch=6"], "set trainer.devices=1"),
        (["trainer.micro_batch=6"], "set trainer.micro_batch=12"),
        (["features.projected=true", "features.pool=cls", "bank.kinds=[cls,gap]"], "only the class token"),
        (["bank.lrs=[]", "bank.kinds=[cls]"], "name the learning rates as well"),
        (["bank.lrs=[0.1,-1,0.1]"], "expected finite numbers above 0"),
        (["bank.lrs=[0.1,0.1]"], "name each value once"),
        (["bank.weight_decays=[-1.0]"], "expected finite numbers from 0 on"),
        (["bank.kinds=[last]"], "kinds: unknown pool 'last'"),
        (["bank.kinds=[cls_last9]"], "needs 9 blocks"),
    ],
)
def test_mistakes_end_before_a_run_folder_is_made(overrides, message, start, tmp_path):
    outcome = start("run", "bank.lrs=[0.1]", *overrides)
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["quickstart/bank.yaml", "imagenet1k/bank_224.yaml"])
def test_recipes_plan_their_heads(name, monkeypatch, tmp_path):
    recipe = load_recipe(REPO / "recipes" / name)
    monkeypatch.chdir(REPO if name.startswith("quick") else tmp_path)
    planned = plan_bank(recipe)
    assert planned["heads"] == {"quickstart/bank.yaml": 24, "imagenet1k/bank_224.yaml": 52}[name]
    if name.startswith("imagenet1k"):
        base = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
        assert recipe.bank.lrs == pytest.approx([lr * 1024 / 256 for lr in base])
        assert planned["feature_dims"] == {
            "cls": 1408,
            "cls+gap": 2 * 1408,
            "cls_last4": 4 * 1408,
            "cls_last4+gap": 5 * 1408,
        }
        assert planned["trainable_parameters"] == 13 * 1000 * (12 * 1408 + 4)
        assert planned["steps_per_epoch"] == (1281167 - 12812) // 1024
