"""Which classes an evaluated run may answer: all of its own, or those that the images have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from probes.splits import Split


@dataclass(frozen=True)
class Answers:
    """Logits, the classes that they are of, and the split with targets among these."""

    logits: torch.Tensor
    """float32 [N, C]."""
    classes: list[str]
    """C names."""
    split: Split
    notes: list[str]
    """What a reader must know of the choice; empty where every class occurs."""


def take_answers(logits: torch.Tensor, index: torch.Tensor, classes: list[str], split: Split, kind: str) -> Answers:
    """Keep the answers of one kind, and note what the other would score.

    Args:
        logits: of a run, float32 [N, C].
        index: positions in the split of the N images, int64.
        classes: the run's.
        split: targets among these, one class an image.
        kind: "run" or "test", see `EvaluateDataSection.classes_of`.
    """
    occurring, targets = np.unique(split.targets, return_inverse=True)
    if len(occurring) == len(classes):
        return Answers(logits, classes, split, [])
    kept = torch.from_numpy(occurring)
    true = torch.from_numpy(split.targets)[index]
    among_all = _percent(logits.argmax(dim=1), true)
    among_kept = _percent(kept[logits[:, kept].argmax(dim=1)], true)
    every, few = f"all {len(classes)} classes of the run", f"the {len(occurring)} that data.test has"
    if kind == "run":
        note = (
            f"Answers are among {every} (data.classes_of=run), and an absent one is wrong; among {few} "
            f"(data.classes_of=test, as published for subsets of ImageNet) top-1 is {among_kept:.2f}."
        )
        return Answers(logits, classes, split, [note])
    note = (
        f"Answers are only among {few} (data.classes_of=test), which the model is not told in use; among {every} "
        f"(data.classes_of=run) top-1 is {among_all:.2f}."
    )
    few_targets = targets.reshape(-1).astype(np.int64)
    only = Split(split.name, split.source, split.indices, few_targets)
    return Answers(logits[:, kept], [classes[position] for position in occurring], only, [note])


def _percent(answers: torch.Tensor, targets: torch.Tensor) -> float:
    return 100 * float((answers == targets).double().mean())
