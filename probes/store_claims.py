"""Who extracts which shard: byte-range locks on one file, that the kernel releases whatever becomes of a process."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # no such locks on Windows: processes may do the same shard twice, and the last rename stays
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "lock"


class Claims:
    """Shards that this process holds; byte `number` of the lock file stands for shard `number`.

    Claims spare work and protect nothing: a shard is renamed into place whole. Where the file system has no locks every
    claim succeeds. Byte locks are not inherited by the loader's worker processes, so that none survives its holder.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)

    def take(self, number: int, count: int = 1) -> bool:
        """Claim `count` shards from `number` on; false when another process holds one of them."""
        if fcntl is not None:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count, number)
            except (BlockingIOError, PermissionError):
                return False
            except OSError:
                pass  # no locks here
        return True

    def release(self, number: int) -> None:
        """Give a shard back."""
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
