"""Which layout a file has, and its tensors under our names.

Ours: `visual.*` with timm's tower names, `visual.head.*` the projection, `text.*` open_clip's text tower,
`logit_scale`, and `classifier.*` for the head of a classifier. The layout also says how features are pooled: `norm` is
a class-token tower, `fc_norm` a mean-pool one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from eva_clip.key_tables import (
    CLIP_TEXT,
    CLIP_VISION,
    NOT_WEIGHTS,
    PUBLISHED_EVA02,
    RECOMPUTED,
    Rule,
    expand,
    expand_names,
)

MAX_BLOCKS = 128
"""More transformer blocks than any tower has."""


@dataclass(frozen=True)
class Layout:
    """One way of naming tensors."""

    name: str
    marks: tuple[str, ...]
    """A file has this layout if a key begins with one of these (layouts are tried in order)."""
    vision_prefix: str
    vision_rules: list[Rule] = field(default_factory=list)


LAYOUTS = (
    Layout("open_clip with timm's tower", ("visual.trunk.",), "visual.trunk."),
    Layout(
        "open_clip or OpenAI CLIP",
        ("visual.class_embedding", "visual.conv1.", "visual.transformer."),
        "visual.",
        CLIP_VISION,
    ),
    Layout("EVA-CLIP, both towers", ("visual.",), "visual.", PUBLISHED_EVA02),
    Layout("CLIP vision tower", ("class_embedding", "conv1."), "", CLIP_VISION),
    Layout("vision tower", ("cls_token", "pos_embed", "patch_embed.", "blocks."), "", PUBLISHED_EVA02),
)


@dataclass
class Renamed:
    """Tensors of a file under our names."""

    layout: str
    kind: str
    """"clip" (both towers), "vision" (an encoder), "classifier" (an encoder with a class head)."""
    pool: str
    """"cls" or "gap"."""
    tensors: dict[str, torch.Tensor]
    file_names: dict[str, str]
    """Our name to the file's, for every tensor."""
    ignored: list[str]
    """Keys of the file that are no weights, or that are computed."""


def rename_tensors(
    tensors: Mapping[str, torch.Tensor], projections: Iterable[tuple[int, int]], kind: str = ""
) -> Renamed:
    """Detect the layout of a file and put its tensors under our names.

    Args:
        tensors: by the file's names, wrappers and "module." already taken off.
        projections: shapes (embed_dim, width) of the known models' projections: a bare `head.weight` of such a shape
            is a projection, any other a class head.
        kind: "classifier" or "vision" where the file itself says so (ours do), else "".

    Raises:
        ValueError: no known layout, or both poolings at once.
    """
    layout = detect_layout(tensors)
    vision_rules = {rule.theirs: rule for rule in expand(layout.vision_rules, MAX_BLOCKS)}
    if layout.vision_rules is PUBLISHED_EVA02 and not _has_split_queries(tensors):
        vision_rules = {}  # EVA-01 and bigE keep q_bias and v_bias beside one fused qkv
    text_rules = {rule.theirs: rule for rule in expand(CLIP_TEXT, MAX_BLOCKS)}
    recomputed = expand_names(RECOMPUTED, MAX_BLOCKS)
    found = Renamed(layout.name, "vision", "cls", {}, {}, [])
    bare = layout.vision_prefix == ""
    for key, tensor in tensors.items():
        inner = key.removeprefix(layout.vision_prefix) if key.startswith(layout.vision_prefix) else None
        if key in NOT_WEIGHTS or inner in recomputed:
            found.ignored.append(key)
            continue
        rule = Rule(key, key)
        if key in ("text.logit_scale", "logit_scale"):
            rule = Rule(key, "logit_scale")
            tensor = tensor.reshape(()) if tensor.numel() == 1 else tensor
        elif not bare and key in text_rules:
            rule = text_rules[key]
        elif inner is not None:
            known = vision_rules.get(inner, Rule(inner, inner))
            rule = Rule(key, f"visual.{known.ours}", known.form)
        found.tensors[rule.ours] = rule.to_ours(tensor)
        found.file_names[rule.ours] = key
    _tell_kind_and_pool(found, set(projections), kind)
    return found


def detect_layout(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """The layout whose marks the keys bear. Raises ValueError when none fits."""
    for layout in LAYOUTS:
        if any(key.startswith(layout.marks) for key in tensors):
            return layout
    some = ", ".join(list(tensors)[:6])
    raise ValueError(
        f"its {len(tensors)} tensors have no known layout (the first: {some}); expected the names of EVA-CLIP, timm, "
        "open_clip or OpenAI CLIP"
    )


def _has_split_queries(tensors: Mapping[str, torch.Tensor]) -> bool:
    return any(re.search(r"blocks\.\d+\.(attn\.q_proj|mlp\.w1)\.", key) for key in tensors)


def _tell_kind_and_pool(found: Renamed, projections: set[tuple[int, int]], kind: str) -> None:
    names = found.tensors
    gap, cls = ("visual.fc_norm.weight" in names, "visual.norm.weight" in names)
    if gap and cls:
        raise ValueError("it holds both norm and fc_norm: a class-token and a mean-pool encoder at once; expected one")
    found.pool = "gap" if gap else "cls"
    head = names.get("visual.head.weight")
    if any(name.startswith("visual.head.1.") for name in names):
        found.kind = "classifier"
    elif any(name == "logit_scale" or name.startswith("text.") for name in names):
        found.kind = "clip"
    elif kind:
        found.kind = kind
    elif head is not None and (gap or tuple(head.shape) not in projections):
        found.kind = "classifier"
    if found.kind == "classifier":
        heads = [name for name in names if name.startswith("visual.head.")]
        for name in heads:
            ours = "classifier." + name.removeprefix("visual.head.")
            names[ours] = names.pop(name)
            found.file_names[ours] = found.file_names.pop(name)
