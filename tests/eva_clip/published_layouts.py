"""The published file layouts, by rule: names and shapes of every official file kind."""

from __future__ import annotations

from dataclasses import dataclass

Shapes = dict[str, list[int]]


@dataclass(frozen=True)
class Sizes:
    """What the shapes follow from."""

    depth: int = 40
    width: int = 1408
    mlp: int = 6144
    patch: int = 14
    grid: int = 16
    embed: int = 1024
    text_depth: int = 12
    text_width: int = 768
    classes: int = 1000

    @property
    def rows(self) -> int:
        return self.grid**2 + 1


def encoder(size: Sizes, norm: str = "norm") -> Shapes:
    """The bare vision tower."""
    d = size.width
    keys: Shapes = {
        "cls_token": [1, 1, d],
        "pos_embed": [1, size.rows, d],
        "patch_embed.proj.weight": [d, 3, size.patch, size.patch],
        "patch_embed.proj.bias": [d],
        f"{norm}.weight": [d],
        f"{norm}.bias": [d],
    }
    block = {
        "norm1.weight": [d],
        "norm1.bias": [d],
        "attn.q_bias": [d],
        "attn.v_bias": [d],
        "attn.qkv.weight": [3 * d, d],
        "attn.proj.weight": [d, d],
        "attn.proj.bias": [d],
        "norm2.weight": [d],
        "norm2.bias": [d],
        "mlp.fc1.weight": [size.mlp, d],
        "mlp.fc1.bias": [size.mlp],
        "mlp.fc2.weight": [d, size.mlp],
        "mlp.fc2.bias": [d],
    }
    return keys | {f"blocks.{i}.{name}": shape for i in range(size.depth) for name, shape in block.items()}


def full_clip(size: Sizes, scale: str = "text.logit_scale") -> Shapes:
    """Both towers; the later repository keeps `logit_scale` at the top."""
    d, w = size.width, size.text_width
    vision = encoder(size) | {"head.weight": [size.embed, d], "head.bias": [size.embed]}
    text = {
        "positional_embedding": [77, w],
        "text_projection": [w, size.embed],
        "token_embedding.weight": [49408, w],
        "ln_final.weight": [w],
        "ln_final.bias": [w],
    }
    block = {
        "ln_1.weight": [w],
        "ln_1.bias": [w],
        "attn.in_proj_weight": [3 * w, w],
        "attn.in_proj_bias": [3 * w],
        "attn.out_proj.weight": [w, w],
        "attn.out_proj.bias": [w],
        "ln_2.weight": [w],
        "ln_2.bias": [w],
        "mlp.c_fc.weight": [4 * w, w],
        "mlp.c_fc.bias": [4 * w],
        "mlp.c_proj.weight": [w, 4 * w],
        "mlp.c_proj.bias": [w],
    }
    for i in range(size.text_depth):
        text |= {f"transformer.resblocks.{i}.{name}": shape for name, shape in block.items()}
    named = {f"visual.{k}": s for k, s in vision.items()} | {f"text.{k}": s for k, s in text.items()}
    return named | {scale: []}


def linear_probe(size: Sizes) -> Shapes:
    """Class-token encoder, BatchNorm without affine, Linear."""
    d = size.width
    return encoder(size) | {
        "head.0.running_mean": [d],
        "head.0.running_var": [d],
        "head.0.num_batches_tracked": [],
        "head.1.weight": [size.classes, d],
        "head.1.bias": [size.classes],
    }


def fine_tuned(size: Sizes) -> Shapes:
    """Mean-pool encoder and Linear."""
    head = {"head.weight": [size.classes, size.width], "head.bias": [size.classes]}
    return encoder(size, norm="fc_norm") | head
