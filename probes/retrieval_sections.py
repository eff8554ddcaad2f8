"""Recipe of retrieval: images against their captions. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from probes.sections import DataSection, ModelSection, RunSection, Section, setting
from probes.zeroshot_sections import ComputeSection, FiguresSection


@dataclass
class CaptionsSection(Section):
    """The captions of the images.

    Flickr30k's 1,000 and MSCOCO's 5,000 test images with five captions each, as published figures use them:

        data: {format: folder, test: path/to/flickr30k-images}
        captions: {file: path/to/dataset_flickr30k.json, per_image: 5}

        data: {format: folder, test: path/to/coco}  # with val2014/ in it
        captions: {file: path/to/dataset_coco.json, per_image: 5}
    """

    file: str | None = None
    """Caption file: the images are then those that it names, below the folder `data.test`, in its order; no class
    folders are needed. Null takes the images of `data.test` with one caption each from the source itself (a tar
    shard's `.txt`, or `caption` of its `.json`). The kind is told by the content:
    Karpathy's splits, `{"images": [{"filename", ["filepath"], "split", "sentences": [{"raw"}]}]}`;
    COCO's annotations, `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`;
    a JSON list, or JSON lines, of `{"image": path, "caption": text or list of texts}`;
    a CSV with the columns path,caption, one row a caption."""
    split: str = "test"
    """Images taken from a file that has a `split` for each (Karpathy's, or a CSV's column); others have no splits."""
    per_image: int | None = setting(None, low=1)
    """Captions kept of each image, its first ones; null keeps all. Published figures on Flickr30k and MSCOCO use 5."""
    truncate: bool = False
    """Cut captions that are longer than the text tower's context (77 tokens) instead of refusing them."""


@dataclass
class RetrievalExpected(FiguresSection):
    """Recall of a retrieval."""

    METRICS: ClassVar[tuple[str, ...]] = tuple(
        f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)
    )


@dataclass
class RetrievalRecipe:
    """`python -m probes.retrieval`: the images of `data.test` against their captions.

    Text to image, each caption is a query and its own image the match. Image to text, each image is a query and any
    of its captions a match.
    """

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    captions: CaptionsSection = field(default_factory=CaptionsSection)
    compute: ComputeSection = field(default_factory=ComputeSection)
    expected: RetrievalExpected = field(default_factory=RetrievalExpected)
