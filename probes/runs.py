"""Run folders: created before any work, never overwritten unasked, resumable, with provenance. Imports no torch."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from probes.launch import agree_on_folder, is_first_process
from probes.precision import precision_section, processor_name
from probes.recipe import dump_recipe, load_run_recipe
from probes.resume import changed_keys, describe_changes
from probes.sections import RecipeError, RunSection

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "open_clip_torch",
    "pytorch-lightning",
    "torchmetrics",
    "scikit-learn",
    "numpy",
    "pillow",
)


class HasRun(Protocol):
    """A recipe of any method."""

    run: RunSection


class RunFolder:
    """One run's folder: `recipe.yaml`, `environment.json`, `data.json`, `log.txt`, `checkpoints/`, `result.json`, …"""

    def __init__(self, path: Path, resumed: bool = False, writes: bool = True) -> None:
        self.path = path
        self.resumed = resumed
        self.writes = writes
        """False in all but the first of a trainer's processes: nothing is written then."""

    @classmethod
    def create(cls, recipe: HasRun, recipe_path: str) -> RunFolder:
        """Make or reopen the run folder that a recipe asks for, and write recipe and environment into it.

        In all but the first of a trainer's processes this neither looks at the folder's content nor changes it.

        Raises:
            RecipeError: the folder holds a run and `run.on_existing` is "error"; it holds something else; the run to
                resume is finished or had another recipe (the differing keys are named); or several processes have no
                way to agree on a new folder.
        """
        path = Path(recipe.run.dir or agree_on_folder(lambda launch: _fresh_path(recipe_path, launch)))
        if not is_first_process():
            started = recipe.run.on_existing == "resume" and any(path.glob("checkpoints/*.ckpt"))
            return cls(path, resumed=started, writes=False)
        if path.exists() and not path.is_dir():
            raise RecipeError(f"run.dir {path} is a file; choose a folder")
        occupied = path.is_dir() and any(path.iterdir())
        # Both: overwriting must not take a folder of pictures beside a recipe for a run.
        is_run = all((path / name).is_file() for name in ("recipe.yaml", "environment.json"))
        if occupied and not is_run:
            raise RecipeError(f"run.dir {path} holds files that are no run; choose an empty or new folder")
        if occupied and recipe.run.on_existing == "error":
            raise RecipeError(f"run.dir {path} already holds {_describe_run(cls(path))}")
        if occupied and recipe.run.on_existing == "resume":
            _check_resumable(path, recipe)
            return cls(path, resumed=True)
        if occupied:
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder.write_text("recipe.yaml", dump_recipe(recipe))
        folder.write_json("environment.json", describe_environment())
        return folder

    def write_text(self, name: str, text: str) -> None:
        """Write a file so that it is either whole or absent."""
        if not self.writes:
            return
        target = self.path / name
        temporary = target.with_name(f".{target.name}.partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file, whole or not at all."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def record_data(self, described: Mapping[str, Any]) -> None:
        """Write `data.json`: what `probes.splits.describe` says; a run that has trained goes on with its own data only.

        Raises:
            RecipeError: the data of a resumed run are no longer those that it was started with.
        """
        path = self.path / "data.json"
        if self.resumed and _has_trained(self.path) and path.is_file():
            changes = describe_changes(json.loads(path.read_text(encoding="utf-8")), described)
            if changes:
                raise RecipeError(
                    f"the data are not those that the run in {self.path} was started with: {'; '.join(changes)}; "
                    "restore them, or start a new run in another run.dir"
                )
            return
        self.write_json("data.json", described)

    def read_log(self) -> list[dict[str, float]]:
        """Rows of `log.txt`, one per epoch; a last line cut short by a kill is left out."""
        path = self.path / "log.txt"
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def append_log(self, row: Mapping[str, float]) -> None:
        """Add one epoch to `log.txt`; an epoch that is there already (repeated after a resume) is kept as it was."""
        path = self.path / "log.txt"
        if not self.writes or any(logged["epoch"] == row["epoch"] for logged in self.read_log()):
            return
        cut_short = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as stream:
            stream.write(("\n" if cut_short else "") + json.dumps(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def describe_environment() -> dict[str, str]:
    """Versions, platform, processor and count, command line and, in a checkout, the commit."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(sys.orig_argv),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "processors": str(os.cpu_count()),
        "commit": _commit(),
        **versions,
    }


def _commit() -> str:
    """Commit of the checkout that this code runs from, or "none"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _fresh_path(recipe_path: str, launch: str = "") -> Path:
    """`logs/<folder>-<recipe>-<launch>`; without a launch's name the time, and a counter for runs of one second."""
    recipe = Path(recipe_path).resolve()
    base = Path("logs") / f"{recipe.parent.name}-{recipe.stem}"
    if launch:
        return base.with_name(f"{base.name}-{launch}")
    first = base.with_name(f"{base.name}-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}")
    path, count = first, 1
    while path.exists():
        count += 1
        path = first.with_name(f"{first.name}-{count}")
    return path


def _describe_run(run: RunFolder) -> str:
    """How far the run in a folder came, and what may be done about it."""
    overwrite = "run.on_existing=overwrite to delete it first"
    if (run.path / "result.json").is_file():
        return f"a finished run; choose another run.dir, or {overwrite}"
    epochs = len(run.read_log())
    state = f"stopped after {epochs} epoch(s)" if epochs else "never finished an epoch"
    kept = any(run.path.glob("checkpoints/*.ckpt"))
    resume = "continue it" if kept else "start it again from its beginning"
    return f"a run that {state}; choose another run.dir, or run.on_existing=resume to {resume}, or {overwrite}"


def _has_trained(path: Path) -> bool:
    """Whether a run has come as far as its first epoch or checkpoint."""
    return (path / "log.txt").exists() or (path / "checkpoints").exists()


def _check_resumable(path: Path, recipe: Any) -> None:
    if (path / "result.json").is_file():
        raise RecipeError(f"the run in {path} is finished; there is nothing to resume")
    stored = load_run_recipe(path / "recipe.yaml", type(recipe))
    differing = changed_keys(stored, recipe)
    if differing:
        hint = "" if _has_trained(path) else "; it never finished an epoch, so run.on_existing=overwrite loses nothing"
        name = precision_section(recipe)
        if f"{name}.precision" in differing:  # "auto" is another one on another machine
            started = getattr(stored, name).precision
            hint += f"; {name}.precision={started}, which it was started in, continues it here if nothing else differs"
        raise RecipeError(f"the run in {path} was started with other values of {', '.join(differing)}{hint}")
