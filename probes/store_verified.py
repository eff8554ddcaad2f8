"""Which shards were compared with their checksums and have not been touched since, over all processes. No torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from probes.store import StoreEntry, write_json

VERIFIED_FILE = "verified.json"


class VerifiedShards:
    """What an entry remembers of its shards: size, times of change and inode at the moment of the last comparison.

    Whatever writes to a file, or replaces it, changes one of these (the time of change cannot be set). Damage below the
    file system, which changes none, is found by `python -m probes.features verify`, which believes no memory.
    """

    def __init__(self, entry: StoreEntry) -> None:
        self._folder = entry.folder
        self._known = self._read()

    def __contains__(self, path: Path) -> bool:
        return self._known.get(self._name(path)) == _stamp(path)

    def stamp(self, paths: Iterable[Path]) -> dict[str, list[int]]:
        """What `remember` takes; made before the comparison, so that a change during it is not missed."""
        return {self._name(path): _stamp(path) for path in paths}

    def remember(self, stamps: dict[str, list[int]]) -> None:
        """Note shards whose checksums were right; a store that cannot be written to is none the worse."""
        self._known = {**self._read(), **stamps}
        with contextlib.suppress(OSError):
            write_json(self._folder / VERIFIED_FILE, self._known)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _read(self) -> dict[str, list[int]]:
        try:
            content = json.loads((self._folder / VERIFIED_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
