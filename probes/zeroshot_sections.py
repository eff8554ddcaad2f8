"""Recipe of zero-shot classification, and the sections that retrieval shares with it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from eva_clip.specs import get_model_spec
from probes.results import Expectation
from probes.sections import DataSection, ModelSection, RecipeError, RunSection, Section, setting


@dataclass
class PromptsSection(Section):
    """Texts of the classes."""

    templates: list[str] = setting(["{}"])
    """Prompts; `{}` is the class name. A class is the mean of its prompts' unit-length embeddings."""
    class_names: str | None = None
    """Text file with one name a line, in the order of the sorted labels; null takes the library's names, or else the
    labels, with `-` and `_` read as spaces."""
    library: str | None = None
    """Published prompts and class names: "open_clip/imagenet", or "clip_benchmark/<set>", such as
    "clip_benchmark/cifar10". `templates` and `class_names`, where they are given, take the place of its own."""

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
    precision: str = setting("auto", choices=("auto", "fp32", "bf16", "fp16"))
    """Precision of the towers; embeddings are compared, and heads computed, in fp32. "auto": bf16 where the device
    multiplies it natively (GPUs of compute capability 8, processors with AVX512-BF16 or AMX), else fp32."""


@dataclass
class ScoringSection(Section):
    """What is measured."""

    kind: str = setting("single", choices=("single", "multi_label"))
    """"single": each image has one class; top-1, top-5, their mean, and mean per-class recall. "multi_label": any
    number of classes; mean over the classes of average precision."""


@dataclass
class FiguresSection(Section):
    """Figures in percent that a recipe should reach, by model: one recipe serves every system it was published for."""

    figures: dict[str, dict[str, float]] = setting({})
    """Model name (or alias) to metric to percent, such as `EVA01-CLIP-g-14: {top1: 78.53}`."""
    tolerance: float = setting(0.2, low=0.0)
    """Points below which a difference counts as reached."""
    source: str | None = None
    """Where the figures come from."""

    METRICS: ClassVar[tuple[str, ...]] = ()
    """Names that figures may have."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        for model, figures in self.figures.items():
            for name, value in figures.items():
                if name not in self.METRICS:
                    problems.append(f"figures.{model}.{name} is unknown; expected one of {', '.join(self.METRICS)}")
                elif not 0 <= value <= 100:
                    problems.append(f"figures.{model}.{name} is {value}; expected a percentage from 0 to 100")
        if problems:
            raise RecipeError("\n".join(problems))

    def compare(self, model: str, measured: Mapping[str, float]) -> list[Expectation]:
        """Every figure for a model beside the measured value of that name; nothing for a model without figures.

        Args:
            model: official name or alias, as is every key of `figures`.
            measured: metric name to percent.
        """
        name = get_model_spec(model).name
        mine = [figures for other, figures in self.figures.items() if get_model_spec(other).name == name]
        return [
            Expectation(metric, value, measured.get(metric), self.tolerance)
            for figures in mine
            for metric, value in figures.items()
        ]


@dataclass
class ZeroShotExpected(FiguresSection):
    """Figures of a zero-shot classification."""

    METRICS: ClassVar[tuple[str, ...]] = ("top1", "top5", "mean_recall", "mean_top1_top5", "mean_average_precision")


@dataclass
class ZeroShotRecipe:
    """`python -m probes.zeroshot`: `data.test` is scored against its class names."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    prompts: PromptsSection = field(default_factory=PromptsSection)
    scoring: ScoringSection = field(default_factory=ScoringSection)
    compute: ComputeSection = field(default_factory=ComputeSection)
    expected: ZeroShotExpected = field(default_factory=ZeroShotExpected)
