"""Progress: a rich bar on a terminal, plain lines elsewhere. Imports no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

PLAIN_INTERVAL_S = 10.0
"""Seconds between two plain lines."""


def is_terminal() -> bool:
    """Whether stdout is shown to a person as it is written."""
    return sys.stdout.isatty()


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield `items`, showing how many of `total` are done and how long the rest will take."""
    if is_terminal():
        from rich.progress import track as rich_track

        yield from rich_track(items, description=description, total=total)
        return
    start = last = time.monotonic()
    done = 0
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL_S:
            last = now
            remaining = (now - start) / done * (total - done)
            print(f"{description}: {done}/{total}, {remaining:.0f} s left", flush=True)
    print(f"{description}: {done}/{total} in {time.monotonic() - start:.1f} s", flush=True)
