"""Recipes of evaluations without training: zero-shot classification and retrieval. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from probes.sections import DataSection, ModelSection, RecipeError, RunSection, Section, setting


@dataclass
class PromptsSection(Section):
    """Texts of the classes."""

    templates: list[str] = setting(["{}"])
    """Prompts; `{}` is the class name. A class is the mean of its prompts' unit-length embeddings."""
    class_names: str | None = None
    """Text file with one name a line, in the order of the sorted labels; null takes the labels, with `-` and `_` read
    as spaces."""

    def __post_init__(self) -> None:
        super().__post_init__()
        without = [template for template in self.templates if "{}" not in template]
        if not self.templates or without:
            raise RecipeError(f"templates is {self.templates!r}; expected one or more texts with {{}} for the name")


@dataclass
class ComputeSection(Section):
    """How the towers run."""

    batch: int = setting(64, low=1)
    """Images, or texts, of one forward pass."""
    precision: str = setting("bf16", choices=("fp32", "bf16", "fp16"))
    """Precision of both towers; embeddings are compared in fp32."""


@dataclass
class ZeroShotExpected(Section):
    """Figures in percent that the recipe should reach."""

    top1: float | None = setting(None, low=0.0, high=100.0)
    """Top-1 accuracy."""
    top5: float | None = setting(None, low=0.0, high=100.0)
    """Top-5 accuracy."""
    mean_recall: float | None = setting(None, low=0.0, high=100.0)
    """Mean over classes of the share of their images that were recognised."""
    tolerance: float = setting(0.2, low=0.0)
    """Points below which a difference counts as reached."""
    source: str | None = None
    """Where the figures come from."""


@dataclass
class RetrievalExpected(Section):
    """Recall in percent that the recipe should reach."""

    text_to_image_r1: float | None = setting(None, low=0.0, high=100.0)
    """Share of texts whose image is the nearest."""
    image_to_text_r1: float | None = setting(None, low=0.0, high=100.0)
    """Share of images for which one of their texts is the nearest."""
    tolerance: float = setting(0.2, low=0.0)
    """Points below which a difference counts as reached."""
    source: str | None = None
    """Where the figures come from."""


@dataclass
class ZeroShotRecipe:
    """`python -m probes.zeroshot`: `data.test` is scored against its class names."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    prompts: PromptsSection = field(default_factory=PromptsSection)
    compute: ComputeSection = field(default_factory=ComputeSection)
    expected: ZeroShotExpected = field(default_factory=ZeroShotExpected)


@dataclass
class RetrievalRecipe:
    """`python -m probes.retrieval`: the images of `data.test` against their captions."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    compute: ComputeSection = field(default_factory=ComputeSection)
    expected: RetrievalExpected = field(default_factory=RetrievalExpected)
