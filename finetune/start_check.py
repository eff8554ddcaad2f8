"""Mistakes in where the head starts from, found before a run folder is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from probes.sections import RecipeError, StoredFeaturesSection

if TYPE_CHECKING:
    from finetune.sections import FinetuneRecipe
    from probes.splits import Splits


def check_start(recipe: FinetuneRecipe, splits: Splits) -> None:
    """Refuse a `head.start` that the named files cannot give.

    Raises:
        RecipeError: a probe of another model, other weights, feature or list of classes, or one that was fitted on
            images which judge here; a weight file without a head of the classes.
        OSError: no such probe.
    """
    from eva_clip.checkpoints import open_checkpoint
    from finetune.head_start import read_probe

    if recipe.head.start in ("probe", "zero_shot", "linear_probe") and recipe.model.weights == "random":
        raise RecipeError(
            f"head.start is {recipe.head.start!r} with model.weights 'random', which are drawn anew; such a head fits "
            "the weights that it was made for: name these, or use head.start=fresh"
        )
    if recipe.head.start == "probe":
        assert recipe.head.probe is not None
        read_probe(Path(recipe.head.probe), recipe.model.name, splits)
        check_encoder(recipe)
    if recipe.head.start == "checkpoint":
        file = Path(recipe.model.weights)
        count = open_checkpoint(file).num_classes if file.is_file() else None
        if count != len(splits.classes):
            found = "no head" if count is None else f"a head of {count} classes"
            raise RecipeError(
                f"head.start is 'checkpoint' and {file} has {found}; expected one of {len(splits.classes)} classes; "
                "use head.start=fresh for a new one"
            )


def check_encoder(recipe: FinetuneRecipe) -> None:
    """Refuse a probe of other encoder weights than the recipe's, by their hash at the probe's resolution and precision.

    Raises:
        RecipeError: the hashes differ.
        ValueError: the weights do not fit the model.
    """
    from eva_clip.encoder import FeatureDefinition
    from finetune.head_start import read_probe_facts
    from probes.encoder_identity import EncoderSource

    assert recipe.head.probe is not None
    file, probe = read_probe_facts(Path(recipe.head.probe))
    model = replace(recipe.model, image_size=probe["image_size"])
    cache = Path(StoredFeaturesSection().cache)
    found = []
    for precision in ("fp32", "bf16", "fp16"):  # the hash is of the weights as the probe's encoder held them
        found.append(EncoderSource(model, precision, FeatureDefinition("cls"), cache=cache).sha256)
        if found[-1] == probe["encoder_sha256"]:
            return
    raise RecipeError(
        f"head.probe: {file} was fitted on features of an encoder with sha256 {probe['encoder_sha256'][:12]}…; "
        f"model.weights={recipe.model.weights} at {probe['image_size']} px has "
        f"{', '.join(f'{sha256[:12]}…' for sha256 in found)} (fp32, bf16, fp16): name the weights of the probe (and "
        "its model.pos_embed), or fit a probe on these"
    )
