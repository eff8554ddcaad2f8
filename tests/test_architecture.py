"""The house keeps its shape: import direction, light entry points, small files, nothing of one machine's."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
ALLOWED = {
    "eva_clip": {"eva_clip"},
    "probes": {"eva_clip", "probes"},
    "finetune": {"eva_clip", "probes", "finetune"},
}
"""What each package may import of the three."""
MODULES = sorted(path for package in ALLOWED for path in (REPO / package).rglob("*.py"))
LIGHT = ["probes.recipe", "probes.sections", "probes.cli", "probes.runs", "probes.results", "probes.linear"]
LIGHT += ["probes.sources", "probes.splits", "probes.plan", "probes.progress", "eva_clip", "eva_clip.specs"]
HEAVY = ["torch", "torchvision", "timm", "open_clip", "pytorch_lightning", "lightning", "torchmetrics", "sklearn"]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 320, 60
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".j2", ".csv", ".txt", ".cfg", ".sh", ""}


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def imported_modules(path: Path, root: Path) -> set[str]:
    """Absolute names of all modules that a file imports, at any depth of its code; relative imports resolved."""
    package = list(path.relative_to(root).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *([node.module] if node.module else [])]
            found |= {".".join(parts), *(".".join([*parts, alias.name]) for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            literals = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
            found |= {str(literal).rstrip(".") for literal in literals}
    return found - {""}


def roots(path: Path, root: Path = REPO) -> set[str]:
    return {module.split(".")[0] for module in imported_modules(path, root)}


def tracked_files() -> list[Path]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    return [REPO / name for name in listed.stdout.split("\0") if name and (REPO / name).is_file()]


# Import direction


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path):
    package = path.relative_to(REPO).parts[0]
    assert roots(path) & ALLOWED.keys() <= ALLOWED[package]


@pytest.mark.parametrize("path", [p for p in MODULES if "eva_clip" in p.parts], ids=name_of)
def test_the_model_library_does_not_know_lightning(path):
    assert not roots(path) & {"lightning", "pytorch_lightning", "lightning_fabric"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_package_imports_tests_scripts_or_bolts(path):
    assert not roots(path) & {"tests", "scripts", "benchmarks", "pl_bolts"}


@pytest.mark.parametrize(
    "source",
    [
        "import probes.linear",
        "def f():\n    from probes import linear",
        "from ..probes import linear",
        "from .. import probes",
        "import importlib\nimportlib.import_module('probes.linear')",
        "if TYPE_CHECKING:\n    from probes.sections import Recipe",
    ],
)
def test_the_check_sees_every_way_to_import(source, tmp_path):
    path = tmp_path / "eva_clip" / "wrong.py"
    path.parent.mkdir()
    path.write_text(source)
    assert "probes" in roots(path, tmp_path)


def test_a_relative_import_within_a_package_stays_within(tmp_path):
    path = tmp_path / "eva_clip" / "nano" / "right.py"
    path.parent.mkdir(parents=True)
    path.write_text("from . import a\nfrom ..models import b")
    assert roots(path, tmp_path) == {"eva_clip"}


# Light entry points


def test_light_modules_import_nothing_heavy(run_process, tmp_path):
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT}:\n"
        "    importlib.import_module(name)\n"
        f"    print(name, [heavy for heavy in {HEAVY} if heavy in sys.modules])"
    )
    outcome = run_process(["-c", code], tmp_path)
    assert outcome.err == ""
    assert outcome.out.splitlines() == [f"{name} []" for name in LIGHT]


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["missing.yaml"], ["{recipe}", "optimizer.lrr=1"]],
    ids=["help", "missing recipe", "misspelt key"],
)
def test_help_and_recipe_mistakes_answer_without_torch(run_process, tmp_path, argv):
    arguments = [argument.format(recipe=REPO / "recipes/custom/linear_csv.yaml") for argument in argv]
    code = (
        "import sys\nfrom probes.linear import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print([heavy for heavy in {HEAVY} if heavy in sys.modules])"
    )
    outcome = run_process(["-c", code], tmp_path)
    assert outcome.out.splitlines()[-1] == "[]"
    assert "usage: python -m probes.linear" in outcome.out or outcome.err.startswith("error: ")


# Size


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_are_small(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE_LINES, "would two ideas live better apart?"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, kinds) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long


def test_no_room_is_called_utils():
    assert not [name_of(path) for path in MODULES if path.stem in ("utils", "util", "helpers", "misc", "common")]


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_are_listed_for_installation(package):
    listed = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    for init in (REPO / package).rglob("__init__.py"):
        assert f'"{".".join(init.parent.relative_to(REPO).parts)}"' in listed


# Nothing of one machine's

OWN_NAME = Path(__file__).resolve()
REGISTRIES = ["pypi" + ".org", "files.pythonhosted" + ".org", "registry.npmjs" + ".org", "download.pytorch" + ".org"]
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:work|home|root|Users|mnt|tmp|scratch)/[\w.-]+")


def test_no_registry_hosts_or_machine_paths_in_the_tree():
    found = []
    for path in tracked_files():
        if path.suffix not in TEXT or path.resolve() == OWN_NAME:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            hosts = [host for host in REGISTRIES if host in line]
            if hosts or MACHINE_PATHS.search(line):
                found.append(f"{name_of(path)}:{number}: {line.strip()[:100]}")
    assert not found


def test_tracked_files_are_small():
    large = [f"{name_of(p)}: {p.stat().st_size}" for p in tracked_files() if p.stat().st_size > 11 * 2**20]
    assert not large
