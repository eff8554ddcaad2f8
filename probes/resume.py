"""What may differ between a run and its continuation: nothing that its result depends on. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

FREE_KEYS = {
    "run.dir": "where the run lies",
    "run.on_existing": "asks for the continuation",
    "data.workers": "views are drawn from (seed, epoch, image), whoever decodes them",
    "data.download": "the images that are there are compared by fingerprint",
    "features.cache": "stored features are found by all that changes their content",
    "trainer.timeout_s": "how long processes wait for each other",
    "trainer.non_finite": "says what happens at a step that is not finite, and the steps made stay as they are",
    "checkpoint.every_steps": "when the state is saved, not what it is",
    "checkpoint.keep": "as every_steps",
}
"""Keys of a recipe that a continuation may change, and why each cannot change what the run measures."""
FREE_SECTIONS = {"expected": "what is measured is compared with it, and does not depend on it"}


def changed_keys(stored: Any, asked: Any) -> list[str]:
    """Dotted keys, sorted, in which two recipes of one schema differ, other than the free ones."""
    before = dataclasses.asdict(stored)
    return sorted(
        f"{section}.{key}"
        for section, values in dataclasses.asdict(asked).items()
        for key, value in values.items()
        if section not in FREE_SECTIONS and f"{section}.{key}" not in FREE_KEYS and before[section][key] != value
    )


def describe_changes(stored: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions of data, as `probes.splits.describe` gives them; empty for the same data.

    Returns:
        Sentences without a full stop: of the classes, then of each split its number of images, or its files where
        the numbers are the same.
    """
    changes = _class_changes(stored["classes"], found["classes"])
    for name in dict.fromkeys([*stored["splits"], *found["splits"]]):
        before, now = stored["splits"].get(name), found["splits"].get(name)
        if before is None or now is None:
            changes.append(f"there was {'no' if before is None else 'a'} split {name}, and now there is {_one(now)}")
        elif before["fingerprint"] != now["fingerprint"]:
            changes.append(_split_changes(name, before, now))
    return changes


def _one(split: object) -> str:
    return "none" if split is None else "one"


def _class_changes(before: Sequence[str], now: Sequence[str]) -> list[str]:
    gone, come = (
        [name for name in before if name not in set(now)],
        [name for name in now if name not in set(before)],
    )
    if not gone and not come:
        return [] if list(before) == list(now) else ["the classes have another order"]
    parts = [f"{what}: {_some(names)}" for what, names in (("gone", gone), ("new", come)) if names]
    renamed = " (renamed?)" if len(gone) == len(come) else ""
    return [f"the classes are others, {'; '.join(parts)}{renamed}"]


def _split_changes(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if before["count"] != now["count"]:
        return f"{name} had {before['count']:,} images and has {now['count']:,}"
    counts, others = before["per_class"], now["per_class"]
    moved = [label for label in counts if label in others and counts[label] != others[label]]
    if moved:
        return f"{name} has as many images, but other numbers of class {_some(moved)}"
    return f"{name} has as many images, but other names, labels, sizes or times of its files (fingerprint)"


def _some(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(repr(name) for name in names[:shown]) + more
