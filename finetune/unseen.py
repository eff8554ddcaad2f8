"""What chooses between weights, and what scores them, may not have been fitted by any of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from probes.sections import RecipeError
from probes.seen import Seen, read_seen

if TYPE_CHECKING:
    from finetune.finished_run import FinishedRun
    from finetune.sections import FinetuneRecipe
    from probes.splits import Splits

SAME = "with the same data.train, data.holdout and data.holdout_seed"


def check_members(runs: Sequence[FinishedRun]) -> None:
    """Refuse runs that do not share the images that choose, or of which one was trained on those or on test.

    Raises:
        RecipeError: the runs at fault are named.
    """
    held = {run: run.splits.selection for run in runs}
    if len({split.fingerprint() if split is not None else None for split in held.values()}) > 1:
        found = [
            f"{run.path}: " + ("nothing" if split is None else f"{len(split)} images of {split.name}, {_drawn(run)}")
            for run, split in held.items()
        ]
        raise RecipeError(
            "\n  ".join(["the runs choose on different images, so that each has trained on some of another's:", *found])
            + f"\ntrain them again {SAME} (run.seed may differ), or average runs that share them"
        )
    for run in runs:
        seen = seen_by_fine_tune(run.recipe, run.splits).joined(read_seen(run.path / "last_raw.safetensors"))
        for split in (runs[0].splits.selection, runs[0].splits.test):
            count = seen.count(split) if split is not None else 0
            if split is not None and count:
                raise RecipeError(
                    f"{run.path} was trained on {count} of the {len(split)} images of {split.name} in {runs[0].path}, "
                    f"by which the weights are judged; train it again {SAME}"
                )


def seen_by_fine_tune(recipe: FinetuneRecipe, splits: Splits) -> Seen:
    """The images that a fine-tune trains on, and those of the probe that its head starts from."""
    seen = Seen.of([splits.train])
    return seen.joined(read_seen(probe_file(Path(recipe.head.probe)))) if recipe.head.probe is not None else seen


def probe_file(path: Path) -> Path:
    """The head of a probe's run folder, or the file itself."""
    return path / "head.safetensors" if path.is_dir() else path


def _drawn(run: FinishedRun) -> str:
    data, selection = run.recipe.data, run.splits.selection
    assert selection is not None
    drawn = f"data.holdout={data.holdout:g} data.holdout_seed={data.holdout_seed}"
    return f"{data.val if selection.name == 'val' else drawn} (fingerprint {selection.fingerprint()[:12]})"


def check_probe_seen(file: Path, splits: Splits) -> str:
    """Refuse a start from a probe that was fitted on images which judge here; returns what a reader must know.

    Raises:
        RecipeError: it was, or does not say on what it was fitted where there is a split that selects.
    """
    seen = read_seen(file)
    if seen is None and splits.selection is not None:
        raise RecipeError(
            f"head.probe: {file} does not say on which images it was fitted (there is no fitted_on.npz beside it), and "
            f"{splits.selection.name} can choose only by images that it was not; fit it again {SAME}, and with "
            "logistic.refit=false (or ridge.refit=false)"
        )
    if seen is None:
        return "; it does not say on which images it was fitted"
    for split, what in ((splits.selection, "choose epoch and mixture"), (splits.test, "are reported on")):
        count = seen.count(split) if split is not None else 0
        if split is not None and count:
            raise RecipeError(
                f"head.probe: {file} was fitted on {count} of the {len(split)} images of {split.name}, which {what} "
                f"here; fit it again {SAME}, and with logistic.refit=false (or ridge.refit=false)"
            )
    return ""
