"""The end of a fine-tune: which weights are reported, their predictions, and the files that timm opens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from eva_clip.export import save_for_timm
from finetune.build import build_untrained
from finetune.fit import Fitted, load_selected, weights_of
from finetune.sections import ExpectedSection
from finetune.sharding import is_sharded
from probes.multi_label import PrecisionScore
from probes.results import Expectation, Score

if TYPE_CHECKING:
    from eva_clip.classifier import Classifier
    from finetune.module import FinetuneModule
    from probes.runs import RunFolder


def collect_scores(module: FinetuneModule, samples: int, split: str) -> list[Score]:
    """Scores on `split`, the reported one first: the selected weights', or without a selection split the last ones'.

    Of the last epoch the averaged weights are reported where there are any. The best epochs on the scored split are
    given too, as oracles.
    """
    history = module.history
    prefixes = ["ema_", ""] if module.ema is not None else [""]

    def score(name: str, chosen_by: str, row: dict[str, float], prefix: str) -> Score:
        top1, top5, loss = (row[f"{prefix}{split}_{key}"] for key in ("acc1", "acc5", "loss"))
        return Score(name, split, chosen_by, int(row["epoch"]), top1, top5, loss, samples)

    scores = []
    if module.selected is not None:
        row = next(row for row in history if row["epoch"] == module.selected["epoch"])
        prefix = "ema_" if module.selected["weights"] == "ema" else ""
        scores.append(score("selected", str(module.selection_name), row, prefix))
    for prefix in prefixes:
        kind = prefix.removesuffix("_") or "raw"
        best = max(history, key=lambda row, prefix=prefix: row[f"{prefix}{split}_acc1"])  # type: ignore[misc]
        scores.append(score(f"last_{kind}", "schedule", history[-1], prefix))
        scores.append(score(f"best_{kind}", split, best, prefix))
    return scores


def collect_precisions(module: FinetuneModule, samples: int, split: str) -> list[PrecisionScore]:
    """Mean average precision on `split`, the reported one first, in the order of `collect_scores`."""
    history = module.history
    prefixes = ["ema_", ""] if module.ema is not None else [""]

    def score(name: str, chosen_by: str, row: dict[str, float], prefix: str) -> PrecisionScore:
        precision, loss = (row[f"{prefix}{split}_{key}"] for key in ("mean_ap", "loss"))
        return PrecisionScore(name, split, chosen_by, int(row["epoch"]), precision, loss, samples)

    scores = []
    if module.selected is not None:
        row = next(row for row in history if row["epoch"] == module.selected["epoch"])
        prefix = "ema_" if module.selected["weights"] == "ema" else ""
        scores.append(score("selected", str(module.selection_name), row, prefix))
    for prefix in prefixes:
        kind = prefix.removesuffix("_") or "raw"
        best = max(history, key=lambda row, prefix=prefix: row[f"{prefix}{split}_mean_ap"])  # type: ignore[misc]
        scores.append(score(f"last_{kind}", "schedule", history[-1], prefix))
        scores.append(score(f"best_{kind}", split, best, prefix))
    return scores


def compare_expected(expected: ExpectedSection, scores: list[Score]) -> list[Expectation]:
    """Every figure that a recipe expects, beside the score of that name."""
    measured = {f"{score.name}_top1": score.top1 for score in scores}
    return [
        Expectation(name, value, measured.get(name), expected.tolerance)
        for name, value in vars(expected).items()
        if name.endswith("_top1") and value is not None
    ]


def load_reported(run: RunFolder, fitted: Fitted) -> str:
    """Put the reported weights into the model and write all kinds; returns what the reported ones are.

    `last_raw.safetensors` and, with an average, `last_ema.safetensors` hold the last epoch's tensors as
    `eva_clip.export.save_model` names them, so that each can be another recipe's `model.weights`.
    """
    module = fitted.module
    kinds = ["raw", "ema"] if module.ema is not None else ["raw"]
    states = {kind: weights_of(module, kind) for kind in kinds}
    for kind, state in states.items():
        if run.writes:
            named = {
                name.removeprefix("tower."): tensor for name, tensor in state.items() if not name.startswith("texts.")
            }
            said = {"kind": "classifier", "pool": module.model.pool, "weights": kind, "epoch": "last"}
            save_file(named, run.path / f"last_{kind}.safetensors", {"model": module.model.spec.name, **said})
    if is_sharded(module.model):  # from here on every process has a whole model
        module.model = build_untrained(module.recipe, module.model.num_classes, None)
    if module.selected is not None:
        load_selected(run, module)
        return f"{module.selected['weights']} of epoch {module.selected['epoch']}"
    module.model.load_state_dict(states[kinds[-1]])
    return f"{kinds[-1]} of the last epoch"


@torch.no_grad()
def fold_batch_norm(model: Classifier) -> Classifier:
    """Put a head's BatchNorm (without affine, running statistics) into its linear layer, in place."""
    if isinstance(model.head, torch.nn.Sequential):
        norm, linear = model.head[0], model.head[1]
        assert isinstance(norm, torch.nn.BatchNorm1d)
        assert isinstance(linear, torch.nn.Linear)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        linear.bias.sub_(linear.weight @ (norm.running_mean * scale))
        linear.weight.mul_(scale)
        model.head = linear
    return model


def export(run: RunFolder, model: Classifier) -> None:
    """`model.safetensors` and `config.json`: `timm.create_model("local-dir:RUN", pretrained=True)` opens the folder."""
    if run.writes:
        save_for_timm(fold_batch_norm(model), run.path)
