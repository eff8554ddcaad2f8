"""Images that show any number of classes: their labels, and what of a hold-out follows from them. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from probes.section_base import RecipeError
from probes.source_contract import ImageSource, some

SEPARATOR = "|"
"""Stands between the labels of one image in a CSV: `cat|dog`; an image of no class has an empty label."""


def label_sets(source: ImageSource) -> list[list[str]]:
    """The labels of each sample of a source that is read with `data.labels=multi`, N lists without repetitions.

    A library's multi-hot vectors are read by its class names; a library's single label is never taken apart.
    """
    if source.multi_hot is not None and source.classes is not None:
        return [[source.classes[index] for index in np.flatnonzero(row)] for row in source.multi_hot]
    if source.classes is not None:
        return [[label] for label in source.labels]
    parts = ([part.strip() for part in label.split(SEPARATOR)] for label in source.labels)
    return [list(dict.fromkeys(part for part in found if part)) for found in parts]


def build_multi_hot(labels: Sequence[Sequence[str]], classes: Sequence[str]) -> NDArray[np.bool_]:
    """bool [N, C]: which of `classes` each of N samples shows; every label is one of them."""
    position = {label: index for index, label in enumerate(classes)}
    shown = np.zeros((len(labels), len(classes)), dtype=np.bool_)
    for row, found in zip(shown, labels, strict=True):
        row[[position[label] for label in found]] = True
    return shown


def rarest_classes(shown: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of each sample the class with the fewest samples among those that it shows; C for a sample of no class.

    Args:
        shown: [N, C].

    Returns:
        int64 [N], the strata of a hold-out: a rare class that would follow a common one by chance gets its share.
    """
    counts = np.where(shown, shown.sum(axis=0), len(shown) + 1)  # [N, C]
    rarest: NDArray[np.int64] = np.where(shown.any(axis=1), counts.argmin(axis=1), shown.shape[1]).astype(np.int64)
    return rarest


def check_single_label(sources: dict[str, ImageSource], notes: list[str]) -> None:
    """Refuse images of several classes where each must have one; a note on labels that look like several.

    Raises:
        RecipeError: a library's set has multi-hot vectors.
    """
    several = [f"data.{name}" for name, source in sources.items() if source.multi_hot is not None]
    if several:
        raise RecipeError(
            f"{', '.join(several)} has images of several classes and data.labels is 'single', which expects one each; "
            "set data.labels=multi with a command that trains on them (python -m finetune)"
        )
    for name, source in sources.items():
        joined = sorted({label for label in source.labels if SEPARATOR in label})
        if joined:
            notes.append(
                f"data.{name} has {len(joined)} label(s) with {SEPARATOR!r}, each read as one class: {some(joined)}; "
                "data.labels=multi takes them apart"
            )


def check_multi_label(shown: dict[str, NDArray[np.bool_]], notes: list[str]) -> None:
    """Note images of no class.

    Args:
        shown: [N, C] of each split.
        notes: grows.
    """
    for name, rows in shown.items():
        empty = int((~rows.any(axis=1)).sum())
        if empty:
            notes.append(f"{empty} image(s) of {name} have no class")
