"""The feature store: one folder an entry, named by the hash of its key, with the shards of every array. No torch.

    <cache>/<entry>/key.json                 the key in full, and what a person wants to know about it
    <cache>/<entry>/<array>/00000.safetensors   rows 0..2047 of one kind ("cls", "gap", ...) or of one view of it
    <cache>/<entry>/lock                     bytes locked by the processes that are extracting the shard of that number

A shard is written under another name and renamed when it is whole, so what is there is finished, whoever dies when.
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.store_key import KEY_FILE, Key, differing_fields, entry_name
from probes.store_shard import PARTIAL

SHARD_ROWS = 2048
"""Positions of one shard in new entries: the work that a kill may cost."""
EXTENSION = ".safetensors"


class KeyMismatch(ValueError):
    """An entry holds other features than its name says."""


@dataclass(frozen=True)
class StoreEntry:
    """The features of one split under one key."""

    folder: Path
    key: Key
    rows: int
    """Samples of the split, unreadable ones included."""
    shard_rows: int
    about: Mapping[str, Any]
    """For people: split, model, paths, date. No part of the key."""

    @property
    def num_shards(self) -> int:
        """Shards of every array."""
        return -(-self.rows // self.shard_rows)

    def span(self, number: int) -> tuple[int, int]:
        """Positions [start, stop) that a shard covers."""
        return number * self.shard_rows, min((number + 1) * self.shard_rows, self.rows)

    def path(self, array: str, number: int) -> Path:
        """File of a shard."""
        return self.folder / array / f"{number:05d}{EXTENSION}"

    def arrays(self) -> list[str]:
        """Names of the arrays that have at least a folder."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_dir())

    def present(self, array: str) -> set[int]:
        """Numbers of the shards that are finished."""
        folder = self.folder / array
        names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208 (thousands of names, once per open)
        return {int(name.removesuffix(EXTENSION)) for name in names if name.endswith(EXTENSION) and name[0] != "."}

    def missing(self, arrays: Iterable[str]) -> list[int]:
        """Numbers of the shards that at least one of the arrays lacks."""
        wanted = set(range(self.num_shards))
        return sorted(set().union(*(wanted - self.present(array) for array in arrays)))


def open_entry(cache: Path, key: Key) -> StoreEntry | None:
    """The entry of a key, or None where there is none.

    Raises:
        KeyMismatch: the folder of that name holds other features; the fields that differ are named.
    """
    folder = cache / entry_name(key)
    if not (folder / KEY_FILE).is_file():
        return None
    entry = read_entry(folder)
    differing = differing_fields(entry.key, key)
    if differing:
        lines = "\n  ".join(differing)
        raise KeyMismatch(
            f"{folder} holds features of another key and is not used:\n  {lines}\nsomebody renamed the folder or "
            f"edited its {KEY_FILE}; delete the folder"
        )
    return entry


def create_entry(cache: Path, key: Key, about: Mapping[str, Any], shard_rows: int = SHARD_ROWS) -> StoreEntry:
    """The entry of a key, made where there is none; any number of processes may do so at once.

    Raises:
        KeyMismatch: see `open_entry`.
        OSError: it cannot be written.
    """
    found = open_entry(cache, key)
    if found is not None:
        return found
    folder = cache / entry_name(key)
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {
        "key": key,
        "rows": key["samples"]["count"],
        "shard_rows": shard_rows,
        "about": {**about, "created": now},
    }
    write_json(folder / KEY_FILE, content)
    found = open_entry(cache, key)
    assert found is not None
    return found


def read_entry(folder: Path) -> StoreEntry:
    """An entry by its folder.

    Raises:
        ValueError: its `key.json` cannot be read.
    """
    path = folder / KEY_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return StoreEntry(folder, content["key"], content["rows"], content["shard_rows"], content["about"])
    except (ValueError, KeyError, TypeError) as error:
        raise KeyMismatch(f"{path} is damaged ({error}); delete the folder {folder}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
