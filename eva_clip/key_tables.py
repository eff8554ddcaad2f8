"""Key tables: what every other layout calls the tensors that ours calls by timm's names.

A table is a list of rules; `{i}` stands for a block's number. Names that no rule mentions are the same in both layouts
(all of EVA-01's are). Read from left to right a table loads; from right to left it saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Form = Literal["same", "transpose", "row", "token"]
"""How a tensor's form differs: [A, B] against [B, A]; [N, D] against [1, N, D]; [D] against [1, 1, D]."""


@dataclass(frozen=True)
class Rule:
    """One name in another layout, and ours."""

    theirs: str
    ours: str
    form: Form = "same"

    def to_ours(self, tensor: torch.Tensor) -> torch.Tensor:
        """Their tensor in our form; one of an unexpected number of dimensions is left for the shape check."""
        if self.form == "transpose" and tensor.ndim == 2:
            return tensor.T
        if self.form == "row" and tensor.ndim == 2:
            return tensor[None]
        if self.form == "token" and tensor.ndim == 1:
            return tensor[None, None]
        return tensor

    def to_theirs(self, tensor: torch.Tensor) -> torch.Tensor:
        """Our tensor in their form."""
        if self.form == "transpose":
            return tensor.T
        if self.form == "row":
            return tensor[0]
        return tensor[0, 0] if self.form == "token" else tensor


def _both(theirs: str, ours: str) -> list[Rule]:
    """A layer's weight and bias."""
    return [Rule(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias")]


PUBLISHED_EVA02 = [
    Rule("blocks.{i}.attn.q_bias", "blocks.{i}.attn.q_proj.bias"),
    Rule("blocks.{i}.attn.v_bias", "blocks.{i}.attn.v_proj.bias"),
    *_both("blocks.{i}.attn.inner_attn_ln", "blocks.{i}.attn.norm"),
    *_both("blocks.{i}.mlp.w1", "blocks.{i}.mlp.fc1_g"),
    *_both("blocks.{i}.mlp.w2", "blocks.{i}.mlp.fc1_x"),
    *_both("blocks.{i}.mlp.w3", "blocks.{i}.mlp.fc2"),
    *_both("blocks.{i}.mlp.ffn_ln", "blocks.{i}.mlp.norm"),
]
"""The later EVA-CLIP repository's EVA-02 vision tower (B, L; bigE keeps EVA-01's names)."""

CLIP_VISION = [
    Rule("class_embedding", "cls_token", "token"),
    Rule("positional_embedding", "pos_embed", "row"),
    Rule("conv1.weight", "patch_embed.proj.weight"),
    *_both("ln_pre", "norm_pre"),
    *_both("transformer.resblocks.{i}.ln_1", "blocks.{i}.norm1"),
    Rule("transformer.resblocks.{i}.attn.in_proj_weight", "blocks.{i}.attn.qkv.weight"),
    Rule("transformer.resblocks.{i}.attn.in_proj_bias", "blocks.{i}.attn.qkv.bias"),
    *_both("transformer.resblocks.{i}.attn.out_proj", "blocks.{i}.attn.proj"),
    *_both("transformer.resblocks.{i}.ln_2", "blocks.{i}.norm2"),
    *_both("transformer.resblocks.{i}.mlp.c_fc", "blocks.{i}.mlp.fc1"),
    *_both("transformer.resblocks.{i}.mlp.c_proj", "blocks.{i}.mlp.fc2"),
    *_both("ln_post", "norm"),
    Rule("proj", "head.weight", "transpose"),
]
"""OpenAI's and open_clip's vision transformer."""

_BLOCK = "transformer.resblocks.{i}"
CLIP_TEXT = [
    Rule(name, f"text.{name}")
    for name in (
        "token_embedding.weight",
        "positional_embedding",
        *(f"{_BLOCK}.{part}.{kind}" for part in ("ln_1", "ln_2", "attn.out_proj") for kind in ("weight", "bias")),
        *(f"{_BLOCK}.mlp.{part}.{kind}" for part in ("c_fc", "c_proj") for kind in ("weight", "bias")),
        f"{_BLOCK}.attn.in_proj_weight",
        f"{_BLOCK}.attn.in_proj_bias",
        "ln_final.weight",
        "ln_final.bias",
        "text_projection",
    )
]
"""The text tower where it lies at the top of the file (OpenAI, open_clip's CLIP class)."""

RECOMPUTED = [
    "rope.freqs_cos",
    "rope.freqs_sin",
    "blocks.{i}.attn.rope.freqs_cos",
    "blocks.{i}.attn.rope.freqs_sin",
    "blocks.{i}.attn.relative_position_index",
]
"""Vision buffers that follow from the configuration; ours are computed, a file's are not read."""

NOT_WEIGHTS = ["input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask"]
"""Figures and masks that some files keep beside the weights."""


def expand(rules: list[Rule], blocks: int) -> list[Rule]:
    """A table with `{i}` written out for block numbers 0 to `blocks` - 1."""
    written: list[Rule] = []
    for rule in rules:
        numbers = range(blocks) if "{i}" in rule.theirs else range(1)
        written += [
            Rule(rule.theirs.replace("{i}", str(i)), rule.ours.replace("{i}", str(i)), rule.form) for i in numbers
        ]
    return written


def expand_names(names: list[str], blocks: int) -> set[str]:
    """Names with `{i}` written out."""
    return {name.replace("{i}", str(i)) for name in names for i in range(blocks)}
