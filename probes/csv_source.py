"""Images or videos listed in a CSV file with columns path,label[,split]. No torch."""

from __future__ import annotations

import csv
import posixpath
from collections import Counter
from pathlib import Path

from probes.sections import RecipeError
from probes.source_contract import Files, some

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What a CSV's `split` column may say, in any case, and the split it means."""


class CsvSource(Files):
    """Rows `path,label[,split]`; paths are relative to the CSV's folder.

    Args:
        path: the CSV file, UTF-8 with or without a byte-order mark.
        split: the split to keep where the file has a `split` column; None keeps all rows.
        media: "image" or "video", what the files are.
        multi_label: an empty label is an image of no class; else it is a mistake.

    Raises:
        RecipeError: a column is missing, no row is of the split, or rows are wrong or name missing files.
    """

    def __init__(self, path: str | Path, split: str | None, media: str = "image", *, multi_label: bool = False) -> None:
        super().__init__([str(path)], Path(path).parent, media)
        rows, has_split = _read_rows(Path(path))
        first_row: dict[str, int] = {}
        wrong, missing = [], []
        for number, image, label, row_split in rows:
            if not image or not (label or multi_label):
                wrong.append(f"row {number} has an empty {'path' if not image else 'label'}")
                continue
            first = first_row.setdefault(posixpath.normpath(image), number)
            if first != number:
                wrong.append(f"row {number} repeats row {first} ({image})")
            if has_split and row_split.lower() not in SPLIT_NAMES:
                wrong.append(f"row {number} has split {row_split!r}; expected train, val or test")
            elif not has_split or split is None or SPLIT_NAMES[row_split.lower()] == split:
                if not (self.root / image).is_file():
                    missing.append(f"row {number}: {self.root / image}")
                self.keys.append(image)
                self.labels.append(label)
        if wrong:
            raise RecipeError(f"{path} has {len(wrong)} wrong row(s): {some(wrong)}; correct them")
        if missing:
            raise RecipeError(
                f"{path} names {len(missing)} missing file(s) in {len(self)} row(s): {some(missing)}; "
                f"paths are read from {self.root.resolve()}"
            )
        if not self.keys:
            found = Counter(row_split for *_, row_split in rows)
            counts = ", ".join(f"{name}: {count}" for name, count in found.items() if name)
            raise RecipeError(f"{path} has no row" + (f" of split {split!r}; found {counts}" if counts else ""))


def csv_splits(path: str | Path) -> set[str]:
    """The splits that a CSV's `split` column names ("train", "val", "test"); empty without such a column."""
    rows, has_split = _read_rows(Path(path))
    return {SPLIT_NAMES.get(row_split.lower(), row_split) for *_, row_split in rows} if has_split else set()


def _read_rows(path: Path) -> tuple[list[tuple[int, str, str, str]], bool]:
    """(row number, path, label, split) of each row, stripped, and whether the file has a `split` column."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            columns = [name.strip() for name in next(reader, [])]
            absent = [name for name in ("path", "label") if name not in columns]
            if absent:
                found = ", ".join(columns) or "nothing"
                expected = "expected path,label[,split]"
                raise RecipeError(f"{path} has no column {' or '.join(absent)}; found {found}; {expected}")
            rows = []
            for values in filter(None, reader):
                if len(values) != len(columns):
                    raise RecipeError(
                        f"{path} row {reader.line_num} has {len(values)} fields for {len(columns)} columns; "
                        "put fields that contain a comma in double quotes"
                    )
                row = dict(zip(columns, (value.strip() for value in values), strict=True))
                rows.append((reader.line_num, row["path"], row["label"], row.get("split", "")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(f"{path} is no UTF-8 CSV file ({error}); save it as UTF-8") from error
    return rows, "split" in columns
