"""Looking after the feature store: what is in it, whether it is whole, and what can go. Imports no torch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from probes.sections import RecipeError
from probes.store import EXTENSION, KeyMismatch, StoreEntry, read_entry
from probes.store_claims import Claims
from probes.store_key import KEY_FILE
from probes.store_shard import PARTIAL, DamagedShard, read_shard, verify_shard

HOUR_S, DAY_S = 3600.0, 86400.0
COLUMNS = ("entry", "split", "model", "px", "precision", "samples", "rows", "arrays", "MB", "state")


@dataclass(frozen=True)
class Removal:
    """Something that `gc` would delete."""

    path: Path
    reason: str
    nbytes: int


def find_entries(cache: Path) -> tuple[list[StoreEntry], list[str]]:
    """The entries of a store by age, and a sentence for each folder whose `key.json` cannot be read.

    Raises:
        RecipeError: no such folder.
    """
    if not cache.is_dir():
        raise RecipeError(f"no feature store at {cache}; give the folder that features.cache names")
    entries, problems = [], []
    for path in cache.glob(f"*/{KEY_FILE}"):
        try:
            entries.append(read_entry(path.parent))
        except KeyMismatch as error:
            problems.append(str(error))
    return sorted(entries, key=lambda entry: (entry.folder / KEY_FILE).stat().st_mtime_ns), problems


def describe_entry(entry: StoreEntry) -> dict[str, str]:
    """One line of `ls`, by `COLUMNS`."""
    key, arrays = entry.key, entry.arrays()
    lacking = {array: len(entry.missing([array])) for array in arrays}
    incomplete = [f"{array} lacks {count} of {entry.num_shards} shards" for array, count in lacking.items() if count]
    view = f" (augmented, seed {key['seed']})" if "seed" in key else ""
    return {
        "entry": entry.folder.name[:12],
        "split": str(entry.about["split"]) + view,
        "model": str(entry.about["model"]),
        "px": str(key["image_size"]),
        "precision": str(key["precision"]),
        "samples": str(key["samples"]["fingerprint"])[:12],
        "rows": f"{entry.rows:,}",
        "arrays": ", ".join(arrays) or "none",
        "MB": f"{sum(_sizes(entry.folder)) / 1e6:,.1f}",
        "state": "; ".join(incomplete) or ("complete" if arrays else "partial"),
    }


def shard_paths(entry: StoreEntry) -> Iterator[Path]:
    """Files of all finished shards."""
    for array in entry.arrays():
        for number in sorted(entry.present(array)):
            yield entry.path(array, number)


def find_damaged(entries: list[StoreEntry]) -> tuple[int, list[DamagedShard]]:
    """How many shards there are, and the errors of those whose bytes have changed; reads everything."""
    count, damaged = 0, []
    for entry in entries:
        for path in shard_paths(entry):
            count += 1
            try:
                verify_shard(read_shard(path))
            except DamagedShard as error:
                damaged.append(error)
            except FileNotFoundError:
                continue  # removed meanwhile
    return count, damaged


def find_removals(cache: Path, *, damaged: bool = False, older_than_days: float | None = None) -> list[Removal]:
    """What can go: files that killed processes left behind and, when asked for, damaged shards and old entries.

    Nothing that a running extraction holds is listed.

    Args:
        cache: the store.
        damaged: read all shards and list the damaged ones; only their rows are extracted again.
        older_than_days: list entries in which nothing was written for so many days.
    """
    entries, _ = find_entries(cache)
    found = [_removal(path, "left by a process that was killed") for path in sorted(_leftovers(cache))]
    if damaged:
        found += [_removal(error.path, "damaged") for error in find_damaged(entries)[1]]
    if older_than_days is not None:
        for entry in entries:
            newest = max(path.stat().st_mtime for path in entry.folder.rglob("*"))
            age = (time.time() - newest) / DAY_S
            with Claims(entry.folder) as claims:
                if age > older_than_days and claims.take(0, entry.num_shards):
                    reason = f"nothing written for {age:.0f} days"
                    found.append(Removal(entry.folder, reason, sum(_sizes(entry.folder))))
    return found


def remove(removal: Removal) -> None:
    """Delete a file or an entry; whatever is gone already is no error."""
    if removal.path.is_dir():
        shutil.rmtree(removal.path, ignore_errors=True)
    else:
        removal.path.unlink(missing_ok=True)


def _leftovers(cache: Path) -> Iterator[Path]:
    for path in cache.rglob(f".*{PARTIAL}"):
        number = path.name.split(".")[1]
        entry = path.parent.parent
        if number.isdecimal() and (entry / KEY_FILE).is_file():
            with Claims(entry) as claims:
                if claims.take(int(number)):  # whoever wrote it holds the claim until it is renamed
                    yield path
        elif time.time() - path.stat().st_mtime > HOUR_S:
            yield path


def _removal(path: Path, reason: str) -> Removal:
    return Removal(path, reason, path.stat().st_size)


def _sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.rglob(f"*{EXTENSION}")]
