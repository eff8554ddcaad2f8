"""Without a test split every method is scored on images that it was not fitted on, repetition by repetition.

Each figure is computed again here, by scikit-learn or NumPy, from train alone.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score

import probes.knn
import probes.linear
import probes.logistic
import probes.ridge
from probes.draws import choose_shots, shares_images, with_shots
from probes.extraction import load_tables
from probes.head_start import start_head
from probes.method_sections import MethodRecipe
from probes.recipe import load_recipe
from probes.sections import DataSection, Recipe
from probes.splits import prepare_splits

CLASSES, PER_CLASS, HELD = 8, 16, 0.25
EPOCHS = 12
RATES = (0.3, 3.0)
CS, PENALTIES, KS = 10.0 ** np.array([-1, 0, 1]), 10.0 ** np.array([-3, -1, 1]), (1, 3, 10)
TRAINED = [
    *("features.mode=cached", "head.kind=linear", "optimizer.name=sgd", "trainer.precision=fp32"),
    *(f"schedule.epochs={EPOCHS}", "schedule.warmup_epochs=2"),
]
FITTED = ["compute.precision=fp32"]


@dataclass(frozen=True)
class Command:
    """A command with the settings that the computations below have."""

    main: Callable[[list[str]], int]
    overrides: list[str]


COMMANDS = {
    "logistic": Command(probes.logistic.main, [*FITTED, "logistic.low=-1", "logistic.high=1", "logistic.count=3"]),
    "ridge": Command(probes.ridge.main, [*FITTED, "ridge.low=-3", "ridge.high=1", "ridge.count=3"]),
    "knn": Command(probes.knn.main, [*FITTED, f"knn.k={list(KS)}".replace(" ", "")]),
    "linear": Command(probes.linear.main, [*TRAINED, f"optimizer.lr={RATES[0]}"]),
    "bank": Command(probes.linear.main, [*TRAINED, f"bank.lrs=[{RATES[0]},{RATES[1]}]"]),
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[str, Path]:
    """CSV files of the same pictures: by digit, by a label drawn at random, by digit and parity."""
    folder, digits = tmp_path_factory.mktemp("pictures"), load_digits()
    draw, rows = np.random.default_rng(0), []
    for target in range(CLASSES):
        for number, position in enumerate(np.flatnonzero(digits.target == target)[:PER_CLASS]):
            path = folder / f"{target}{number:02}.png"
            picture = Image.fromarray((digits.images[position] * 15.9).astype(np.uint8))
            picture.resize((32, 32), Image.Resampling.BICUBIC).save(path)
            rows.append((path.name, target))
    shuffled = draw.permutation([target for _, target in rows])
    labels = {
        "digits": [f"d{target}" for _, target in rows],
        "random": [f"d{target}" for target in shuffled],
        "several": [f"d{target}|{'odd' if target % 2 else 'even'}" for _, target in rows],
    }
    for name, of_rows in labels.items():
        lines = [f"{path},{label}" for (path, _), label in zip(rows, of_rows, strict=True)]
        (folder / f"{name}.csv").write_text("\n".join(["path,label", *lines]) + "\n", encoding="utf-8")
    return {name: folder / f"{name}.csv" for name in labels}


@pytest.fixture
def start(tables, tiny_model, tmp_path, monkeypatch):
    """`start(command, data, *overrides)`: the run's result and its recipe."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, data: str, *overrides: str) -> tuple[dict, list[str]]:
        train = int(CLASSES * PER_CLASS * (1 - HELD))
        batches = (
            [f"trainer.global_batch={train}", f"trainer.micro_batch={train}"] if name in ("linear", "bank") else []
        )
        several = ["data.labels=multi"] if data == "several" else []
        argv = [*tiny_model.overrides, "data.format=csv", f"data.train={tables[data]}", f"data.holdout={HELD}"]
        argv += ["data.workers=0", "features.pool=gap", "run.dir=run", *batches, *several]
        argv += [*COMMANDS[name].overrides, *overrides]
        Path("recipe.yaml").write_text("", encoding="utf-8")
        assert COMMANDS[name].main(["recipe.yaml", *argv]) == 0
        return json.loads(Path("run/result.json").read_text(encoding="utf-8")), argv

    return run


@dataclass(frozen=True)
class Half:
    """Features of one side of a hold-out with its labels."""

    features: np.ndarray
    shown: np.ndarray
    """[N, C] of 0 and 1."""

    @property
    def targets(self) -> np.ndarray:
        return self.shown.argmax(axis=1)


def halves(argv: list[str], seed: int, several: bool) -> dict[str, Half]:
    """Train and hold-out of a seed, and test where there is one."""
    plain = [item for item in argv if item.startswith(("data.", "model.", "features.pool"))]
    recipe = load_recipe("recipe.yaml", [*plain, *FITTED], MethodRecipe)
    splits = prepare_splits(replace(recipe.data, holdout_seed=seed), multi_label=True)
    found = load_tables(recipe, splits)

    def half(name: str) -> Half:
        split = splits.named[name]
        shown = split.multi_hot if several else np.eye(len(splits.classes))[split.targets]
        return Half(found[name].features.double().numpy(), np.asarray(shown, dtype=float))

    return {name: half(name) for name in splits.named}


def measure(scores: np.ndarray, held: Half, several: bool) -> float:
    if several:
        return 100 * float(
            np.mean([average_precision_score(y, s) for y, s in zip(held.shown.T, scores.T, strict=True)])
        )
    return 100 * float((scores.argmax(axis=1) == held.targets).mean())


def logistic(train: Half, several: bool, held: Half) -> Iterator[np.ndarray]:
    for c in CS:
        model = LogisticRegression(C=c, tol=1e-8, max_iter=5000)
        if several:
            fits = [model.fit(train.features, y).decision_function(held.features) for y in train.shown.T]
            yield np.stack(fits, axis=1)
        else:
            yield model.fit(train.features, train.targets).decision_function(held.features)


def ridge(train: Half, several: bool, held: Half) -> Iterator[np.ndarray]:
    centred = train.features - train.features.mean(axis=0)
    unit = np.square(centred).sum() / centred.shape[1]
    for penalty in PENALTIES:
        yield Ridge(alpha=penalty * unit, solver="svd").fit(train.features, train.shown).predict(held.features)


def knn(train: Half, several: bool, held: Half) -> Iterator[np.ndarray]:
    keys, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train.features, held.features))
    for k in KS:
        cosine = queries @ keys.T
        nearest = np.argsort(-cosine, axis=1)[:, :k]
        strength = np.exp((np.take_along_axis(cosine, nearest, axis=1) - 1) / 0.07)
        votes = np.einsum("nk,nkc->nc", strength, train.shown[nearest])
        yield votes / strength.sum(axis=1, keepdims=True)


SOLVED = {"logistic": logistic, "ridge": ridge, "knn": knn}


def descend(argv: list[str], seed: int, rate: float, train: Half, several: bool, held: Half) -> Iterator[np.ndarray]:
    """Gradient descent with momentum on all of train at once, in NumPy; what it gives after every epoch."""
    recipe = load_recipe("recipe.yaml", argv, Recipe)
    torch.manual_seed(seed)
    head = start_head(recipe, [f"c{i}" for i in range(train.shown.shape[1])], train.features.shape[1])[-1]
    weight, bias = head.weight.detach().double().numpy(), head.bias.detach().double().numpy()
    warm, rest = np.linspace(0, rate, 2), np.arange(EPOCHS - 2)
    rates = [*warm, *(0.5 * rate * (1 + np.cos(np.pi * rest / len(rest))))]
    speed = [np.zeros_like(weight), np.zeros_like(bias)]
    for lr in rates:
        logits = train.features @ weight.T + bias
        if several:
            error = (1 / (1 + np.exp(-logits)) - train.shown) / train.shown.size
        else:
            raised = np.exp(logits - logits.max(axis=1, keepdims=True))
            error = (raised / raised.sum(axis=1, keepdims=True) - train.shown) / len(train.shown)
        speed = [
            recipe.optimizer.momentum * v + g
            for v, g in zip(speed, (error.T @ train.features, error.sum(0)), strict=True)
        ]
        weight, bias = weight - lr * speed[0], bias - lr * speed[1]
        yield held.features @ weight.T + bias


def expected(name: str, argv: list[str], seed: int, several: bool) -> tuple[float, int]:
    """Best score of all that the method chooses from, and the number of images it is of."""
    train, held = (halves(argv, seed, several)[part] for part in ("train", "holdout"))
    if name in SOLVED:
        tried = SOLVED[name](train, several, held)
    else:
        rates = RATES[:1] if name == "linear" else RATES
        tried = itertools.chain(*(descend(argv, seed, rate, train, several, held) for rate in rates))
    return max(measure(scores, held, several) for scores in tried), len(held.shown)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_repetition_is_scored_on_its_own_holdout_fitted_on_train_alone(name, start):
    result, argv = start(name, "digits", "run.seeds=[3,4,5]")
    assert [row["seed"] for row in result["repeats"]] == [3, 4, 5]
    for row in result["repeats"]:
        value, samples = expected(name, argv, row["seed"], several=False)
        assert row["top1"] == pytest.approx(value, abs=100 / samples + 0.01), "of an image that is nearly a tie"
    score = result["scores"][0]
    assert (score["split"], score["chosen_by"], score["samples"]) == ("holdout", "holdout", samples)
    assert score["top1"] == result["repeats"][0]["top1"]
    assert any("no test split" in note and "optimistic" in note for note in result["notes"])
    assert any("own hold-out" in note for note in result["notes"])
    data = json.loads(Path("run/data.json").read_text(encoding="utf-8"))
    of_seeds = {item["seed"]: item for item in data["repetitions"]}
    assert {item["reported"] for item in of_seeds.values()} == {"holdout"}
    assert len({item["fingerprint"] for item in of_seeds.values()}) == 3
    assert of_seeds[3]["fingerprint"] == data["splits"]["holdout"]["fingerprint"]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "bank"])
def test_several_labels_are_scored_on_images_that_were_not_fitted(name, start):
    result, argv = start(name, "several")
    value, _ = expected(name, argv, 0, several=True)
    score = result["scores"][0]
    assert (score["split"], score["chosen_by"]) == ("holdout", "holdout")
    assert score["mean_average_precision"] == pytest.approx(value, abs=1.0)
    assert any("no test split" in note and "optimistic" in note for note in result["notes"])


LEARNS_BY_HEART = {
    "logistic": ["logistic.low=4", "logistic.high=4", "logistic.count=1"],
    "ridge": ["ridge.low=-9", "ridge.high=-9", "ridge.count=1"],
    "knn": ["knn.k=[1]"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_labels_drawn_at_random_give_chance(name, start):
    result, _ = start(name, "random", "run.seeds=[0,1,2]", *LEARNS_BY_HEART.get(name, []))
    mean = np.mean([row["top1"] for row in result["repeats"]])
    assert mean < 30, f"chance is {100 / CLASSES}, and each is the best of a few tries on 32 images"


@pytest.mark.parametrize("name", SOLVED)
def test_shots_are_not_drawn_from_the_holdout_that_is_reported(name, start):
    result, argv = start(name, "digits", "few_shot.shots=[1,8]", "run.seeds=[1,2]")
    score = result["scores"][0]
    assert (score["split"], score["chosen_by"], score["samples"]) == ("holdout", "shots_holdout", 32)
    assert result["split_sizes"] == {"train": 6 * CLASSES, "shots_holdout": 2 * CLASSES, "holdout": 32}
    assert not any("optimistic" in note for note in result["notes"]), "it had no part in the choice"
    report = Path("run/report.html").read_text(encoding="utf-8")
    assert "chosen by shots_holdout; reported on the hold-out split, which had no part" in report
    for row in result["repeats"]:
        if row["shots"] == 1 and name == "knn":  # the nearest of one image a class: nothing is chosen
            train, held = (halves(argv, row["seed"], several=False)[part] for part in ("train", "holdout"))
            drawn = shots_by_hand(argv, row["seed"])
            few = Half(train.features[drawn], train.shown[drawn])
            keys, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (few.features, held.features))
            assert row["top1"] == pytest.approx(measure(queries @ keys.T @ few.shown, held, False), abs=100 / 32 + 0.01)


def shots_by_hand(argv: list[str], seed: int) -> np.ndarray:
    path = next(item for item in argv if item.startswith("data.train=")).removeprefix("data.train=")
    train = prepare_splits(DataSection(format="csv", train=path, holdout=HELD, holdout_seed=seed)).train
    return choose_shots(train.targets, train.keys, 1, seed)


def test_what_was_drawn_shares_no_image_with_what_is_reported(tables):
    splits = prepare_splits(DataSection(format="csv", train=str(tables["digits"]), holdout=HELD))
    assert splits.selection is not None
    drawn = with_shots(splits, 8, 0)
    for part in (drawn.train, drawn.selection):
        assert not shares_images(part, splits.selection)
    assert shares_images(splits.selection, splits.selection.take("some", np.arange(3)))


@pytest.mark.parametrize("name", ["logistic", "ridge", "knn"])
def test_with_a_test_split_the_holdout_is_fitted_too(name, start, tables):
    """The hold-out joins train only where something else is reported."""
    first, *rows = list(csv.reader(tables["digits"].open(encoding="utf-8")))
    folder = tables["digits"].parent
    parts = {"train": [row for number, row in enumerate(rows) if number % 4], "test": rows[::4]}
    for part, of_part in parts.items():
        with (folder / f"{part}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([first, *of_part])
    result, argv = start(name, "digits", f"data.train={folder / 'train.csv'}", f"data.test={folder / 'test.csv'}")
    found = halves(argv, 0, several=False)
    train, held, test = (found[part] for part in ("train", "holdout", "test"))
    joined = Half(*(np.concatenate([getattr(train, key), getattr(held, key)]) for key in ("features", "shown")))
    scores = [measure(tried, held, False) for tried in SOLVED[name](train, False, held)]
    close = [n for n, value in enumerate(scores) if value >= max(scores) - 100 / len(held.shown) - 0.01]
    refitted = [measure(tried, test, False) for tried in SOLVED[name](joined, False, test)]
    score = result["scores"][0]
    assert (score["split"], score["chosen_by"], score["samples"]) == ("test", "holdout", len(test.shown))
    apart = min(abs(score["top1"] - refitted[n]) for n in close)
    assert apart <= 100 / len(test.shown) + 0.01, "of an image that is nearly a tie"
