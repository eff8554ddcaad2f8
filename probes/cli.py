"""The command line that every method shares: one recipe, `key=value` overrides, `--plan`. Imports no torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from probes.recipe import load_recipe

R = TypeVar("R")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def run_command(
    prog: str,
    description: str,
    *,
    schema: type[R],
    plan: Callable[[R], dict[str, Any]],
    execute: Callable[[R, str], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the command line, load the recipe, and either print the plan or do the work.

    Mistakes of the user's (ValueError, missing files, a full disk) end with one message on stderr and exit code 2; the
    environment variable EVA_CLIP_TRACEBACK=1 shows where they came from. Defects keep their traceback.

    Args:
        prog: the command as typed, such as "python -m probes.linear".
        description: first paragraph of `--help`.
        schema: the recipe's dataclass.
        plan: recipe to the content of `--plan`.
        execute: does the run, given the recipe and the path of its file.
        argv: arguments; None for the process's own.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("recipe", help="recipe file (YAML), such as recipes/quickstart/linear.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as optimizer.lr=0.5"
    )
    parser.add_argument("--plan", action="store_true", help="print as JSON what the recipe would do, reading no image")
    arguments = parser.parse_intermixed_args(argv)
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides, schema)
        if arguments.plan:
            print(json.dumps(plan(recipe), indent=2))
        else:
            execute(recipe, arguments.recipe)
    except (ValueError, OSError) as error:
        if os.environ.get("EVA_CLIP_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; resume with run.on_existing=resume and the same run.dir", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0
