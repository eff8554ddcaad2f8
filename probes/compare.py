"""`python -m probes.compare RUN …`: finished runs side by side, as a Markdown table. Imports no torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from probes.cli import EXIT_USER_ERROR
from probes.sections import RecipeError

COLUMNS = ("run", "method", "chosen", "top-1", "95 % interval", "mean recall", "over seeds")


def read_run(folder: Path) -> dict[str, Any]:
    """`result.json` of a finished run, with the fingerprint of the split that it is scored on.

    Raises:
        RecipeError: no finished run is there, or it is of a command whose result has no top-1.
    """
    result, data = folder / "result.json", folder / "data.json"
    if not result.is_file() or not data.is_file():
        raise RecipeError(f"{folder} holds no finished run; expected result.json and data.json in it")
    content: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if not content.get("scores"):
        raise RecipeError(f"{folder} has no top-1 accuracy to compare ({content.get('method')})")
    split = content["scores"][0]["split"]
    content["fingerprint"] = json.loads(data.read_text(encoding="utf-8"))["splits"][split]["fingerprint"]
    return content


def describe_row(content: dict[str, Any]) -> dict[str, str]:
    """Cells of one run."""
    from probes.intervals import mean_interval

    score, seeds = content["scores"][0], ""
    most = max((row.get("shots", 0) for row in content.get("repeats", [])), default=0)
    values = [row["top1"] for row in content.get("repeats", []) if row.get("shots", 0) == most]
    if len(values) > 1:
        mean, half = mean_interval(values)
        seeds = f"{mean:.2f} ± {half:.2f} ({len(values)})"
    chosen = score.get("setting") or (
        "nothing trained" if score["chosen_by"] == "nothing" else f"epoch {score['epoch']}"
    )
    by = {"schedule": "fixed", "nothing": ""}.get(score["chosen_by"], f"by {score['chosen_by']}")
    interval = content.get("interval")
    recall = content["measured"].get("mean_recall")
    return {
        "run": content["title"],
        "method": content["method"],
        "chosen": f"{chosen}, {by}" if by else chosen,
        "top-1": f"{score['top1']:.2f}",
        "95 % interval": "" if interval is None else f"{interval[0]:.1f}–{interval[1]:.1f}",
        "mean recall": "" if recall is None else f"{recall:.2f}",
        "over seeds": seeds,
    }


def format_table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown; columns that no row fills are left out."""
    columns = [name for name in COLUMNS if any(row[name] for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row[name] for name in columns) + " |" for row in rows)])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m probes.compare", description="Finished runs side by side, highest top-1 first."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    arguments = parser.parse_args(argv)
    try:
        contents = sorted(map(read_run, arguments.runs), key=lambda content: -content["scores"][0]["top1"])
        print(format_table([describe_row(content) for content in contents]))
        if len({content["fingerprint"] for content in contents}) > 1:
            print("\nThese runs are scored on different images: their figures are not comparable.")
    except (ValueError, OSError, KeyError) as error:
        if os.environ.get("EVA_CLIP_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
