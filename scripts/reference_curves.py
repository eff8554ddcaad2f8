"""Turn a published training log (one JSON object per epoch) into a CSV of the same columns and the same digits.

    python scripts/reference_curves.py linear_eva_clip_vision_enc_1k_cls_sz224_86p5.txt logs/reference/linear_224.csv

Numbers are copied as text, so nothing is rounded. Rows are sorted by epoch.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path


def read_rows(log: Path) -> list[dict[str, str]]:
    """Rows of a log by epoch, each number as it is written there.

    Raises:
        ValueError: two rows of one epoch, or rows with other columns than the first.
    """
    lines = log.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line, parse_float=str, parse_int=str) for line in lines if line.strip()]
    rows.sort(key=lambda row: int(row["epoch"]))
    if len({row["epoch"] for row in rows}) < len(rows):
        raise ValueError(f"{log} has two rows of one epoch")
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"{log} has rows with different columns")
    return rows


def main() -> None:
    """Convert one log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="published log")
    parser.add_argument("target", type=Path, help="CSV to write")
    arguments = parser.parse_args()
    rows = read_rows(arguments.log)
    arguments.target.parent.mkdir(parents=True, exist_ok=True)
    with arguments.target.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
