"""The documents keep their word: links lead somewhere, commands name what exists, recipes load with what is shown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from finetune.sections import FinetuneRecipe
from probes.features import ComputeExtraction, TrainerExtraction
from probes.method_sections import KnnRecipe, LogisticRecipe, RidgeRecipe
from probes.ncm import NcmRecipe
from probes.recipe import load_recipe, recipe_sections
from probes.retrieval_sections import RetrievalRecipe
from probes.sections import Recipe
from probes.suite_sections import SuiteRecipe
from probes.zeroshot_sections import ZeroShotRecipe
from scripts.figures import BLOCKS, END, insert

REPO = Path(__file__).resolve().parents[1]
DOCUMENTS = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), REPO / "CONTRIBUTING.md"]
DOCUMENTS += [REPO / "benchmarks/README.md", REPO / "scripts/nano/README.md"]
RECIPES = sorted((REPO / "recipes").rglob("*.yaml"))
SCHEMAS: dict[str, type] = {
    "probes.linear": Recipe,
    "probes.logistic": LogisticRecipe,
    "probes.ridge": RidgeRecipe,
    "probes.knn": KnnRecipe,
    "probes.ncm": NcmRecipe,
    "probes.zeroshot": ZeroShotRecipe,
    "probes.retrieval": RetrievalRecipe,
    "probes.suite": SuiteRecipe,
    "finetune": FinetuneRecipe,
}
LAUNCHERS = re.compile(r"(?:python3?|torchrun\b[^\n]*?) -m +([a-z_][a-z_.]*)")
OTHER_PROJECTS = {"pytest", "torch.distributed.run"}


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def without_code(text: str) -> str:
    """The prose of a Markdown file, fenced blocks and inline code left out."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a Markdown file."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def expand(block: str) -> list[str]:
    """Lines of a shell block with its assignments and `for` loops carried out; enough for what documents show."""
    lines = []
    for line in block.replace("\\\n", " ").splitlines():
        lines.append(re.sub(r"(?:^|\s)#(?!SBATCH).*", "", line).strip())
    values: dict[str, list[str]] = {}
    found = []
    for line in lines:
        assignment = re.fullmatch(r'([A-Z_]+)="(.*)"', line)
        loop = re.fullmatch(r"for (\w+) in (.*); do", line)
        if assignment:
            values[assignment[1]] = [assignment[2]]
        elif loop:
            values[loop[1]] = loop[2].split()
        else:
            variants = [line]
            for name, options in values.items():
                uses = re.compile(rf"\$\{{?{name}\b\}}?")
                variants = [
                    uses.sub(lambda _, option=option: option, variant) for variant in variants for option in options
                ]
            found += dict.fromkeys(variants)
    return found


def commands_of(path: Path) -> list[str]:
    """Every command with `-m` that a document, or a recipe's header, shows."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        lines = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#   ")]
    else:
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        lines = [line for block in blocks for line in expand(block)] + inline
    return [line for line in lines if LAUNCHERS.search(line)]


SHOWN = [
    pytest.param(command, id=f"{name_of(path)}: {command[-90:]}")
    for path in [*DOCUMENTS, *RECIPES]
    for command in commands_of(path)
]


def test_the_first_page_is_one_page():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 120
    assert len(readme.encode()) <= 8000
    assert len(re.findall(r"^pip install uv && ", readme, re.MULTILINE)) == 2, "those that .ci/run runs"
    assert (REPO / "docs/report.png").stat().st_size <= 300_000
    with Image.open(REPO / "docs/report.png") as picture:
        assert picture.width >= 800, "text in it can be read"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    prose = without_code(path.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        goal = (path.parent / file).resolve() if file else path
        if (
            not goal.exists()
            or not goal.is_relative_to(REPO)
            or (anchor and (goal.suffix != ".md" or anchor not in anchors_of(goal)))
        ):
            broken.append(target)
    assert broken == []


def test_every_page_can_be_reached_from_the_first():
    seen, waiting = set(), [REPO / "README.md"]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        for target in re.findall(r"\]\(([^)#\s]+)", without_code(page.read_text(encoding="utf-8"))):
            goal = (page.parent / target).resolve()
            if goal.suffix == ".md" and goal.is_file() and goal not in seen:
                waiting.append(goal)
    assert set((REPO / "docs").glob("*.md")) <= seen


@pytest.mark.parametrize("path", [*DOCUMENTS, *RECIPES], ids=name_of)
def test_recipes_that_are_named_exist(path):
    names = set(re.findall(r"\brecipes/[\w./-]+\.yaml\b", path.read_text(encoding="utf-8")))
    assert [name for name in sorted(names) if not (REPO / name).is_file()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_places_in_the_repository_that_are_named_exist(path):
    """Such as `probes/ncm.py`, in inline code; what a run writes (`logs/`) is not one of them."""
    names = re.findall(
        r"`((?:eva_clip|probes|finetune|recipes|tests|scripts|benchmarks|docs)/[\w./-]*)`", path.read_text()
    )
    assert [name for name in sorted(set(names)) if not (REPO / name).exists()] == []


def test_commands_are_found():
    shown = [param.values[0] for param in SHOWN]
    assert "uv run python -m probes.ridge recipes/quickstart/ridge.yaml run.dir=logs/compare/ridge" in [
        command.rpartition(" ")[0] for command in shown
    ], "of a loop"
    assert len(shown) > 100


@pytest.mark.parametrize("command", SHOWN)
def test_commands_that_are_shown_exist(command):
    for module in LAUNCHERS.findall(command):
        place = REPO.joinpath(*module.split("."))
        exists = place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
        assert exists or module in OTHER_PROJECTS


@pytest.mark.parametrize("command", [shown for shown in SHOWN if ".yaml" in shown.values[0]])
def test_recipes_load_with_the_changes_that_are_shown(command):
    module = LAUNCHERS.findall(command)[-1]
    words = shlex.split(command)
    recipe = next(position for position, word in enumerate(words) if word.endswith(".yaml") and "=" not in word)
    overrides = [word for word in words[recipe + 1 :] if not word.startswith("--")]
    path = REPO / words[recipe]
    if module in SCHEMAS:
        load_recipe(path, overrides, SCHEMAS[module])
    else:
        schema = ComputeExtraction if "compute" in recipe_sections(path, overrides) else TrainerExtraction
        load_recipe(path, overrides, schema, other_sections=True)


# Figures


def test_every_table_of_figures_has_its_place():
    for name, block in BLOCKS.items():
        text = (REPO / block.document).read_text(encoding="utf-8")
        found = re.findall(rf"<!-- figures: {name} -->\n(.*?){END}", text, re.DOTALL)
        assert len(found) == 1, name
        assert "\n|---" in found[0], f"{name} has a table"
        assert "Printed on " in found[0], f"{name} says where it was printed"
    for path in DOCUMENTS:
        names = re.findall(r"<!-- figures: (.*?) -->", path.read_text(encoding="utf-8"))
        assert [name for name in names if BLOCKS[name].document != name_of(path)] == []


def test_a_table_takes_the_place_of_the_one_before(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- figures: a -->\nold\n{END}\n<!-- figures: b -->\nkept\n{END}\nafter\n")
    insert(page, "a", r"| new \1 |")
    assert page.read_text() == (
        f"before\n<!-- figures: a -->\n| new \\1 |\n{END}\n<!-- figures: b -->\nkept\n{END}\nafter\n"
    )
    with pytest.raises(ValueError, match="0 places for the figures 'c'"):
        insert(page, "c", "x")
