"""`python -m probes.retrieval RECIPE`: images against their captions, both ways, without training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from probes.cli import run_command
from probes.retrieval_sections import RetrievalRecipe

if TYPE_CHECKING:
    from eva_clip.models import EvaCLIP
    from probes.captions import CaptionedSplit
    from probes.runs import RunFolder


def plan(recipe: RetrievalRecipe) -> dict[str, Any]:
    """What `--plan` prints: numbers of images and captions."""
    from probes.captions import open_captioned_split

    captioned = open_captioned_split(recipe.data, recipe.captions)
    return {
        "model": recipe.model.name,
        "images": len(captioned.split),
        "captions": len(captioned.texts),
        "batch": recipe.compute.batch,
    }


def execute(recipe: RetrievalRecipe, recipe_path: str, towers: EvaCLIP | None = None) -> None:
    """One run, from recipe to `result.json`, on all processes that torchrun started; `towers` are built if None."""
    from probes.captions import open_captioned_split
    from probes.processes import join_processes

    captioned = open_captioned_split(recipe.data, recipe.captions)
    with join_processes():
        _run(recipe, recipe_path, captioned, towers)


def _run(recipe: RetrievalRecipe, recipe_path: str, captioned: CaptionedSplit, towers: EvaCLIP | None) -> None:
    from probes.precision import settle_precision
    from probes.runs import RunFolder

    recipe, precision = settle_precision(recipe)
    run = RunFolder.create(recipe, recipe_path)
    run.record_data(captioned.describe())
    print(f"run folder: {run.path}", flush=True)

    import torch

    from probes.captions import tokenize_captions
    from probes.embedding import build_towers, embed_images, embed_tokens, evaluation_loader
    from probes.ranking import rank_first_match, recall_of_ranks

    model = towers or build_towers(recipe.model, recipe.compute.precision)
    tokens = tokenize_captions(captioned, model.spec.text.context_length, recipe.captions.truncate)
    split, batch = captioned.split, recipe.compute.batch
    images, index = embed_images(model, evaluation_loader(model, split, recipe.data, batch), "test")
    owner = torch.tensor(captioned.owner)
    readable = torch.isin(owner, index)  # captions of unreadable images have nothing to find
    texts, owner = embed_tokens(model, tokens[readable], batch), owner[readable]
    ranks = {
        "text to image": rank_first_match(texts, owner, images, index),
        "image to text": rank_first_match(images, index, texts, owner),
    }
    recalls = {way: recall_of_ranks(found) for way, found in ranks.items()}
    _report(run, recipe, recalls, captioned, len(images), len(texts), precision)


def _report(
    run: RunFolder,
    recipe: RetrievalRecipe,
    recalls: dict[str, dict[int, float]],
    captioned: CaptionedSplit,
    images: int,
    texts: int,
    precision: str,
) -> None:
    """Write `result.json` and print the table."""
    measured = {f"{way.replace(' ', '_')}_r{k}": value for way, found in recalls.items() for k, value in found.items()}
    expectations = recipe.expected.compare(recipe.model.name, measured)
    skipped = len(captioned.split) - images
    run.write_json(
        "result.json",
        {
            "images": images,
            "texts": texts,
            "skipped": skipped,
            "precision": precision,
            "measured": measured,
            "expectations": [{**vars(item), "verdict": item.verdict} for item in expectations],
        },
    )
    print(f"\n{images} images, {texts} texts" + "".join(f"{f'R@{k}':>9}" for k in recalls["text to image"]))
    if skipped:
        print(f"{skipped} unreadable image(s) were left out")
    for way, found in recalls.items():
        print(f"{way:<28}" + "".join(f"{value:9.2f}" for value in found.values()))
    for item in expectations:
        print(f"expected {item.name} {item.expected:.2f}, measured {item.measured:.2f}: {item.verdict}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(
        "python -m probes.retrieval",
        "Retrieve images by their captions and captions by their images (R@1, R@5, R@10).",
        schema=RetrievalRecipe,
        plan=plan,
        execute=execute,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
