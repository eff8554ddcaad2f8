"""What of a classifier is trained: everything, parts of it, or low-rank adapters that provably act."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from eva_clip.classifier import Classifier
    from finetune.sections import TuneSection


def freeze(model: Classifier, section: TuneSection) -> None:
    """Leave only what a recipe trains with `requires_grad`; the head always is.

    Raises:
        ValueError: more blocks than there are, or nothing that LoRA could adapt.
    """
    tower = model.tower
    blocks = len(tower.blocks)
    if section.what == "last_blocks" and section.blocks > blocks:
        raise ValueError(f"tune.blocks is {section.blocks}; {model.spec.name} has {blocks}")
    model.requires_grad_(section.what == "all")
    if section.what == "last_blocks":
        for block in tower.blocks[blocks - section.blocks :]:
            block.requires_grad_(True)
    norms = [module for module in tower.modules() if isinstance(module, nn.LayerNorm)]
    if section.what in ("norm", "bias"):
        for norm in norms:
            norm.requires_grad_(True)
    if section.what == "bias":
        for name, parameter in tower.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(True)
    if section.what == "last_blocks":
        for norm in (tower.norm, tower.fc_norm):
            norm.requires_grad_(True)
    tower.patch_embed.requires_grad_(section.patch_embed and section.what == "all")
    model.head.requires_grad_(True)
    if section.what == "lora":
        from finetune.lora import inject_lora

        inject_lora(model, section)
