"""The report: its numbers equal scikit-learn's, it needs nothing outside itself, odd runs do not break it."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix

from probes.report import write_report
from probes.results import Baseline, Expectation, Predictions, RunResult, Score

VOID = {"meta", "img", "input", "br", "link"}
LOG = [
    {
        "epoch": epoch,
        "train_lr": 0.1,
        "train_loss": 2.0 / (epoch + 1),
        "train_class_acc": 0.5 + 0.1 * epoch,
        "holdout_loss": 2.1 / (epoch + 1),
        "holdout_acc1": 50.0 + epoch,
        "test_loss": 2.2 / (epoch + 1),
        "test_acc1": 49.0 + epoch,
        "n_parameters": 650,
    }
    for epoch in range(5)
]


@dataclass
class Page(HTMLParser):
    """What a test asks of a page: tables as text by label, attributes, and whether tags close in order."""

    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    text: str = ""
    _open: list[str] = field(default_factory=list)
    _label: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        found = dict(attrs)
        if found.get("role") == "region":
            self._label = found["aria-label"] or ""
            self.tables[self._label] = []
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr" and self._label:
            self.tables[self._label].append([])
        if tag in ("td", "th") and self._label:
            self.tables[self._label][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> does not close what is open: {self._open}"
        if tag == "table":
            self._label = ""

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text += data
        if self._label and self.tables[self._label] and self.tables[self._label][-1]:
            self.tables[self._label][-1][-1] += data


def parse(markup: str) -> Page:
    page = Page()
    page.feed(markup)
    page.close()
    assert not page._open
    page.tables = {
        label: [[" ".join(cell.split()) for cell in row] for row in rows] for label, rows in page.tables.items()
    }
    page.text = " ".join(page.text.split())
    return page


@pytest.fixture(scope="module")
def digits() -> tuple[Predictions, list[Image.Image]]:
    data = load_digits()
    model = LogisticRegression(C=0.0005, max_iter=200).fit(data.data[:600], data.target[:600])
    chance = model.predict_proba(data.data[600:])
    targets = data.target[600:].astype(np.int64)
    predicted = chance.argmax(axis=1)
    rows = np.arange(len(targets))
    pictures = [Image.fromarray((picture * 15).astype(np.uint8)) for picture in data.images[600:]]
    predictions = Predictions(
        keys=[f"digits/{index:04d}.png" for index in rows],
        targets=targets,
        predicted=predicted,
        confidence=chance[rows, predicted].astype(np.float32),
        target_probability=chance[rows, targets].astype(np.float32),
    )
    return predictions, pictures


def make_predictions(targets: list[int], predicted: list[int]) -> Predictions:
    count = len(targets)
    return Predictions(
        keys=[f"{index}.png" for index in range(count)],
        targets=np.array(targets, dtype=np.int64),
        predicted=np.array(predicted, dtype=np.int64),
        confidence=np.full(count, 0.9, dtype=np.float32),
        target_probability=np.full(count, 0.05, dtype=np.float32),
    )


def make_result(predictions: Predictions, classes: list[str], **changes: Any) -> RunResult:
    count = len(predictions.targets)
    top1 = 100 * float(np.mean(predictions.targets == predictions.predicted)) if count else math.nan
    score = Score("selected", "test", "holdout", 3, top1, 99.0, 0.5, count)
    result = RunResult("digits", "probes.linear", classes, {"train": 540, "holdout": 60, "test": count}, [score])
    return dataclasses.replace(result, **changes)


def write(path: Path, result: RunResult, predictions: Predictions, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "log": LOG,
        "read_image": lambda index: Image.new("RGB", (64, 64), "red"),
        "recipe_yaml": "run:\n  seed: 0\n",
        "environment": {"python": "3.11"},
    }
    write_report(path, result=result, predictions=predictions, **(arguments | changes))
    return path.read_text(encoding="utf-8")


def test_numbers_equal_sklearn(tmp_path: Path, digits: tuple[Predictions, list[Image.Image]]) -> None:
    predictions, pictures = digits
    names = [f"digit {index}" for index in range(10)]
    result = make_result(predictions, names)
    page = parse(write(tmp_path / "r.html", result, predictions, read_image=pictures.__getitem__))

    wanted = confusion_matrix(predictions.targets, predictions.predicted)
    matrix = [row[1:] for row in page.tables["Confusion matrix"][1:]]
    assert np.array_equal(np.array([[int(cell or 0) for cell in row] for row in matrix]), wanted)

    top1 = 100 * accuracy_score(predictions.targets, predictions.predicted)
    assert 60 < top1 < 99
    assert f"{top1:.1f} % of the test images classified correctly" in page.text
    assert f"{wanted.trace():,} of {wanted.sum():,} right" in page.text

    rows = {row[0]: row for row in page.tables["Accuracy of each class"][1:]}
    shown = [float(row[1].split()[0]) for row in page.tables["Accuracy of each class"][1:]]
    assert shown == sorted(shown)
    for index, name in enumerate(names):
        assert rows[name][1] == f"{100 * wanted[index, index] / wanted[index].sum():.1f} %"
        assert rows[name][4:6] == [str(wanted[index, index]), str(wanted[index].sum())]

    off = wanted - np.diag(wanted.diagonal())
    pair = page.tables["Most confused pairs"][1]
    assert int(pair[2]) == off.max() == off[names.index(pair[0]), names.index(pair[1])]


def test_mistakes_are_the_surest_with_their_own_pictures(
    tmp_path: Path, digits: tuple[Predictions, list[Image.Image]]
) -> None:
    predictions, pictures = digits
    markup = write(
        tmp_path / "r.html",
        make_result(predictions, list("0123456789")),
        predictions,
        read_image=pictures.__getitem__,
    )
    wrong = np.flatnonzero(predictions.targets != predictions.predicted)
    surest = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:24]
    assert re.findall(r"<code>(.*?)</code>", markup) == [predictions.keys[i] for i in surest]
    codes = re.findall(r'src="data:image/png;base64,([^"]+)"', markup)
    assert len(codes) == 24
    for code, index in zip(codes, surest, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(code))).convert("L")
        assert np.array_equal(np.asarray(picture), np.asarray(pictures[index]))
    assert markup.count('class="crisp"') == 24


def test_page_needs_nothing_outside_itself(tmp_path: Path) -> None:
    predictions = make_predictions([0, 1, 2, 1], [0, 1, 1, 2])
    markup = write(tmp_path / "r.html", make_result(predictions, ["a", "b", "c"]), predictions, reference_log=LOG)
    assert "http" not in markup
    assert "@import" not in markup
    assert "url(#" in markup or "url(" not in markup  # clip paths of the curves point into the page
    for tag, name, value in parse(markup).attributes:
        if name in ("src", "srcset", "action", "data"):
            assert value.startswith("data:"), (tag, name, value)
        if name in ("href", "xlink:href"):
            assert value.startswith("#"), (tag, name, value)
    identifiers = [value for _, name, value in parse(markup).attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))


def test_what_users_wrote_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    predictions = dataclasses.replace(make_predictions([0, 1], [1, 0]), keys=[evil, evil])
    result = make_result(
        predictions,
        [evil, "<b onclick='x'>"],
        title=evil,
        method=evil,
        notes=[evil],
        facts={"Model": evil, evil: evil},
        baselines=[Baseline(evil, 10.0, evil)],
        expectations=[Expectation(evil, 10.0, 10.0, 0.2)],
    )
    log = [{"epoch": 0, evil: 1.0, "train_loss": 1.0}]
    markup = write(tmp_path / "r.html", result, predictions, log=log, recipe_yaml=evil, environment={evil: evil})
    assert markup.count("<script") == 1  # the page's own
    assert not [name for _, name, _ in parse(markup).attributes if name.startswith("on")]
    assert evil in parse(markup).text


def test_scores_say_what_chose_them(tmp_path: Path) -> None:
    predictions = make_predictions([0, 1, 1, 0], [0, 1, 1, 1])
    scores = [
        Score("selected", "test", "holdout", 3, 75.0, 100.0, 0.5, 4),
        Score("last", "test", "schedule", 4, 50.0, 100.0, 0.6, 4),
        Score("best", "test", "test", 2, 100.0, 100.0, 0.4, 4),
    ]
    page = parse(write(tmp_path / "r.html", make_result(predictions, ["a", "b"], scores=scores), predictions))
    rows = page.tables["Scores"]
    assert rows[0][2] == "Top-2"
    assert rows[1][:3] == ["selected reported", "75.0 %", "100.0 %"]
    assert ["oracle — chosen on the data it is scored on" in row[0] for row in rows[1:]] == [
        False,
        False,
        True,
    ]
    assert "Weights of epoch 3, chosen on the hold-out split; reported on the test split" in page.text
    assert "Please note" not in page.text


def test_baselines_and_expectations(tmp_path: Path) -> None:
    predictions = make_predictions([0, 1, 1, 1], [0, 1, 0, 0])
    result = make_result(
        predictions,
        ["a", "b"],
        baselines=[Baseline("Raw pixels", 40.0, "On pixels."), Baseline("Zero-shot", 60.0, "No training.")],
        expectations=[
            Expectation("selected top-1", 50.1, 50.0, 0.2),
            Expectation("last top-1", 60.0, 55.0, 0.2),
            Expectation("best top-1", 60.0, None, 0.2),
        ],
    )
    page = parse(write(tmp_path / "r.html", result, predictions))
    verdicts = [row[-1] for row in page.tables["Measured and expected"][1:]]
    assert verdicts == ["✓ reached", "▼ below", "? not measured"]
    assert page.text.index("Zero-shot") < page.text.rindex("Raw pixels")
    assert "This run: +10.0 points." in page.text
    assert "The baseline “Zero-shot” does better than this run." in page.text
    assert "Majority class 75.0 %" in page.text
    assert "Chance 50.0 %" in page.text


def test_warns_when_predictions_and_score_disagree(tmp_path: Path) -> None:
    predictions = make_predictions([0, 1], [0, 0])
    score = Score("last", "test", "schedule", 0, 100.0, 100.0, 0.1, 2)
    page = parse(write(tmp_path / "r.html", make_result(predictions, ["a", "b"], scores=[score]), predictions))
    assert "the two do not belong together" in page.text
    assert "Every image was given the same class, “a”" in page.text


@pytest.mark.parametrize(
    "log",
    [
        [],
        LOG[:1],
        [{"epoch": 0}],
        [{"train_loss": math.nan, "test_acc1": 3.0, "epoch": 0}, {"train_loss": math.inf, "epoch": 1}],
        [{"train_lr": 1e-5}],
    ],
    ids=["empty", "one", "bare", "nan", "no-epoch"],
)
@pytest.mark.parametrize("reference", [None, LOG], ids=["", "reference"])
def test_any_log(tmp_path: Path, log: list[dict[str, float]], reference: Any) -> None:
    predictions = make_predictions([0, 1, 1], [0, 1, 0])
    markup = write(
        tmp_path / "r.html",
        make_result(predictions, ["a", "b"]),
        predictions,
        log=log,
        reference_log=reference,
    )
    page = parse(markup)
    assert ("training diverged" in page.text) == any("train_loss" in row for row in log if row not in LOG)
    assert ("No epochs were logged" in page.text) == ("<svg" not in markup)


def test_one_image_without_mistakes(tmp_path: Path) -> None:
    predictions = make_predictions([1], [1])
    page = parse(write(tmp_path / "r.html", make_result(predictions, ["a", "b"]), predictions))
    assert "scored on 1 test image." in page.text
    assert "every image was classified correctly" in page.text
    assert "No image was taken for another class" in page.text


def test_no_predictions_and_nan_scores(tmp_path: Path) -> None:
    predictions = make_predictions([], [])
    score = Score("last", "test", "schedule", 0, math.nan, math.nan, math.nan, 0)
    result = make_result(predictions, ["a"], scores=[score], baselines=[Baseline("Raw pixels", math.nan, "Diverged.")])
    page = parse(write(tmp_path / "r.html", result, predictions, log=[]))
    assert "There are no predictions" in page.text
    assert "not a number" in page.text


def test_thousand_classes_stay_small(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 1000, 5000)
    targets[:40] = 7
    predicted = np.where(generator.random(5000) < 0.8, targets, (targets + 1) % 1000)
    predicted[targets == 7] = 8
    predictions = make_predictions(targets.tolist(), predicted.tolist())
    result = make_result(predictions, [f"class {index}, {'a long name ' * 6}" for index in range(1000)])
    noise = Image.fromarray(generator.integers(0, 255, (300, 400, 3), dtype=np.uint8))
    markup = write(tmp_path / "r.html", result, predictions, read_image=lambda index: noise)
    page = parse(markup)
    assert len(markup) < 2_000_000
    assert len(page.tables["Confusion matrix"]) == 21
    assert page.tables["Confusion matrix"][0][-1] == "all other classes"
    assert len(page.tables["Most confused pairs"]) == 26
    assert page.tables["Most confused pairs"][1][0].startswith("class 7,")
    assert len(page.tables["Accuracy of each class"]) == 1001


def test_long_names_are_cut_in_the_matrix(tmp_path: Path) -> None:
    predictions = make_predictions([0, 1], [1, 0])
    page = parse(write(tmp_path / "r.html", make_result(predictions, ["x" * 5000, "y" * 5000]), predictions, log=[]))
    assert max(len(cell) for cell in page.tables["Confusion matrix"][0]) < 30


def test_an_unreadable_picture_leaves_a_note(tmp_path: Path) -> None:
    def refuse(index: int) -> Image.Image:
        raise OSError("truncated")

    predictions = make_predictions([0, 1], [1, 1])
    page = parse(write(tmp_path / "r.html", make_result(predictions, ["a", "b"]), predictions, read_image=refuse))
    assert "picture could not be read" in page.text


def test_same_run_same_bytes(tmp_path: Path) -> None:
    predictions = make_predictions([0, 1], [1, 1])
    result = make_result(predictions, ["a", "b"])
    first, second = (write(tmp_path / name, result, predictions) for name in ("1.html", "2.html"))
    assert first == second
