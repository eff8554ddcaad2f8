"""Names and shapes that a model, or a part of it, needs from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from eva_clip.spec_types import ModelSpec

if TYPE_CHECKING:
    from eva_clip.checkpoints import Checkpoint


def expected_tensors(spec: ModelSpec, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Tensors, on the meta device and under our names, that a complete file of `checkpoint`'s kind holds.

    A vision file may come with or without its projection, so that is expected only where it is there.
    """
    from eva_clip.classifier import Classifier, classifier_state
    from eva_clip.models import EvaCLIP
    from eva_clip.towers import build_vision_tower

    with torch.device("meta"):
        if checkpoint.kind == "clip":
            return dict(EvaCLIP(spec).state_dict())
        if checkpoint.kind == "classifier":
            head = "bn_linear" if "classifier.1.weight" in checkpoint.tensors else "linear"
            classes = checkpoint.num_classes or 1
            return classifier_state(Classifier(spec, classes, pool=checkpoint.pool, head=head))
        projects = any(name.startswith("visual.head.") for name in checkpoint.tensors)
        pool = "avg" if checkpoint.pool == "gap" else "token"
        tower = build_vision_tower(spec, num_classes=None if projects else 0, global_pool=pool)
        return {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
