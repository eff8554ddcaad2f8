"""How long the command line takes to answer, beside `python -c "import torch"` in the same run.

    python -m benchmarks.startup [--repeats 5]

Each round times every command once, in turn, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "probes.linear --help": ["-m", "probes.linear", "--help"],
    "a recipe mistake": ["-m", "probes.linear", "recipes/quickstart/linear.yaml", "optimizer.lrr=1"],
    "a missing recipe": ["-m", "probes.linear", "recipes/quickstart/liner.yaml"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    """Print a Markdown table: median, spread and ratio to `import torch`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one that is thrown away")
    rounds = parser.parse_args().repeats
    for arguments in COMMANDS.values():
        seconds(arguments)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    reference = statistics.median(times["import torch"])
    print("| command | median s | min-max s | of `import torch` |\n|---|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.2f} | {min(values):.2f}-{max(values):.2f} | {median / reference:.3f} |")


if __name__ == "__main__":
    main()
