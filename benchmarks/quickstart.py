"""How long the quickstart recipes take, from typed command to report, beside `import torch` in the same run.

    python -m benchmarks.quickstart [--repeats 3]

Features are extracted anew in every round: each run has its own cache.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPES = sorted(Path("recipes/quickstart").glob("linear*.yaml"))


def seconds(arguments: list[str]) -> float:
    """Wall time of one process, which must succeed."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Print a Markdown table: median and spread in seconds, and the ratio to `import torch`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    rounds = parser.parse_args().repeats
    times: dict[str, list[float]] = {"import torch": [], **{recipe.name: [] for recipe in RECIPES}}
    for _ in range(rounds):
        times["import torch"].append(seconds(["-c", "import torch"]))
        for recipe in RECIPES:
            with tempfile.TemporaryDirectory() as folder:
                places = [f"run.dir={folder}/run", f"features.cache={folder}/features"]
                times[recipe.name].append(seconds(["-m", "probes.linear", str(recipe), *places]))
    reference = statistics.median(times["import torch"])
    print("| command | median s | min-max s | over `import torch` |\n|---|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.1f} | {min(values):.1f}-{max(values):.1f} | {median / reference:.1f} |")


if __name__ == "__main__":
    main()
