"""What a resumed run takes over: the settled micro-batch, and its place in the epoch, which is counted in images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.plan import settle_batch
from finetune.sections import FinetuneRecipe
from probes.launch import is_first_process
from probes.sections import RecipeError

if TYPE_CHECKING:
    from finetune.memory import Memory, Room
    from probes.runs import RunFolder

SETTLED = "settled.json"
"""In a run folder: `micro_batch` and `checkpointing` as the planner settled them when the run was started."""


def settle_recipe(
    recipe: FinetuneRecipe, num_classes: int, room: Room | None
) -> tuple[FinetuneRecipe, Memory, list[str]]:
    """The recipe with micro-batch and recomputation settled, its memory, and what a reader must know.

    A run that goes on keeps those that it was started with, and with them its random draws, as long as the device
    holds them; the processes of a run follow its first.

    Raises:
        RecipeError: nothing fits.
        ValueError: see `settle_batch`.
    """
    file = Path(recipe.run.dir or "") / SETTLED
    started: dict[str, Any] = {}
    if recipe.run.dir and (recipe.run.on_existing == "resume" or not is_first_process()) and file.is_file():
        started = json.loads(file.read_text(encoding="utf-8"))
    open_keys = {key: value for key, value in started.items() if getattr(recipe.trainer, key) is None}
    try:
        return *settle_batch(replace(recipe, trainer=replace(recipe.trainer, **open_keys)), num_classes, room), []
    except RecipeError:
        if not open_keys:
            raise
    planned, memory = settle_batch(recipe, num_classes, room)
    note = (
        f"the run was started with micro-batches of {started['micro_batch']}, which this device does not hold: it goes "
        f"on with {planned.trainer.micro_batch}, at the same image; dropped paths and mixing are drawn differently"
    )
    return planned, memory, [note]


def write_settled(run: RunFolder, planned: FinetuneRecipe) -> None:
    """Keep what was settled when the run was started."""
    if not (run.path / SETTLED).is_file():
        trainer = planned.trainer
        run.write_json(SETTLED, {"micro_batch": trainer.micro_batch, "checkpointing": trainer.checkpointing})


def convert_position(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Let the micro-batches that Lightning counts in a checkpoint stand for the same images in another size, in place.

    Args:
        checkpoint: Lightning's, saved after a whole optimizer step, with `accumulate` of then in its "finetune".
        accumulate: micro-batches of a step now.
    """
    before = checkpoint["finetune"]["accumulate"]
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    steps, rest = divmod(progress["current"]["ready"], before)
    assert rest == 0, "state is only saved between optimizer steps"
    for counts in (progress["current"], progress["total"]):
        for key in counts:
            counts[key] += steps * (accumulate - before)
