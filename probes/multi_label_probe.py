"""A linear probe on images of several classes: what it cannot have, and its scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probes.finite import best_row
from probes.multi_label import PrecisionScore
from probes.sections import RecipeError

if TYPE_CHECKING:
    from probes.module import LinearProbe
    from probes.sections import Recipe


def check_multi_label_probe(recipe: Recipe) -> None:
    """Refuse what is about one class an image.

    Raises:
        RecipeError: seeds that draw by class, or a head of class texts, whose logits are no odds of a class.
    """
    if recipe.run.seeds:
        raise RecipeError("data.labels is 'multi' with run.seeds, which repeat draws by class; leave run.seeds out")
    if recipe.head.start == "zero_shot":
        raise RecipeError(
            "data.labels is 'multi' with head.start 'zero_shot', whose logits only rank classes of one image; use "
            "head.start=fresh"
        )


def collect_precisions(module: LinearProbe, samples: int, split: str) -> list[PrecisionScore]:
    """The run's scores on `split`, in the order of `probes.scoring.collect_scores`."""
    history = module.history

    def score(name: str, chosen_by: str, row: dict[str, float]) -> PrecisionScore:
        precision, loss = row[f"{split}_mean_ap"], row[f"{split}_loss"]
        return PrecisionScore(name, split, chosen_by, int(row["epoch"]), precision, loss, samples)

    best = best_row(history, f"{split}_mean_ap")
    scores = [score("last", "schedule", history[-1]), score("best", split, best)]
    if module.selected is not None:
        chosen = next(row for row in history if row["epoch"] == module.selected["epoch"])
        scores.insert(0, score("selected", str(module.selection_name), chosen))
    return scores
