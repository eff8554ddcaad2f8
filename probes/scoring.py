"""Score heads on a split, sample by sample, and keep what they predicted."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from probes.results import Predictions, Score

if TYPE_CHECKING:
    from probes.module import LinearProbe
    from probes.splits import Split


@torch.no_grad()
def predict(module: LinearProbe, batches: Iterable[dict[str, Any]], split: Split) -> Predictions:
    """Predictions of the module's present head on every readable sample of a split, each once."""
    module.eval()
    outputs, targets, indices = [], [], []
    for batch in batches:
        if len(batch["target"]):
            moved = {key: batch[key].to(module.device) for key in ("features", "image") if key in batch}
            outputs.append(module(moved).softmax(dim=1).cpu())
            targets.append(batch["target"])
            indices.append(batch["index"])
    probability = torch.cat(outputs)  # [N, C]
    return collect_predictions(probability, torch.cat(targets), torch.cat(indices), split)


def collect_predictions(
    probability: torch.Tensor, target: torch.Tensor, index: torch.Tensor, split: Split
) -> Predictions:
    """Predictions from class probabilities [N, C], class indices [N] and positions in the split [N]."""
    confidence, predicted = probability.max(dim=1)
    keys = split.keys
    return Predictions(
        keys=[keys[position] for position in index.tolist()],
        targets=target.numpy(),
        predicted=predicted.numpy(),
        confidence=confidence.numpy(),
        target_probability=probability[torch.arange(len(target)), target].numpy(),
    )


def collect_scores(module: LinearProbe, samples: int, split: str) -> list[Score]:
    """The run's scores on `split`, the reported one first.

    With a selection split that is the selected epoch's; without one it is the last epoch's, because nothing but the
    scored split itself could have chosen another. The best epoch on the scored split is always given, as an oracle.
    """
    history = module.history
    last = history[-1]
    best = max(history, key=lambda row: row[f"{split}_acc1"])

    def score(name: str, chosen_by: str, row: dict[str, float]) -> Score:
        values = {key: row[f"{split}_{key}"] for key in ("acc1", "acc5", "loss")}
        return Score(name, split, chosen_by, int(row["epoch"]), values["acc1"], values["acc5"], values["loss"], samples)

    scores = [score("last", "schedule", last), score("best", split, best)]
    if module.selected is not None:
        chosen = next(row for row in history if row["epoch"] == module.selected["epoch"])
        scores.insert(0, score("selected", str(module.selection_name), chosen))
    return scores


def predictions_csv(predictions: Predictions, classes: Sequence[str]) -> str:
    """One line a sample: key, target, predicted, confidence."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["key", "target", "predicted", "confidence"])
    columns = (predictions.targets, predictions.predicted, predictions.confidence)
    for key, target, predicted, confidence in zip(predictions.keys, *columns, strict=True):
        writer.writerow([key, classes[target], classes[predicted], f"{confidence:.6f}"])
    return stream.getvalue()
