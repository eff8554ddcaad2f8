"""Low-rank adapters through peft, with proof that each of them acts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from eva_clip.classifier import Classifier
    from finetune.sections import TuneSection


def inject_lora(model: Classifier, section: TuneSection) -> None:
    """Put adapters around the layers whose names end in one of `section.lora_targets`, in place.

    timm's EVA attention with query and value biases calls `F.linear` with the weight of `qkv`, past any wrapper around
    the layer: an adapter there would count as trainable and change nothing. Attention is switched to calling the layer
    and adding the biases, which is equal up to rounding; then every adapter is tried (`check_adapters`).

    Raises:
        ValueError: peft is not installed, no layer has such a name, or an adapter does not act.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            "tune.what is 'lora' and peft is not installed; pip install 'eva-clip-transfer[lora]'"
        ) from error
    names = [name for name, layer in model.tower.named_modules() if isinstance(layer, nn.Linear)]
    targets = [name for name in names if any(name.endswith(target) for target in section.lora_targets)]
    if not targets:
        raise ValueError(
            f"tune.lora_targets {section.lora_targets} match no layer of {model.spec.name}; it has such as "
            f"{[name for name in names if name.startswith('blocks.0.')]}"
        )
    for attention in model.tower.modules():
        if getattr(attention, "qkv", None) is not None and getattr(attention, "q_bias", None) is not None:
            attention.qkv_bias_separate = True
    config = LoraConfig(r=section.lora_rank, lora_alpha=section.lora_alpha, target_modules=targets)
    inject_adapter_in_model(config, model.tower)
    check_adapters(model)


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices B of all adapters by name; an adapter changes nothing while its B is 0, as it starts."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_B." in name}


def check_adapters(model: Classifier) -> None:
    """Prove that every adapter takes part in the features: its gradient is not zero and moving it moves them.

    Raises:
        ValueError: adapters that do not act, by name.
    """
    matrices = adapters_of(model)
    parameter = next(model.parameters())
    if parameter.is_meta:
        return
    size, training = model.spec.vision.image_size, model.training
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(parameter.device)
    model.eval()
    model.zero_grad(set_to_none=True)
    direction = torch.randn(model.spec.vision.width, generator=torch.Generator().manual_seed(1)).to(parameter.device)
    features = model.forward_features(images)
    if features.requires_grad:
        torch.autograd.backward((features @ direction).sum())
    silent = [name for name, b in matrices.items() if b.grad is None or not b.grad.any()]
    moved = dict.fromkeys(matrices, False)
    with torch.no_grad():
        for name, b in matrices.items():
            b.add_(0.1)
            moved[name] = not torch.equal(model.forward_features(images), features)
            b.zero_()
    model.zero_grad(set_to_none=True)
    model.train(training)
    silent += [name for name, has in moved.items() if not has and name not in silent]
    if silent:
        raise ValueError(
            f"{len(silent)} of {len(matrices)} adapters do not act on the features, the first {silent[0]}: the layer's "
            "forward is bypassed; choose other tune.lora_targets"
        )


def merge_lora(model: Classifier) -> Classifier:
    """Add every adapter into its layer and take the wrappers away, in place; names are the plain model's again."""
    for name, layer in list(model.tower.named_modules()):
        if hasattr(layer, "lora_B") and hasattr(layer, "get_base_layer"):
            wrapper: Any = layer
            wrapper.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.tower.get_submodule(parent), last, wrapper.get_base_layer())
    return model
