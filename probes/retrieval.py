"""`python -m probes.retrieval RECIPE`: images against their captions, both ways, without training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from probes.cli import run_command
from probes.zeroshot_sections import RetrievalRecipe


def plan(recipe: RetrievalRecipe) -> dict[str, Any]:
    """What `--plan` prints: numbers of images and captions."""
    split, captions = _open(recipe)
    return {"model": recipe.model.name, "images": len(split), "captions": len(captions), "batch": recipe.compute.batch}


def execute(recipe: RetrievalRecipe, recipe_path: str) -> None:
    """One run, from recipe to `result.json`."""
    from probes.runs import RunFolder

    split, captions = _open(recipe)
    run = RunFolder.create(recipe, recipe_path)
    print(f"run folder: {run.path}", flush=True)

    from probes.embedding import build_towers, embed_images, embed_texts, evaluation_loader
    from probes.ranking import recall_at_k

    model = build_towers(recipe.model, recipe.compute.precision)
    images, index = embed_images(model, evaluation_loader(model, split, recipe.data, recipe.compute.batch), "test")
    texts = embed_texts(model, [captions[int(position)] for position in index], recipe.compute.batch)
    ways = {
        "text to image": recall_at_k(texts, index, images, index),
        "image to text": recall_at_k(images, index, texts, index),
    }
    measured = {f"{way.replace(' ', '_')}_r{k}": value for way, recalls in ways.items() for k, value in recalls.items()}
    expectations = recipe.expected.compare(recipe.model.name, measured)
    run.write_json(
        "result.json",
        {
            "images": len(images),
            "texts": len(texts),
            "skipped": len(split) - len(images),
            "recall": {way: {f"R@{k}": value for k, value in recalls.items()} for way, recalls in ways.items()},
            "expectations": [{**vars(item), "verdict": item.verdict} for item in expectations],
        },
    )
    print(f"\n{len(images)} images, {len(texts)} texts" + "".join(f"{f'R@{k}':>9}" for k in ways["text to image"]))
    if len(images) < len(split):
        print(f"{len(split) - len(images)} unreadable image(s) were left out")
    for way, recalls in ways.items():
        print(f"{way:<28}" + "".join(f"{value:9.2f}" for value in recalls.values()))
    for item in expectations:
        print(f"expected {item.name} {item.expected:.2f}, measured {item.measured:.2f}: {item.verdict}")


def _open(recipe: RetrievalRecipe) -> tuple[Any, list[str]]:
    """The test split and the caption of each of its images.

    Raises:
        RecipeError: the source has no captions, or some are missing (the images are named).
    """
    from probes.sections import RecipeError
    from probes.splits import open_evaluation_split

    split = open_evaluation_split(recipe.data).test
    captions = [split.source.caption(index) for index in range(len(split))]
    missing = [key for key, caption in zip(split.keys, captions, strict=True) if not caption]
    if missing:
        raise RecipeError(
            f"{len(missing)} image(s) have no caption, the first {missing[0]}; expected a .txt, or `caption` in .json, "
            "beside each image of a tar shard"
        )
    return split, [caption or "" for caption in captions]


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
