"""Primitive features of a vision tower, any number of them from one forward pass, and the pools made of them.

Kinds, all after the tower's final norm (width D): "cls", the class token [B, D]; "gap", the mean of the patch tokens
[B, D] (after `fc_norm` in a mean-pool tower); "projected", the class token in the image-text space [B, embed_dim];
"cls_last<n>", the class tokens of the last n blocks, first to last, concatenated [B, n·D] (as in DINOv2's linear
evaluation). A pool is kinds joined by "+", such as "cls+gap" or "cls_last4+gap". Imports no torch.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eva_clip.class_token import class_token_alone

if TYPE_CHECKING:
    import torch
    from timm.models.eva import Eva

    from eva_clip.spec_types import ModelSpec

POOL_NAMES = "cls, gap, cls+gap, cls_last<n>, cls_last<n>+gap"
KIND_NAMES = "cls, gap, projected, cls_last<n>"
_LAST = re.compile(r"cls_last([1-9]\d*)")


def pool_kinds(pool: str, projected: bool = False) -> tuple[str, ...]:
    """The kinds whose concatenation is a pool.

    Raises:
        ValueError: unknown pool, or a projection of another pool than "cls".
    """
    kinds = tuple(pool.split("+"))
    valid = (kinds[0] == "cls" or _LAST.fullmatch(kinds[0])) and kinds[1:] in ((), ("gap",))
    if not valid and kinds != ("gap",):
        raise ValueError(f"unknown pool {pool!r}; expected one of {POOL_NAMES}")
    if projected and pool != "cls":
        raise ValueError(
            f"projected features need pool 'cls', found {pool!r}: the projection was trained on the class "
            "token alone; set pool to 'cls' or projected to false"
        )
    return ("projected",) if projected else kinds


def check_kinds(kinds: Sequence[str]) -> None:
    """Find unknown or repeated kinds. Raises ValueError naming them."""
    unknown = [kind for kind in kinds if kind not in ("cls", "gap", "projected") and not last_blocks(kind)]
    if unknown:
        raise ValueError(f"unknown feature kind(s) {', '.join(map(repr, unknown))}; expected {KIND_NAMES}")
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"feature kinds are repeated in {', '.join(kinds)}; name each once")


def last_blocks(kind: str) -> int:
    """n of "cls_last<n>"; 0 for every other kind."""
    matched = _LAST.fullmatch(kind)
    return int(matched.group(1)) if matched else 0


def kind_width(kind: str, spec: ModelSpec) -> int:
    """Width of a kind's features for a model.

    Raises:
        ValueError: more blocks than the model has.
    """
    if kind == "projected":
        return spec.embed_dim
    count = last_blocks(kind)
    if count > spec.vision.layers:
        raise ValueError(f"{kind!r} needs {count} blocks; {spec.name} has {spec.vision.layers}")
    return spec.vision.width * max(1, count)


def take_kinds(tower: Eva, images: torch.Tensor, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
    """One forward pass: normalised images [B, 3, H, W] to features by kind, in the order of `kinds`.

    `tower` must still have its projection (`head`) where "projected" is asked for.
    """
    import torch

    count = max((last_blocks(kind) for kind in kinds), default=0)
    if count:
        tokens, levels = tower.forward_intermediates(
            images, indices=count, return_prefix_tokens=True, norm=True, output_fmt="NLC"
        )
        last = [prefix[:, 0] for _, prefix in levels]  # n tensors [B, D], the final block's last
    else:
        alone = class_token_alone(tower) if "gap" not in kinds else contextlib.nullcontext()
        with alone:
            tokens, last = tower.forward_features(images), []  # [B, 1 + N, D]
    found = {}
    for kind in kinds:
        if kind == "cls":
            found[kind] = tokens[:, 0]
        elif kind == "gap":
            found[kind] = tower.fc_norm(tokens[:, 1:].mean(dim=1))
        elif kind == "projected":
            found[kind] = tower.head(tokens[:, 0])
        else:
            found[kind] = torch.cat(last[len(last) - last_blocks(kind) :], dim=1)
    return found
