"""Mistakes in where the head starts from, found before a run folder is made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from probes.sections import RecipeError

if TYPE_CHECKING:
    from finetune.sections import FinetuneRecipe


def check_start(recipe: FinetuneRecipe, classes: list[str]) -> None:
    """Refuse a `head.start` that the named files cannot give.

    Raises:
        RecipeError: a probe of another model, feature or list of classes; a weight file without a head of the classes.
        OSError: no such probe.
    """
    from eva_clip.checkpoints import open_checkpoint
    from finetune.head_start import read_probe

    if recipe.head.start == "probe":
        assert recipe.head.probe is not None
        read_probe(Path(recipe.head.probe), recipe.model.name, classes)
    if recipe.head.start == "checkpoint":
        file = Path(recipe.model.weights)
        count = open_checkpoint(file).num_classes if file.is_file() else None
        if count != len(classes):
            found = "no head" if count is None else f"a head of {count} classes"
            raise RecipeError(
                f"head.start is 'checkpoint' and {file} has {found}; expected one of {len(classes)} classes; "
                "use head.start=fresh for a new one"
            )
