"""Recipe of a suite: many zero-shot and retrieval recipes, several models. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from probes.sections import RecipeError, RunSection, Section, setting


@dataclass
class SuiteSection(Section):
    """What is evaluated."""

    zeroshot: list[str] = setting([])
    """Recipes of `python -m probes.zeroshot`: files, or folders of which every `.yaml` is taken."""
    retrieval: list[str] = setting([])
    """Recipes of `python -m probes.retrieval`, likewise."""
    models: list[str] = setting(["EVA01-CLIP-g-14"])
    """Models, one after another; each takes the place of `model.name` in every recipe and is built once."""
    weights: dict[str, str] = setting({})
    """Model to its `model.weights` ("pretrained", "random" or a file); others keep the recipe's."""
    root: str | None = None
    """Takes the place of `data.root` in every recipe; the sets are its sub-folders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if not self.zeroshot and not self.retrieval:
            problems.append("zeroshot and retrieval are both empty; name recipes, such as zeroshot=[recipes/zeroshot]")
        if not self.models:
            problems.append("models is empty; name one or more, such as models=[EVA01-CLIP-g-14]")
        if len(set(self.models)) < len(self.models):
            problems.append(f"models is {self.models!r}; expected each once")
        unknown = [name for name in self.weights if name not in self.models]
        if unknown:
            problems.append(f"weights names {', '.join(unknown)}; expected names that `models` has, spelt as there")
        if problems:
            raise RecipeError("\n".join(problems))


@dataclass
class SuiteComputeSection(Section):
    """How the towers run; null keeps what each recipe says."""

    batch: int | None = setting(None, low=1)
    """Images, or texts, of one forward pass."""
    precision: str | None = setting(None, choices=("auto", "fp32", "bf16", "fp16"))
    """Precision of both towers."""
    workers: int | None = setting(None, low=0)
    """Processes that decode images (`data.workers`)."""


@dataclass
class SuiteRecipe:
    """`python -m probes.suite`: the sets that are there are scored, the others are marked absent."""

    run: RunSection = field(default_factory=RunSection)
    suite: SuiteSection = field(default_factory=SuiteSection)
    compute: SuiteComputeSection = field(default_factory=SuiteComputeSection)
