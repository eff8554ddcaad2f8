"""Prompts and class names: a recipe's own, or those that open_clip and clip_benchmark publish. Imports no torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from probes.dataset_builders import CLIP_BENCHMARK_SETS
from probes.sections import RecipeError
from probes.source_contract import some
from probes.splits import Evaluation
from probes.zeroshot_sections import PromptsSection

IMAGENET_CLASSES = 1000
IMAGENET_LIKE = tuple(name for name in CLIP_BENCHMARK_SETS if name.startswith("imagenet"))
"""Sets of clip_benchmark whose classes are ImageNet's, or some of them."""


@dataclass(frozen=True)
class Library:
    """What a library publishes for one set."""

    version: str
    """Name and version of the package."""
    templates: list[str]
    """Prompts with `{}` for the name."""
    names: list[str] | None
    """Class names in index order; None where the library leaves them to the set itself."""


@dataclass(frozen=True)
class Prompts:
    """The texts of an evaluation's classes."""

    names: list[str]
    """One a class, in the order of the evaluation's classes."""
    templates: list[str]
    """Prompts with `{}` for the name."""
    source: str
    """Where both come from, with the version of a library."""


def resolve_prompts(prompts: PromptsSection, evaluation: Evaluation) -> Prompts:
    """Names and templates of a recipe for the classes that it scores.

    Raises:
        RecipeError: the library or the file is missing, has no names, has another number of names than there are
            classes, or does not say which name belongs to which class.
    """
    library = load_library(prompts.library) if prompts.library else None
    templates, origin = prompts.templates, "the recipe"
    if library and prompts.templates == PromptsSection().templates:
        templates, origin = library.templates, f"{prompts.library} of {library.version}"
    if prompts.class_names is not None:
        names, named_by = _names_of_file(Path(prompts.class_names), evaluation.classes), prompts.class_names
    elif library and _names_itself(evaluation, prompts.library, library):
        names, named_by = list(evaluation.test.source.class_texts or []), f"the set, {library.version}"
    elif library and library.names is not None:
        names = _align(library.names, evaluation, str(prompts.library))
        named_by = f"{prompts.library} of {library.version}"
    else:
        texts = evaluation.test.source.class_texts or evaluation.classes
        names, named_by = [readable(name) for name in texts], "labels of the data"
    return Prompts(names, templates, f"templates: {origin}; class names: {named_by}")


def load_library(name: str) -> Library:
    """Templates and names of "open_clip/imagenet" or "clip_benchmark/<set>".

    Raises:
        RecipeError: there is no such library or set, or the package is not installed.
    """
    package, _, chosen = name.partition("/")
    if name == "open_clip/imagenet":
        import open_clip

        templates = [str(template("{}")) for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
        return Library(f"open_clip_torch {version('open_clip_torch')}", templates, list(open_clip.IMAGENET_CLASSNAMES))
    if package != "clip_benchmark" or not chosen:
        raise RecipeError(f"prompts.library is {name!r}; expected open_clip/imagenet or clip_benchmark/<set>")
    all_templates = _read_clip_benchmark("zeroshot_classification_templates")
    all_names = _read_clip_benchmark("classnames")
    short = chosen.removeprefix("vtab/").removeprefix("tfds/")
    known = {*all_templates, *all_names, *CLIP_BENCHMARK_SETS}
    if short not in known:
        near = difflib.get_close_matches(short, known, n=1)
        hint = f"did you mean clip_benchmark/{near[0]}?" if near else f"it has {', '.join(sorted(known))}"
        raise RecipeError(f"prompts.library: clip_benchmark has no set {chosen!r}; {hint}")
    # As its builder does: sets without templates of their own take ImageNet's.
    templates = [template.replace("{c}", "{}") for template in all_templates.get(short, all_templates["imagenet1k"])]
    names = all_names.get("imagenet1k" if short in IMAGENET_LIKE else short)
    return Library(f"clip-benchmark {version('clip-benchmark')}", templates, names)


def _read_clip_benchmark(kind: str) -> dict[str, list[str]]:
    """A JSON file of the package, without importing it and with it torch."""
    found = find_spec("clip_benchmark")
    if found is None or not found.submodule_search_locations:
        raise RecipeError(
            "prompts.library needs clip-benchmark, which is not installed; "
            "run pip install 'eva-clip-transfer[zeroshot]'"
        )
    path = Path(found.submodule_search_locations[0]) / "datasets" / f"en_{kind}.json"
    content: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _names_itself(evaluation: Evaluation, name: str | None, library: Library) -> bool:
    """Whether the names are the opened set's: clip_benchmark's builder has put its names on it, or has none."""
    source: Any = evaluation.test.source
    if source.class_texts is None:
        return False
    opened = str(getattr(source, "library", "")).startswith("clip_benchmark") and source.paths[0].partition(":")[0]
    return library.names is None or name == f"clip_benchmark/{opened}"


def _align(names: Sequence[str], evaluation: Evaluation, library: str) -> list[str]:
    """A library's names in the order of the classes: by label, never by the place of a sorted label."""
    classes, source = evaluation.classes, evaluation.test.source
    if not names:
        raise RecipeError(f"prompts.library: {library} names no classes; give prompts.class_names")
    position: dict[str, int] = {}
    if source.classes is not None:  # the set's own index order
        position = {label: index for index, label in enumerate(classes)} if len(classes) == len(names) else {}
    elif all(label.isdecimal() for label in classes):
        position = {label: int(label) for label in classes if int(label) < len(names)}
    elif len(names) == IMAGENET_CLASSES:
        position = wordnet_positions()
    if not position:
        position = {readable(name).lower(): index for index, name in enumerate(names)}
        classes = [readable(label).lower() for label in classes]
        if len(position) < len(names):
            position = {}  # two classes of one name: a label cannot tell which it is
    unknown = [label for label in classes if label not in position]
    if unknown:
        counts = f"{library} has {len(names)} names and the data {len(classes)} classes"
        kinds = "its names, indices from 0" + (", WordNet ids" if len(names) == IMAGENET_CLASSES else "")
        raise RecipeError(
            f"prompts.library: {counts}, of which {len(unknown)} cannot be told by their label: {some(unknown)}; "
            f"expected {kinds}, or prompts.class_names"
        )
    return [names[position[label]] for label in classes]


def wordnet_positions() -> dict[str, int]:
    """WordNet id -> class index of ImageNet-1K, in the order that open_clip's and clip_benchmark's names have."""
    from timm.data.imagenet_info import ImageNetInfo

    return {str(label): index for index, label in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def _names_of_file(path: Path, classes: Sequence[str]) -> list[str]:
    if not path.is_file():
        raise RecipeError(f"prompts.class_names: no file at {path}; expected one class name a line")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise RecipeError(f"prompts.class_names: {path} has no names; expected one class name a line")
    if len(names) != len(classes):
        raise RecipeError(f"{path} has {len(names)} names and the data {len(classes)} classes; expected as many")
    return names


def readable(name: str) -> str:
    """A label as words: `-` and `_` become spaces."""
    return name.replace("-", " ").replace("_", " ")
