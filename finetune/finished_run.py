"""A finished fine-tune, opened again: its recipe, data, and weights at the start and at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.sections import FinetuneRecipe
from probes.recipe import load_run_recipe
from probes.resume import describe_changes
from probes.sections import RecipeError
from probes.splits import describe, prepare_splits

if TYPE_CHECKING:
    import torch

    from eva_clip.classifier import Classifier
    from probes.splits import Split


class FinishedRun:
    """A run folder of `python -m finetune`. Torch is imported when weights are asked for.

    Raises:
        RecipeError: it holds no finished fine-tune of images with one class each, or its data have changed since.
    """

    def __init__(self, path: Path) -> None:
        if not all((path / name).is_file() for name in ("recipe.yaml", "result.json", "last_raw.safetensors")):
            raise RecipeError(f"{path} holds no finished fine-tune; expected the run folder of python -m finetune")
        self.path = path
        self.recipe = load_run_recipe(path / "recipe.yaml", FinetuneRecipe)
        self.splits = prepare_splits(self.recipe.data)
        stored = json.loads((path / "data.json").read_text(encoding="utf-8"))
        changes = describe_changes(stored, describe(self.splits))
        if changes:
            raise RecipeError(f"the data are not those that the run in {path} had: {'; '.join(changes)}; restore them")

    def build(self) -> Classifier:
        """The run's classifier, untrained."""
        from finetune.build import build_untrained

        return build_untrained(self.recipe, len(self.splits.classes), None).eval()

    def start_state(self) -> dict[str, torch.Tensor]:
        """The weights that training started from."""
        from finetune.build import build_recipe_classifier

        state = build_recipe_classifier(self.recipe, self.splits)[0].state_dict()
        return {name: tensor for name, tensor in state.items() if not name.startswith("texts.")}

    def end_state(self, weights: str | None = None) -> dict[str, torch.Tensor]:
        """The weights after the last epoch: "raw", "ema", or None for the average where there is one."""
        from safetensors.torch import load_file

        kind = weights or ("ema" if (self.path / "last_ema.safetensors").is_file() else "raw")
        file = self.path / f"last_{kind}.safetensors"
        if not file.is_file():
            raise RecipeError(f"{self.path} has no {kind} weights; the run kept no average")
        return {name if name.startswith("head.") else f"tower.{name}": t for name, t in load_file(file).items()}

    def score(self, model: Classifier, split: Split) -> dict[str, float]:
        """`acc1`, `acc5` (percent) and `loss` of a model on a split of this run's, each image once.

        In the run's precision, as its own epochs were scored, or in fp32 where this machine computes that slowly.

        Raises:
            ValueError: logits are not finite.
        """
        import torch

        from eva_clip.transforms import build_eval_transform
        from probes.data import SplitDataset, SplitLoader, collate
        from probes.finite import check_scores
        from probes.metrics import SplitMeter
        from probes.precision import mixed_precision, usable_precision

        spec, data = model.spec, self.recipe.data
        view = build_eval_transform(spec.vision.image_size, spec.image_mean, spec.image_std)
        dataset = SplitDataset(split, view, self.recipe.run.seed, data.on_corrupt)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        meter, model = SplitMeter(model.num_classes).to(device), model.to(device)
        loader: Any = SplitLoader(dataset, batch_size=64, num_workers=data.workers, collate_fn=collate)
        with torch.no_grad(), mixed_precision(usable_precision(self.recipe.trainer.precision), device):
            for batch in loader:
                if len(batch["target"]):
                    logits = model(batch["image"].to(device))
                    check_scores(logits, batch["index"], split)
                    meter.update(logits, batch["target"].to(device))
        return meter.compute_and_reset()
