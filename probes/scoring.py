"""Score heads on a split, sample by sample, and keep what they predicted."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from probes.finite import best_row, check_scores
from probes.multi_label import LabelScores
from probes.precision import mixed_precision
from probes.processes import gather_rows
from probes.results import Predictions, Score

if TYPE_CHECKING:
    from probes.module import LinearProbe
    from probes.splits import Split


@torch.no_grad()
def predict_logits(
    model: torch.nn.Module,
    batches: Iterable[dict[str, Any]],
    device: torch.device,
    entry: str | None = None,
    precision: str | None = None,
    *,
    every_pass: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 [N, C] of every readable sample, each once, and their positions in the split, int64 [N].

    Under `join_trainer` the batches are this process's, as `share_batches` deals them, and the rows come from all.
    Positions ascend.

    Args:
        model: is put into evaluation mode.
        batches: of one split.
        device: where the model is.
        entry: what of a batch the model takes, such as "image"; None gives it the batch.
        precision: that fp32 weights compute in, as they do in training; None leaves it to the context around.
        every_pass: the model takes empty batches too, because the processes must run it equally often.
    """
    model.eval()
    rows, index = [torch.empty(0)], [torch.empty(0, dtype=torch.int64)]
    with mixed_precision(precision, device) if precision else contextlib.nullcontext():
        for batch in batches:
            if len(batch["target"]) or every_pass:
                moved: dict[str, torch.Tensor] = {k: batch[k].to(device) for k in ("features", "image") if k in batch}
                rows.append(model(moved if entry is None else moved[entry]).float().cpu())
                index.append(batch["index"])
    return gather_rows(torch.cat(rows[1:] or rows), torch.cat(index))


def label_scores(logits: torch.Tensor, index: torch.Tensor, split: Split, *, log_odds: bool = True) -> LabelScores:
    """Scores [N, C] of the images at positions `index` [N] of a split with `multi_hot`, beside what they show.

    Raises:
        ValueError: some are not finite.
    """
    assert split.multi_hot is not None
    check_scores(logits, index, split)
    keys, positions = split.keys, index.tolist()
    return LabelScores([keys[i] for i in positions], logits.numpy(), split.multi_hot[positions], log_odds)


def predict(logits: torch.Tensor, index: torch.Tensor, split: Split) -> Predictions:
    """Predictions from logits [N, C] of the samples at positions `index` [N] of a split.

    Raises:
        ValueError: some are not finite.
    """
    check_scores(logits, index, split)
    return collect_predictions(logits.softmax(dim=1), torch.from_numpy(split.targets)[index], index, split)


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
    best = best_row(history, f"{split}_acc1")

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
