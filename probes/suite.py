"""`python -m probes.suite RECIPE`: every evaluation of a list whose data are there, measured beside published."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_clip.flops import vision_gflop
from eva_clip.specs import get_model_spec
from probes.cli import run_command
from probes.precision import settle_precision
from probes.recipe import dump_recipe
from probes.runs import RunFolder, describe_environment
from probes.sections import RecipeError
from probes.suite_entries import (
    Entry,
    EvaluationRecipe,
    Outcome,
    Presence,
    changed_keys,
    check_presence,
    load_entries,
    read_measured,
)
from probes.suite_sections import SuiteRecipe
from probes.suite_tables import write_tables

if TYPE_CHECKING:
    from eva_clip.models import EvaCLIP


class TowersHolder:
    """The towers of the model that was asked for last, so that one model is built once for all its sets."""

    def __init__(self) -> None:
        self._key: Any = None
        self._towers: EvaCLIP | None = None
        self._error: Exception | None = None

    def get(self, recipe: EvaluationRecipe) -> EvaCLIP:
        """Towers as a settled recipe asks for them; a model that could not be built fails again at once."""
        from probes.embedding import build_towers

        key = (astuple(recipe.model), recipe.compute.precision)
        if key != self._key:
            self._key, self._towers, self._error = key, None, None
            try:
                self._towers = build_towers(recipe.model, recipe.compute.precision)
            except Exception as error:
                self._error = error
        if self._error is not None:
            raise self._error
        assert self._towers is not None
        return self._towers


def plan(recipe: SuiteRecipe) -> dict[str, Any]:
    """What `--plan` prints: which sets are there, their images, and the cost by model."""
    entries = load_entries(recipe)
    presence = {entry.name: check_presence(entry) for entry in entries}
    images = sum(found.images for found in presence.values())
    gflop = {name: vision_gflop(get_model_spec(name).vision) for name in recipe.suite.models}
    return {
        "present": {name: found.images for name, found in presence.items() if found.state == "present"},
        "absent": {name: found.message for name, found in presence.items() if found.state == "absent"},
        "failed": {name: found.message for name, found in presence.items() if found.state == "failed"},
        "images": images,
        "models": {
            name: {"gflop_per_image": round(cost, 1), "pflop": round(images * cost / 1e6, 3)}
            for name, cost in gflop.items()
        },
    }


def execute(recipe: SuiteRecipe, recipe_path: str) -> None:
    """All evaluations, from recipes to tables.

    Raises:
        RecipeError: several processes were started, or one or more evaluations failed (the tables are written then).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("the suite is one process; give each of several its own suite.models and run.dir")
    entries = load_entries(recipe)
    for model in recipe.suite.models:
        get_model_spec(model)  # a misspelt name is said before hours of work
    folder = _open_folder(recipe, recipe_path)
    print(f"suite folder: {folder.path}", flush=True)
    presence = [check_presence(entry) for entry in entries]
    for entry in (entry for entry, found in zip(entries, presence, strict=True) if found.state == "present"):
        settle_precision(entry.load())  # what this machine does not compute is said before hours of work
    outcomes, holder = [], TowersHolder()
    for model in recipe.suite.models:
        for entry, found in zip(entries, presence, strict=True):
            outcomes.append(_evaluate(recipe, entry, found, model, folder.path, holder))
    tables = write_tables(outcomes)
    folder.write_text("suite.md", tables)
    folder.write_json("suite.json", [outcome.to_json() for outcome in outcomes])
    print(f"\n{tables}\ntables: {folder.path / 'suite.md'}")
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed:
        named = "; ".join(f"{item.model} on {item.entry.name}: {item.message}" for item in failed)
        raise RecipeError(f"{len(failed)} of {len(outcomes)} evaluations failed: {named}")


def _open_folder(recipe: SuiteRecipe, recipe_path: str) -> RunFolder:
    """The suite's own folder. On resuming, other models or sets than before are welcome: each run checks itself."""
    path = Path(recipe.run.dir) if recipe.run.dir else None
    again = path is not None and all((path / name).is_file() for name in ("recipe.yaml", "environment.json"))
    if path is None or not again or recipe.run.on_existing != "resume":
        return RunFolder.create(recipe, recipe_path)
    folder = RunFolder(path, resumed=True)
    folder.write_text("recipe.yaml", dump_recipe(recipe))
    folder.write_json("environment.json", describe_environment())
    return folder


def _evaluate(
    suite: SuiteRecipe, entry: Entry, found: Presence, model: str, folder: Path, holder: TowersHolder
) -> Outcome:
    """One model on one set: kept from before, absent, measured or failed. A failure does not stop the suite."""
    target = folder / model.replace("/", "-") / entry.name
    if found.state != "present":
        return Outcome(entry, model, found.state, message=found.message)
    changes = [f"model.name={model}", f"run.dir={target}"]
    if model in suite.suite.weights:
        changes.append(f"model.weights={suite.suite.weights[model]}")
    try:
        recipe = entry.load(*changes)
        settled, _ = settle_precision(recipe)
        result = target / "result.json"
        kept = result.is_file()
        if kept:
            _check_unchanged(target, settled)
        else:
            if target.exists():  # cut short: an evaluation starts again from its beginning
                shutil.rmtree(target)
            print(f"\n{model} on {entry.name}, {found.images} images", flush=True)
            entry.method.execute(recipe, str(entry.file), towers=holder.get(settled))
        return Outcome(entry, model, "measured", read_measured(result), kept=kept)
    except (ValueError, OSError) as error:
        return Outcome(entry, model, "failed", message=str(error))
    except Exception as error:  # a defect, or a GPU out of memory: the other sets are still worth having
        traceback.print_exc()
        return Outcome(entry, model, "failed", message=f"{type(error).__name__}: {error}")


def _check_unchanged(target: Path, recipe: EvaluationRecipe) -> None:
    changed = changed_keys(target, recipe)
    if changed:
        raise RecipeError(
            f"{target} holds a result with other values of {', '.join(changed)}; delete it, or choose another run.dir"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(
        "python -m probes.suite",
        "Run every zero-shot and retrieval recipe of a list whose data are there; print measured beside published.",
        schema=SuiteRecipe,
        plan=plan,
        execute=execute,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
