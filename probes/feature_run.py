"""One run of a method that fits stored features: chosen on the hold-out, fitted again, scored once. Torch inside."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from probes.draws import Repetition, describe_draws, draw_repetition, with_first_seed
from probes.multi_label_run import check_repetitions, execute_multi_label
from probes.results import Predictions, RunResult, Score, candidates_csv, compare_expected

if TYPE_CHECKING:
    import torch

    from probes.method_sections import MethodRecipe
    from probes.splits import Split, Splits
    from probes.store_table import FeatureTable

Scorer = Callable[["torch.Tensor"], "torch.Tensor"]
"""Features [n, D] to one score a class, [n, C]; higher is more likely."""


@dataclass(frozen=True)
class Samples:
    """Features and targets of a split."""

    name: str
    features: torch.Tensor
    """float32 [N, D]."""
    targets: torch.Tensor
    """int64 [N]; of images that show any number of classes float32 [N, C] of 0 and 1."""
    num_classes: int

    def __len__(self) -> int:
        return len(self.targets)

    def joined(self, other: Samples) -> Samples:
        """These and the other's."""
        import torch

        features = torch.cat([self.features, other.features])
        return Samples(self.name, features, torch.cat([self.targets, other.targets]), self.num_classes)


@dataclass(frozen=True)
class LinearScorer:
    """Scores features @ weight.T + bias."""

    weight: torch.Tensor
    """float32 [C, D]."""
    bias: torch.Tensor
    """float32 [C]."""

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Scores [n, C] of features [n, D]."""
        return features @ self.weight.T + self.bias


class Method(Protocol):
    """A method with one setting to choose."""

    name: str
    """The command's last word."""
    setting: str
    """What is chosen, such as "C"."""
    fixed: float
    """The setting where there is nothing to choose it on."""
    refit: bool
    """Whether the hold-out joins train once the setting is chosen."""

    def path(self, train: Samples) -> Iterator[tuple[float, Scorer]]:
        """Every setting, the simplest model first, with what it gives on train."""

    def fit(self, train: Samples, value: float) -> Scorer:
        """One setting."""


@dataclass(frozen=True)
class Outcome:
    """What one repetition gave."""

    score: Score
    predictions: Predictions
    repetition: Repetition
    scorer: Scorer
    candidates: list[dict[str, float]]
    """Settings with their scores on the selection split."""
    fitted: list[Split]
    """What the scorer was fitted on."""


def execute_method(recipe: MethodRecipe, recipe_path: str, method: Method) -> None:
    """One run, from recipe to report, of one or more repetitions on one extraction.

    Raises:
        RecipeError: the recipe does not fit the data.
    """
    start = time.monotonic()
    from probes.finish import finish_run, reported_split, save_head
    from probes.plan import check_model
    from probes.precision import settle_precision
    from probes.runs import RunFolder
    from probes.seen import note_seen_weights
    from probes.splits import prepare_splits

    check_model(recipe.model)
    splits = prepare_splits(with_first_seed(recipe).data, multi_label=True)
    if splits.train.multi_hot is not None:
        check_repetitions(recipe)
    note_seen_weights(recipe.model.weights, splits)
    reported = reported_split(splits, "" if recipe.few_shot.shots else method.setting, recipe.run.seeds)
    check_choice(recipe, splits, method)
    asked, precision = settle_precision(recipe)
    recipe = with_first_seed(asked)
    repetitions = [draw_repetition(recipe, splits, *item) for item in list_repetitions(recipe)]
    run = RunFolder.create(asked, recipe_path)
    run.record_data(describe_draws(splits, repetitions))
    print(f"run folder: {run.path}", *splits.notes, sep="\nnote: ", flush=True)
    if splits.train.multi_hot is not None:
        execute_multi_label(recipe, recipe_path, method, splits, reported, run, precision)
        return
    from probes.extraction import load_tables

    tables = load_tables(recipe, splits)
    first, rows = repeat(method, repetitions, tables)
    facts = tables["train"].encoder
    run.write_text("candidates.csv", candidates_csv(first.candidates))
    if isinstance(first.scorer, LinearScorer):
        state = {"0.weight": first.scorer.weight, "0.bias": first.scorer.bias}
        save_head(run, recipe, facts, "linear", state, splits.classes, first.fitted)
    result = RunResult(
        title=f"{Path(recipe_path).resolve().parent.name}/{Path(recipe_path).stem}",
        method=f"probes.{method.name}",
        classes=splits.classes,
        split_sizes=first.repetition.sizes,
        scores=[first.score],
        repeats=rows if len(rows) > 1 else [],
        expectations=compare_expected(recipe.expected, [first.score]),
        notes=[*splits.notes, *describe_repetitions(repetitions), *describe_skipped(tables)],
        facts={
            "encoder": recipe.model.name,
            "weights": facts.loaded,
            "encoder sha256": facts.sha256,
            "features": f"{recipe.features.pool}, {facts.feature_dim}-d, evaluation view",
            "image size": f"{facts.image_size} px",
            "chosen": first.score.setting,
            "precision": precision,
            "duration": f"{time.monotonic() - start:.0f} s",
        },
    )
    finish_run(run, recipe, result, first.predictions, first.repetition.reported)


def repeat(
    method: Method, repetitions: Sequence[Repetition], tables: Mapping[str, FeatureTable]
) -> tuple[Outcome, list[dict[str, Any]]]:
    """The first repetition's outcome, and a row of each."""
    first: Outcome | None = None
    rows: list[dict[str, Any]] = []
    for item in repetitions:
        outcome = fit_once(method, item, tables)
        first = first or outcome
        top1 = outcome.score.top1
        rows.append({**({"shots": item.shots} if item.shots else {}), "seed": item.seed, "top1": top1})
        rows[-1] |= {method.setting: float(outcome.score.setting.rpartition(" ")[2])}
        if len(repetitions) > 1:
            of = f"{item.shots} shots, " if item.shots else ""
            print(f"{of}seed {item.seed}: top-1 {top1:.2f}, {outcome.score.setting}", flush=True)
    assert first is not None
    return first, rows


def check_choice(recipe: MethodRecipe, splits: Splits, method: Method) -> None:
    """Note when there is nothing to choose by."""
    if splits.selection is None and not recipe.few_shot.shots:
        splits.notes.append(
            f"Nothing was held out to choose {method.setting} on: it is {method.fixed:g}, as the recipe fixes it; "
            "data.holdout=0.2 chooses it."
        )


def list_repetitions(recipe: MethodRecipe) -> list[tuple[int, int]]:
    """(shots, seed) of every repetition, the reported one first: most shots, first seed; 0 shots are all of train."""
    seeds = recipe.run.seeds or [recipe.run.seed]
    shots = sorted(recipe.few_shot.shots, reverse=True) or [0]
    return [(number, seed) for number in shots for seed in seeds]


def describe_repetitions(repetitions: Sequence[Repetition]) -> list[str]:
    """What a reader must know of the reported repetition."""
    first = repetitions[0]
    if len(repetitions) == 1 and not first.shots:
        return []
    of = f"{first.shots} image(s) a class and " if first.shots else ""
    return [f"The reported score and the pictures are of the repetition with {of}seed {first.seed}."]


@dataclass(frozen=True)
class Choice:
    """A method with its setting chosen."""

    scorer: Scorer
    value: float
    chosen_by: str
    """The split that chose, or "schedule": the recipe fixes the setting."""
    candidates: list[dict[str, float]]
    fitted: list[Split]
    """What the scorer was fitted on."""


def choose_and_fit(method: Method, drawn: Splits, tables: Mapping[str, FeatureTable], *, refit: bool) -> Choice:
    """Choose on the selection split, and fit again.

    Args:
        method: the method.
        drawn: train and selection; test is not looked at.
        tables: features of at least these splits' sources, by split name.
        refit: whether a hold-out joins train for the last fit.
    """
    from probes.finite import check_scores

    classes = len(drawn.classes)
    train = _samples(table_of(tables, drawn.train), classes)
    candidates: list[dict[str, float]] = []
    value, chosen_by, fitted = method.fixed, "schedule", [drawn.train]
    selection = drawn.selection
    if selection is not None:
        table = table_of(tables, selection)
        held = _samples(table, classes)
        for tried, scorer in method.path(train):
            logits = scorer(held.features)
            check_scores(logits, table.index, selection)
            candidates.append({method.setting: tried, **_measure(logits, held.targets)})
        best = max(candidates, key=lambda row: row["acc1"])  # of equals the first: the simplest model
        value, chosen_by = best[method.setting], selection.name
        if refit:
            train, fitted = train.joined(held), [drawn.train, selection]
    return Choice(method.fit(train, value), value, chosen_by, candidates, fitted)


def fit_once(method: Method, repetition: Repetition, tables: Mapping[str, FeatureTable]) -> Outcome:
    """Choose on the selection split, fit again, and score the reported split once."""
    from probes.zeroshot import score_logits

    reported = repetition.reported
    choice = choose_and_fit(method, repetition.drawn, tables, refit=method.refit and repetition.may_refit)
    table = table_of(tables, reported)
    predictions, score = score_logits(choice.scorer(table.features.float()), table.index, reported)
    name = "selected" if choice.candidates else "last"
    setting = f"{method.setting} = {choice.value:.6g}"
    chosen = dataclasses.replace(score, name=name, chosen_by=choice.chosen_by, setting=setting)
    return Outcome(chosen, predictions, repetition, choice.scorer, choice.candidates, choice.fitted)


def table_of(tables: Mapping[str, FeatureTable], split: Split) -> FeatureTable:
    """The features of any draw from the images that `tables` are of."""
    return tables.get(split.name, tables["train"]).whole.take(split)  # a hold-out is of train's source


def _samples(table: FeatureTable, num_classes: int) -> Samples:
    return Samples(table.name, table.features.float(), table.targets, num_classes)


def _measure(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    import torch

    right = (logits.argmax(dim=1) == targets).float().mean()
    return {"acc1": 100 * float(right), "loss": float(torch.nn.functional.cross_entropy(logits, targets))}


def plan_method(recipe: MethodRecipe, method: Method, values: Sequence[float]) -> dict[str, Any]:
    """What `--plan` prints: sizes, and what will be tried."""
    from eva_clip.encoder import FeatureDefinition
    from eva_clip.specs import get_model_spec
    from probes.plan import check_model, measure_data

    check_model(recipe.model)
    size = measure_data(recipe.data)
    spec, features = get_model_spec(recipe.model.name), recipe.features
    definition = FeatureDefinition(features.pool, features.projected, features.l2norm)
    return {
        "train_size": size.train,
        "num_classes": size.classes,
        "feature_dim": definition.feature_dim(spec),
        "image_size": recipe.model.image_size or spec.vision.image_size,
        "repetitions": [{"shots": shots or None, "seed": seed} for shots, seed in list_repetitions(recipe)],
        method.setting: list(values),
    }


def describe_skipped(tables: Mapping[str, FeatureTable]) -> list[str]:
    """A note for every split of which images could not be read."""
    return [
        f"{len(table.skipped)} unreadable image(s) of {name} were left out, the first {min(table.skipped)}."
        for name, table in tables.items()
        if table.skipped
    ]
