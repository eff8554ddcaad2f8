"""A published log beside a run: on track or off by how much, epoch by epoch. Imports no torch."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.figures import LogRows

RATE_TOLERANCE = 1e-6
"""Relative difference of learning rates: they are computed, not measured."""


class ReferenceCurve:
    """Rows of a published log by epoch.

    Args:
        rows: one an epoch, with the columns of log.txt.
        tolerance: points of accuracy that a run may lie off.
    """

    def __init__(self, rows: LogRows, tolerance: float) -> None:
        self.rows, self.tolerance = list(rows), tolerance
        self._by_epoch = {int(row["epoch"]): row for row in self.rows}

    @classmethod
    def read(cls, path: str | Path, tolerance: float) -> ReferenceCurve:
        """Read a CSV with a header, as in `logs/reference`.

        Raises:
            ValueError: a cell is no number, or there is no column `epoch`.
            OSError: there is no such file.
        """
        with Path(path).open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            if "epoch" not in (reader.fieldnames or []):
                raise ValueError(f"{path} has no column 'epoch'; expected a table like those of logs/reference")
            try:
                rows = [{name: float(cell) for name, cell in row.items() if cell} for row in reader]
            except ValueError as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
        return cls(rows, tolerance)

    def compare(self, row: Mapping[str, float]) -> str:
        """Whether one epoch of a run is where the published one was, in words.

        Learning rates must agree to 1e-6 relative, accuracies on evaluation splits within the tolerance; other columns
        are not judged, because they depend on what was counted how.
        """
        epoch = int(row["epoch"])
        published = self._by_epoch.get(epoch)
        if published is None:
            return f"the published run has no epoch {epoch}"
        off = [
            f"{name} {row[name]:.6g} instead of {published[name]:.6g}"
            for name in ("train_lr", "train_min_lr")
            if name in row and name in published and not _same_rate(row[name], published[name])
        ]
        differences = {
            name: row[name] - value for name, value in published.items() if name.endswith("_acc1") and name in row
        }
        off += [
            f"{name} {difference:+.2f} points"
            for name, difference in differences.items()
            if not abs(difference) <= self.tolerance
        ]
        if off:
            return f"off by {', '.join(off)} at epoch {epoch}"
        if not differences:
            return "nothing of the published run to compare"
        worst = max(differences.values(), key=abs)
        return f"on track ({worst:+.2f} points)"

    def summarise(self, log: LogRows) -> str:
        """How many epochs of a log are on track, and the first that is not."""
        verdicts = [self.compare(row) for row in log]
        off = [verdict for verdict in verdicts if verdict.startswith("off")]
        counted = f"{len(verdicts) - len(off)} of {len(verdicts)} epochs on track"
        return f"{counted}; first {off[0]}" if off else counted


def read_reference(expected: Any, notes: list[str]) -> ReferenceCurve | None:
    """The published log of a recipe's section `expected`; where its file is not there, a note says so."""
    path = expected.reference_log
    if path is None:
        return None
    if not Path(path).is_file():
        notes.append(f"There is no published log at {path}; the epochs are not compared with one.")
        return None
    return ReferenceCurve.read(path, expected.reference_tolerance)


def _same_rate(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=RATE_TOLERANCE, abs_tol=1e-12)
