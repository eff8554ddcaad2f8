"""The end of a fine-tune: which weights are reported, their predictions, and the files that timm opens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from eva_clip.export import save_for_timm
from finetune.build import build_untrained
from finetune.fit import Fitted, load_selected, weights_of
from finetune.sections import ExpectedSection
from finetune.sharding import EveryPass, gather, is_sharded, load_whole
from probes.finite import best_row
from probes.multi_label import PrecisionScore
from probes.processes import join_trainer
from probes.results import Expectation, Score
from probes.trainer import predict_split

if TYPE_CHECKING:
    from eva_clip.classifier import Classifier
    from finetune.module import FinetuneModule
    from probes.runs import RunFolder


Row = dict[str, float]
"""One epoch of the history."""


def scored_epochs(module: FinetuneModule, split: str, metric: str) -> list[tuple[str, str, Row, str]]:
    """Name, what chose, row of the history and prefix of its columns, of every score on `split`; the reported first.

    That is the selected weights', or without a selection split the last ones'; of the last epoch the averaged weights
    are reported where there are any. The best epochs on the scored split by `metric` are given too, as oracles.
    """
    history, found = module.history, []
    if module.selected is not None:
        row = next(row for row in history if row["epoch"] == module.selected["epoch"])
        prefix = "ema_" if module.selected["weights"] == "ema" else ""
        found.append(("selected", str(module.selection_name), row, prefix))
    for prefix in ["ema_", ""] if module.ema is not None else [""]:
        kind = prefix.removesuffix("_") or "raw"
        best = best_row(history, f"{prefix}{split}_{metric}")
        found += [(f"last_{kind}", "schedule", history[-1], prefix), (f"best_{kind}", split, best, prefix)]
    return found


def collect_scores(module: FinetuneModule, samples: int, split: str) -> list[Score]:
    """Accuracy on `split` of `scored_epochs`."""
    scores = []
    for name, chosen_by, row, prefix in scored_epochs(module, split, "acc1"):
        top1, top5, loss = (row[f"{prefix}{split}_{key}"] for key in ("acc1", "acc5", "loss"))
        scores.append(Score(name, split, chosen_by, int(row["epoch"]), top1, top5, loss, samples))
    return scores


def collect_precisions(module: FinetuneModule, samples: int, split: str) -> list[PrecisionScore]:
    """Mean average precision on `split` of `scored_epochs`."""
    scores = []
    for name, chosen_by, row, prefix in scored_epochs(module, split, "mean_ap"):
        precision, loss = (row[f"{prefix}{split}_{key}"] for key in ("mean_ap", "loss"))
        scores.append(PrecisionScore(name, split, chosen_by, int(row["epoch"]), precision, loss, samples))
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
    if module.selected is not None:
        load_selected(run, module)
        return f"{module.selected['weights']} of epoch {module.selected['epoch']}"
    load_whole(module.model, states[kinds[-1]])
    return f"{kinds[-1]} of the last epoch"


def score_reported(fitted: Fitted, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, C] of a split and its images' positions, on the training's devices, each image on one of them."""
    module = fitted.module
    every_pass = is_sharded(module.model)
    model = EveryPass(module.model, module.model.spec.vision.image_size) if every_pass else module.model
    with join_trainer():
        return predict_split(module.trainer, model, fitted.data.loader(name), "image", every_pass=every_pass)


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


def export(run: RunFolder, module: FinetuneModule) -> None:
    """`model.safetensors` and `config.json`: `timm.create_model("local-dir:RUN", pretrained=True)` opens the folder.

    The module's model is used up; all processes must call this together.
    """
    model = module.model
    if is_sharded(model):
        state = gather(model.state_dict())
        model = build_untrained(module.recipe, model.num_classes, None)
        model.load_state_dict(state)
    if not run.writes:
        return
    model.cpu()
    if module.recipe.tune.what == "lora":
        from finetune.lora import merge_lora

        merge_lora(model)
    save_for_timm(fold_batch_norm(model), run.path)
