"""Which samples of train a seeded, stratified hold-out takes. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HOLDOUT_STREAM = 0x401D
"""Second word of the hold-out's seed, so that it shares no draws with anything else that the seed starts."""


def choose_holdout(targets: NDArray[np.int64], keys: list[str], share: float, seed: int) -> NDArray[np.bool_]:
    """Which samples a stratified hold-out takes: of each class `round(share * n)`, never all of it.

    Args:
        targets: [N] class index of each sample.
        keys: N names; the choice depends on them and not on the samples' order.
        share: between 0 and 1.
        seed: of a generator of its own, one stream per class.

    Returns:
        bool [N], true for held-out samples.
    """
    held = np.zeros(len(targets), dtype=np.bool_)
    names = np.array(keys, dtype=object)
    for target in np.unique(targets):
        members = np.flatnonzero(targets == target)
        members = members[np.argsort(names[members])]
        count = min(round(share * len(members)), len(members) - 1)
        generator = np.random.default_rng([seed, HOLDOUT_STREAM, int(target)])
        held[generator.permutation(members)[:count]] = True
    return held
