"""Image classifiers on a vision tower, with the published definitions of feature and head."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from eva_clip.checkpoints import Checkpoint, LoadReport, copy_tensors, match, open_checkpoint
from eva_clip.hub import resolve_weights
from eva_clip.spec_types import ModelSpec
from eva_clip.specs import get_model_spec
from eva_clip.towers import build_vision_tower, pool_tokens

if TYPE_CHECKING:
    from timm.models.eva import Eva

POOLS = ("cls", "gap")
HEADS = ("linear", "bn_linear")


class Classifier(nn.Module):
    """A vision tower and a head: images [B, 3, H, W] to logits [B, num_classes].

    The feature is the final-norm class token ("cls"), or the mean of the patch tokens without the final norm, then
    `fc_norm` ("gap", the published fine-tunes'; the encoder's own `norm` is discarded). Heads are initialised as
    published: "bn_linear" is BatchNorm1d(affine=False, eps=1e-6), then Linear with weights of standard deviation 0.01;
    "linear" is Linear with weights of standard deviation 2e-5; biases are 0.
    """

    def __init__(
        self,
        spec: ModelSpec,
        num_classes: int,
        *,
        pool: str = "cls",
        head: str = "linear",
        drop_path_rate: float | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.pool = pool
        self.num_classes = num_classes
        self.tower: Eva = build_vision_tower(
            spec,
            num_classes=0,
            global_pool="avg" if pool == "gap" else "token",
            drop_path_rate=drop_path_rate,
        )
        self.head = build_class_head(head, spec.vision.width, num_classes)
        self.load_report: LoadReport | None = None

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [B, 3, H, W] to pooled features [B, width]."""
        tokens = self.tower.forward_features(images.to(self.tower.cls_token.dtype))  # [B, 1 + N, width]
        return pool_tokens(self.tower, tokens, self.pool)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [B, 3, H, W] to logits [B, num_classes] in the dtype of the head's weights, fp32 as built.

        Under autocast too: the tower may compute in bf16, but logits of bf16 lie so far apart that many tie.
        """
        features = self.forward_features(images)
        with without_autocast(features.device):
            logits: torch.Tensor = self.head(features.to(next(self.head.parameters()).dtype))
        return logits


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context in which an autocast around it has no effect."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def build_class_head(kind: str, feature_dim: int, num_classes: int) -> nn.Module:
    """A head from features [B, feature_dim] to logits [B, num_classes]; see `Classifier`."""
    linear = nn.Linear(feature_dim, num_classes)
    nn.init.normal_(linear.weight, std=0.01 if kind == "bn_linear" else 2e-5)
    nn.init.zeros_(linear.bias)
    if kind == "linear":
        return linear
    return nn.Sequential(nn.BatchNorm1d(feature_dim, affine=False, eps=1e-6), linear)


def classifier_state(model: Classifier) -> dict[str, torch.Tensor]:
    """A classifier's tensors under our names: `visual.*` and `classifier.*`."""
    state = {f"visual.{name}": tensor for name, tensor in model.tower.state_dict().items()}
    return state | {f"classifier.{name}": tensor for name, tensor in model.head.state_dict().items()}


def build_classifier(
    name: str,
    num_classes: int,
    *,
    image_size: int | None = None,
    pool: str = "cls",
    head: str = "linear",
    checkpoint: str | Path | None = None,
    drop_path_rate: float | None = None,
    pos_embed: str = "eva",
    ema: bool = False,
) -> Classifier:
    """Build a classifier, in fp32 and in eval mode, from any weight file or from nothing.

    The encoder is loaded in full or not at all. A head of the same kind and class count is loaded with it; otherwise
    the head is fresh, and `load_report.missing` says so. So is `fc_norm` when a mean-pool classifier starts from a
    class-token encoder (the published start of a fine-tune).

    Args:
        name: official name or alias of the model.
        num_classes: outputs.
        image_size: input side in pixels; None for the model's own. Position embeddings are resized once, here.
        pool: "cls" or "gap".
        head: "linear" or "bn_linear".
        checkpoint: a weight file, "pretrained" for the published CLIP weights, or None for random weights.
        drop_path_rate: stochastic depth of the last block while training; None takes the model's.
        pos_embed: how position embeddings of another grid are resized, "eva" or "timm".
        ema: take the averaged weights of a training checkpoint.

    Raises:
        ValueError: unknown name, pool or head; a file that does not fit; or a file whose layout pools otherwise.
        FileNotFoundError: no such file.
    """
    if pool not in POOLS:
        raise ValueError(f"unknown pool {pool!r}; expected one of {', '.join(POOLS)}")
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; expected one of {', '.join(HEADS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected at least 1")
    spec = get_model_spec(name)
    spec = spec.at_image_size(image_size) if image_size else spec
    model = Classifier(spec, num_classes, pool=pool, head=head, drop_path_rate=drop_path_rate).eval()
    if checkpoint is not None:
        load_classifier(model, resolve_weights(spec, checkpoint), pos_embed=pos_embed, ema=ema)
    return model


def load_classifier(model: Classifier, path: str | Path, *, pos_embed: str = "eva", ema: bool = False) -> LoadReport:
    """Load a file of any layout into a classifier, in place; see `build_classifier`."""
    file = open_checkpoint(path, model_name=model.spec.name, ema=ema)
    check_pool(file, model.pool)
    target = classifier_state(model)
    heads = [name for name in file.tensors if name.startswith("classifier.")]
    fresh: tuple[str, ...] = () if heads else ("classifier.",)
    if any(name not in target or file.tensors[name].shape != target[name].shape for name in heads):
        for name in heads:  # a head of other classes: reported as unexpected, ours stays fresh
            file.tensors["other_" + name] = file.tensors.pop(name)
            file.file_names["other_" + name] = file.file_names.pop(name)
        fresh = ("classifier.",)
    spare: tuple[str, ...] = ("text.", "logit_scale", "visual.head.", "other_classifier.")
    if model.pool == "gap" and file.pool == "cls":
        fresh, spare = (*fresh, "visual.fc_norm."), (*spare, "visual.norm.")
    report, tensors = match(file, target, model.spec, may_miss=fresh, may_spare=spare, pos_embed=pos_embed)
    copy_tensors(model.tower, _under(tensors, "visual."))
    copy_tensors(model.head, _under(tensors, "classifier."))
    model.load_report = report
    return report


def check_pool(file: Checkpoint, pool: str) -> None:
    """Refuse a file whose layout pools otherwise than asked. Raises ValueError."""
    if file.pool == "gap" and pool != "gap":
        raise ValueError(
            f"{file.path} is a mean-pool file (it has fc_norm and no norm) and was asked for with pool {pool!r}, which "
            "would score wrongly; ask for pool='gap'"
        )
    if file.kind == "classifier" and file.pool == "cls" and pool == "gap":
        raise ValueError(
            f"{file.path} is a class-token classifier (it has norm and no fc_norm) and was asked for with pool 'gap', "
            "which would score wrongly; ask for pool='cls'"
        )


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
