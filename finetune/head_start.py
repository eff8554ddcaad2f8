"""Classifiers that a fine-tune starts from: a trained probe, the classes' texts, or a probe fitted first (LP-FT)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from finetune.contrastive import ClassTexts, text_head
from finetune.unseen import check_probe_seen, probe_file
from probes.sections import RecipeError, StoredFeaturesSection

if TYPE_CHECKING:
    from finetune.sections import FinetuneRecipe
    from probes.splits import Splits

BN_EPS = 1e-6
"""Of the probe's BatchNorm."""
INNER_HOLDOUT = 0.15
"""Share of train that chooses the probe's C where the recipe has no selection split."""
NORM_IMAGES = 64
"""Training images that the usual length of an embedding is measured on."""


@dataclasses.dataclass(frozen=True)
class StartHead:
    """A linear classifier on the final-norm class token."""

    weight: torch.Tensor
    """float32 [C, D]."""
    bias: torch.Tensor
    """float32 [C]."""
    note: str
    """Where it comes from, in words."""


def build_start_head(recipe: FinetuneRecipe, splits: Splits) -> StartHead:
    """The classifier of `head.start` "probe", "zero_shot" or "linear_probe".

    Raises:
        RecipeError: the probe is of another model, feature or list of classes.
        NoTextTowerError: "zero_shot" without a text tower.
        OSError: no such probe.
    """
    if recipe.head.start == "probe":
        assert recipe.head.probe is not None
        return read_probe(Path(recipe.head.probe), recipe.model.name, splits)
    if recipe.head.start == "zero_shot":
        return from_texts(recipe, splits)
    return fit_probe_first(recipe, splits)


def read_probe(path: Path, model: str, splits: Splits) -> StartHead:
    """The head of a probe's run folder, or its `head.safetensors`; classes in the data's order, BatchNorm folded.

    Raises:
        RecipeError: it does not fit, or was fitted on images that judge here; what was found is named.
    """
    file, probe = read_probe_facts(path)
    _check_probe(probe, file, model, splits.classes)
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    unsaid = check_probe_seen(file, splits)
    weight, bias = fold(tensors)
    order = [probe["classes"].index(name) for name in splits.classes]
    return StartHead(weight[order], bias[order], f"the head starts from the probe {file}{unsaid}")


def read_probe_facts(path: Path) -> tuple[Path, dict[str, Any]]:
    """The head's file of a probe's run folder, or that file itself, and its metadata.

    Raises:
        RecipeError: there is none.
    """
    file = probe_file(path)
    if not file.is_file():
        raise RecipeError(f"head.probe: no head at {file}; expected the run folder of a probe, or its head.safetensors")
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata() or {}
    if "probe" not in metadata:
        raise RecipeError(f"head.probe: {file} is no head of a probe; expected a head.safetensors that probes wrote")
    return file, json.loads(metadata["probe"])


def fold(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a stored head; a BatchNorm without affine in front goes into both."""
    last = "1" if "1.weight" in tensors else "0"
    weight, bias = tensors[f"{last}.weight"].double(), tensors[f"{last}.bias"].double()
    if "0.running_var" in tensors:
        scale = (tensors["0.running_var"].double() + BN_EPS).rsqrt()
        weight = weight * scale
        bias = bias - weight @ tensors["0.running_mean"].double()
    return weight.float(), bias.float()


def _check_probe(probe: dict[str, Any], file: Path, model: str, classes: list[str]) -> None:
    from eva_clip.specs import get_model_spec

    expected = {"pool": "cls", "projected": False, "l2norm": False}
    problems = [
        f"features.{name} is {probe['features'][name]!r}; expected {value!r}, which is what the classifier sees"
        for name, value in expected.items()
        if probe["features"][name] != value
    ]
    if get_model_spec(probe["model"]).name != get_model_spec(model).name:
        problems.append(f"model is {probe['model']}; expected {model}")
    if set(probe["classes"]) != set(classes):
        missing, more = sorted(set(classes) - set(probe["classes"])), sorted(set(probe["classes"]) - set(classes))
        problems.append(f"classes differ: the probe lacks {missing[:5]} and has {more[:5]} more")
    if problems:
        raise RecipeError("\n".join([f"head.probe: {file} does not fit", *problems]))


@torch.no_grad()
def from_texts(recipe: FinetuneRecipe, splits: Splits) -> StartHead:
    """Zero-shot as a linear layer on the class token: texts times the projection.

    Zero-shot divides by the length of each image's embedding, which no linear layer can. It scales all logits of an
    image alike, so predictions are those of zero-shot; for its confidence the mean length on some training images
    stands in.
    """
    from probes.embedding import build_towers
    from probes.heads import build_zero_shot_weights
    from probes.prompts import readable

    towers = build_towers(recipe.model, "fp32").cpu()
    texts = build_zero_shot_weights(towers, [readable(name) for name in splits.classes], [recipe.head.prompt])
    length = mean_length(recipe, splits, towers)
    weight, bias = text_head(texts, towers.visual.head, towers.logit_scale.exp() / length)
    return StartHead(weight, bias, f"the head starts from the classes' texts (mean embedding length {length:.3g})")


def build_class_texts(recipe: FinetuneRecipe, splits: Splits) -> ClassTexts:
    """Both towers' text side for a contrastive fine-tune, in fp32 on the CPU.

    Raises:
        NoTextTowerError: weights without a text tower.
    """
    from probes.embedding import build_towers
    from probes.prompts import readable

    towers = build_towers(recipe.model, "fp32").cpu()
    texts = [recipe.head.prompt.format(readable(name)) for name in splits.classes]
    return ClassTexts(towers, texts, mean_length(recipe, splits, towers))


@torch.no_grad()
def mean_length(recipe: FinetuneRecipe, splits: Splits, towers: Any) -> float:
    """Mean length of the embeddings of some training images."""
    from eva_clip.transforms import build_eval_transform
    from probes.data import SplitDataset, collate

    spec = towers.spec
    view = build_eval_transform(spec.vision.image_size, spec.image_mean, spec.image_std)
    dataset = SplitDataset(splits.train, view, recipe.run.seed, recipe.data.on_corrupt)
    some = range(0, len(dataset), max(1, len(dataset) // NORM_IMAGES))
    images = collate([dataset[position] for position in some])["image"]
    return float(towers.encode_image(images).norm(dim=1).mean())


def fit_probe_first(recipe: FinetuneRecipe, splits: Splits) -> StartHead:
    """Logistic regression on the frozen encoder's features.

    C is chosen on the selection split, which the fit then leaves out; without one on a part of train, and the fit is on
    all of train.
    """
    from probes.draws import carve
    from probes.extraction import load_tables
    from probes.feature_run import LinearScorer, choose_and_fit
    from probes.logistic import Logistic
    from probes.method_sections import LogisticRecipe, LogisticSection
    from probes.zeroshot_sections import ComputeSection

    frozen = LogisticRecipe(
        run=recipe.run,
        model=recipe.model,
        features=StoredFeaturesSection(pool="cls"),
        data=recipe.data,
        compute=ComputeSection(precision=recipe.trainer.precision),
    )
    without_test = dataclasses.replace(splits, test=None)
    tables, alone = load_tables(frozen, without_test), splits.selection is None
    drawn = carve(without_test, splits.train, INNER_HOLDOUT, recipe.data.holdout_seed) if alone else without_test
    choice = choose_and_fit(Logistic(LogisticSection()), drawn, tables, refit=alone)
    assert isinstance(choice.scorer, LinearScorer)
    note = f"the head starts from a probe fitted first (C = {choice.value:.3g}, by {choice.chosen_by})"
    return StartHead(choice.scorer.weight, choice.scorer.bias, note)
