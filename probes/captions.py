"""The images of a retrieval and their captions: from a caption file, or from the source itself. No torch at the top."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.caption_file import load_captions
from probes.retrieval_sections import CaptionsSection
from probes.sections import DataAbsent, DataSection, RecipeError
from probes.source_contract import Files, some
from probes.splits import Split, open_evaluation_split

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CaptionedSplit:
    """Images and, for each, one caption or more."""

    split: Split
    """The images, N of them; their targets mean nothing."""
    captions: list[list[str]]
    """N lists, none empty."""
    file: str | None
    """The caption file; None where the source has the captions."""

    @property
    def texts(self) -> list[str]:
        """All captions, T of them, image by image."""
        return [text for texts in self.captions for text in texts]

    @property
    def owner(self) -> list[int]:
        """Position of each caption's image, T of them."""
        return [position for position, texts in enumerate(self.captions) for _ in texts]

    def describe(self) -> dict[str, Any]:
        """What `data.json` of a run folder holds."""
        source = self.split.source
        return {
            "images": {"paths": source.paths, "count": len(self.split), "fingerprint": self.split.fingerprint()},
            "captions": {
                "file": self.file,
                "count": len(self.texts),
                "sha256": hashlib.sha256(repr(self.captions).encode()).hexdigest(),
            },
        }


class NamedFiles(Files):
    """Images that a caption file names, below a folder; they have no classes.

    Raises:
        RecipeError: files are missing (counted, the first few named).
    """

    def __init__(self, root: Path, images: list[str]) -> None:
        super().__init__([str(root)], root)
        missing = [str(root / image) for image in images if not (root / image).is_file()]
        if missing:
            kind = DataAbsent if len(missing) == len(images) else RecipeError
            raise kind(
                f"{len(missing)} of the {len(images)} images of captions.file are missing: {some(missing)}; "
                f"paths are read from data.test, {root.resolve()}"
            )
        self.keys = images
        self.labels = [""] * len(images)


def open_captioned_split(data: DataSection, captions: CaptionsSection) -> CaptionedSplit:
    """The images of `data.test` and their captions. Reads no image.

    Raises:
        RecipeError: images or captions are missing or wrong; all of them are counted, the first few named.
    """
    if captions.file is None:
        split = open_evaluation_split(data).test
        texts = [_lines(split.source.caption(int(index))) for index in split.indices]
        missing = [key for key, found in zip(split.keys, texts, strict=True) if not found]
        if missing:
            raise RecipeError(
                f"{len(missing)} image(s) have no caption, the first {missing[0]}; expected a .txt, or `caption` in "
                ".json, beside each image of a tar shard, or a caption file named by captions.file"
            )
    else:
        split, texts = _open_named(data, captions, captions.file)
    return CaptionedSplit(split, [found[: captions.per_image] for found in texts], captions.file)


def tokenize_captions(captioned: CaptionedSplit, context_length: int, truncate: bool) -> torch.Tensor:
    """Token ids int64 [T, context_length] of all captions.

    Raises:
        RecipeError: captions are longer than the context and `truncate` is False (counted, the first few named).
    """
    from eva_clip.tokenizer import tokenize

    tokens = tokenize(captioned.texts, context_length, truncate=True)
    too_long = []
    keys, owner, texts = captioned.split.keys, captioned.owner, captioned.texts
    for position in [] if truncate else tokens[:, -1].nonzero().flatten().tolist():  # cut, or just as long as allowed
        try:
            tokenize(texts[position], context_length)
        except ValueError:
            too_long.append(f"{keys[owner[position]]}: {texts[position][:60]!r}…")
    if too_long:
        raise RecipeError(
            f"{len(too_long)} caption(s) have more than the {context_length} tokens that the text tower reads: "
            f"{some(too_long)}; shorten them, or cut them with captions.truncate=true"
        )
    return tokens


def _open_named(data: DataSection, captions: CaptionsSection, file: str) -> tuple[Split, list[list[str]]]:
    if data.format != "folder":
        raise RecipeError(
            f"data.format is {data.format!r} with captions.file {file}; expected data.format=folder, with data.test "
            "the folder that the file's paths start from"
        )
    if data.test is None:
        raise RecipeError("data.test is null; name the folder that the paths of captions.file start from")
    root = Path(data.test)
    if not root.is_dir():
        raise DataAbsent(f"data.test: no folder at {root}; expected the one that the paths of captions.file start from")
    by_image = load_captions(file, captions.split)
    source = NamedFiles(root, list(by_image))
    positions = np.arange(len(source), dtype=np.int64)
    return Split("test", source, positions, np.zeros_like(positions)), list(by_image.values())


def _lines(caption: str | None) -> list[str]:
    """The captions of a source's text, one a line."""
    return [line.strip() for line in (caption or "").splitlines() if line.strip()]
