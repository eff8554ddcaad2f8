"""The evaluations of a suite: which recipes it has, whether their data are there, what a finished one measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probes import resume, retrieval, zeroshot
from probes.recipe import load_recipe
from probes.retrieval_sections import RetrievalRecipe
from probes.sections import DataAbsent, RecipeError
from probes.suite_sections import SuiteRecipe
from probes.zeroshot_sections import ZeroShotRecipe

EvaluationRecipe = ZeroShotRecipe | RetrievalRecipe


@dataclass(frozen=True)
class Entry:
    """One recipe of a suite."""

    file: Path
    kind: str
    """"image", "video", "multi_label" or "retrieval": the table that it belongs to."""
    figures: dict[str, dict[str, float]]
    """Published percentages: model to metric to value."""
    overrides: tuple[str, ...]
    """What the suite changes in the recipe, whatever the model."""

    @property
    def name(self) -> str:
        """Name of the recipe, and of its run folder."""
        return self.file.stem

    @property
    def method(self) -> Any:
        """The module whose `plan` and `execute` do the work."""
        return retrieval if self.kind == "retrieval" else zeroshot

    def load(self, *overrides: str) -> EvaluationRecipe:
        """The recipe as the suite runs it."""
        schema: Any = RetrievalRecipe if self.kind == "retrieval" else ZeroShotRecipe
        loaded: EvaluationRecipe = load_recipe(self.file, [*self.overrides, *overrides], schema)
        return loaded


@dataclass(frozen=True)
class Presence:
    """Whether the data of a recipe are there."""

    state: str
    """"present", "absent" or "failed": there, but wrong."""
    images: int = 0
    message: str = ""
    """What is missing or wrong."""


@dataclass
class Outcome:
    """One model on one set."""

    entry: Entry
    model: str
    state: str
    """"measured", "absent" or "failed"."""
    measured: dict[str, float] = field(default_factory=dict)
    """Percentages by metric."""
    message: str = ""
    """Why it is absent, or failed."""
    kept: bool = False
    """Measured by an earlier run of the suite."""

    @property
    def published(self) -> dict[str, float]:
        """Percentages by metric; empty for a model without published figures."""
        compared = self.entry.load().expected.compare(self.model, {})
        return {item.name: item.expected for item in compared}

    def to_json(self) -> dict[str, Any]:
        """A row of `suite.json`."""
        row = {key: getattr(self, key) for key in ("model", "state", "measured", "published", "kept", "message")}
        return {"recipe": self.entry.name, "file": str(self.entry.file), "kind": self.entry.kind, **row}


def load_entries(recipe: SuiteRecipe) -> list[Entry]:
    """The recipes of a suite in its order, all checked.

    Raises:
        RecipeError: a recipe is missing or wrong, or two have one name; every mistake is named.
    """
    overrides = _common_overrides(recipe)
    entries, problems = [], []
    for schema, paths in ((ZeroShotRecipe, recipe.suite.zeroshot), (RetrievalRecipe, recipe.suite.retrieval)):
        for file in [file for path in paths for file in _recipe_files(Path(path))]:
            try:
                loaded: Any = load_recipe(file, overrides, schema)
            except RecipeError as error:
                problems.append(str(error))
                continue
            entries.append(Entry(file, _kind(loaded), loaded.expected.figures, tuple(overrides)))
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        problems.append(f"several recipes are called {', '.join(twice)}; each names a folder of the suite, so rename")
    if not entries and not problems:
        problems.append("suite.zeroshot and suite.retrieval name folders without a .yaml")
    if problems:
        raise RecipeError("\n".join(problems))
    return entries


def check_presence(entry: Entry) -> Presence:
    """Whether an evaluation's data are there, and how many images; reads none and builds no model."""
    try:
        return Presence("present", int(entry.method.plan(entry.load())["images"]))
    except DataAbsent as error:
        return Presence("absent", message=str(error))
    except (ValueError, OSError) as error:
        return Presence("failed", message=str(error))


def read_measured(result: Path) -> dict[str, float]:
    """Percentages by metric from the `result.json` of a zero-shot or retrieval run."""
    content = json.loads(result.read_text(encoding="utf-8"))
    measured: dict[str, float] = content["measured"]
    return measured


def changed_keys(folder: Path, recipe: EvaluationRecipe) -> list[str]:
    """Keys of a recipe that have another value than in a run folder; its `run` and `expected` do not count."""
    stored = load_recipe(folder / "recipe.yaml", schema=type(recipe))
    return [key for key in resume.changed_keys(stored, recipe) if not key.startswith("run.")]


def _common_overrides(recipe: SuiteRecipe) -> list[str]:
    values = {
        "run.seed": recipe.run.seed,
        "data.root": recipe.suite.root,
        "data.workers": recipe.compute.workers,
        "compute.batch": recipe.compute.batch,
        "compute.precision": recipe.compute.precision,
    }
    return [f"{key}={value}" for key, value in values.items() if value is not None]


def _recipe_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.yaml")) if path.is_dir() else [path]


def _kind(recipe: EvaluationRecipe) -> str:
    if isinstance(recipe, RetrievalRecipe):
        return "retrieval"
    if recipe.scoring.kind == "multi_label":
        return "multi_label"
    return recipe.data.media
