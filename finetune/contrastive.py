"""Contrastive fine-tuning (FLYP, Goyal et al. 2023): images against the prompts of their classes, both towers trained.

The classifier is the classes' texts throughout: zero-shot before the first step, zero-shot of the trained towers after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from eva_clip.classifier import without_autocast

if TYPE_CHECKING:
    from eva_clip.classifier import Classifier
    from eva_clip.models import EvaCLIP
    from finetune.module import FinetuneModule

MAX_SCALE = math.log(100)
"""CLIP's bound on the logarithm of its scale."""
ABSENT = -1e4
"""Logit of a pair that is none: its share of a softmax is 0 in fp32."""


class ClassTexts(nn.Module):
    """Text tower, image projection and scale, with one prompt of every class.

    Args:
        towers: whose text tower, projection and scale are taken, not copied.
        texts: one prompt a class.
        length: usual length of an image's embedding; see `finetune.head_start.from_texts`.
    """

    tokens: torch.Tensor

    def __init__(self, towers: EvaCLIP, texts: Sequence[str], length: float) -> None:
        super().__init__()
        from eva_clip.tokenizer import tokenize

        self.text = towers.text
        self.projection: nn.Linear = towers.visual.head
        self.logit_scale = towers.logit_scale
        self.length = length
        self.register_buffer("tokens", tokenize(list(texts), towers.spec.text.context_length), persistent=False)

    def embed_images(self, features: torch.Tensor) -> torch.Tensor:
        """Class tokens [B, D] to unit-length embeddings float32 [B, E]."""
        with without_autocast(features.device):
            return F.normalize(self.projection(features.float()), dim=1)

    def embed(self, classes: torch.Tensor) -> torch.Tensor:
        """Class numbers int64 [K] to unit-length embeddings float32 [K, E]."""
        return F.normalize(self.text(self.tokens[classes]).float(), dim=1)

    def scale(self) -> torch.Tensor:
        """Factor of cosines, at most 100."""
        return self.logit_scale.clamp(max=MAX_SCALE).exp()

    @torch.no_grad()
    def write_head(self, head: nn.Linear) -> None:
        """Make a linear layer on the class token [B, D] the zero-shot classifier of the present towers, in place."""
        with torch.autocast(self.tokens.device.type, enabled=False):
            embeddings = [self.embed(part) for part in torch.arange(len(self.tokens)).split(256)]  # type: ignore[no-untyped-call]
            weight, bias = text_head(torch.cat(embeddings), self.projection, self.scale() / self.length)
        head.weight.copy_(weight)
        head.bias.copy_(bias)


def text_head(texts: torch.Tensor, projection: nn.Linear, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [C, D] and bias [C] on the class token from class embeddings [C, E] and the image projection."""
    scaled = scale * texts
    bias = torch.zeros_like(scaled[:, 0]) if projection.bias is None else scaled @ projection.bias
    return (scaled @ projection.weight).float(), bias.float()


def contrastive_losses(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """CLIP's symmetric loss of every pair, [B]; its mean over the known pairs is CLIP's loss.

    Prompts of equal classes count as different pairs, as in the published method.

    Args:
        images: embeddings float32 [B, E] of unit length.
        texts: of each image's prompt, [B, E].
        scale: factor of cosines, [].
        known: bool [B]; other rows stand for images that could not be read, and take no part.
    """
    with without_autocast(images.device):  # similarities times a scale of 100 are too coarse in half precision
        pairs = scale * images @ texts.T  # image i with the prompt of image j
    pairs = pairs.masked_fill(~(known & known[:, None]), ABSENT)
    label = torch.arange(len(images), device=images.device)
    both = F.cross_entropy(pairs, label, reduction="none") + F.cross_entropy(pairs.T, label, reduction="none")
    return (both / 2).where(known, 0.0)


def attach_texts(model: Classifier, texts: ClassTexts) -> None:
    """Let a classifier on the class token be its texts: they train along, and the head follows them."""
    model.add_module("texts", texts.requires_grad_(True))
    model.head.requires_grad_(False)
    refresh_head(model)


def texts_of(model: Classifier) -> ClassTexts | None:
    """The texts of a classifier that has them."""
    texts = getattr(model, "texts", None)
    return texts if isinstance(texts, ClassTexts) else None


def refresh_head(model: Classifier) -> None:
    """Bring the head up to the present towers; nothing without texts."""
    texts = texts_of(model)
    if texts is not None:
        assert isinstance(model.head, nn.Linear)
        texts.write_head(model.head)


class TextHeads:
    """Heads of a scoring pass: computed once for each set of weights, not for each batch."""

    def __init__(self) -> None:
        self._heads: dict[str, dict[str, torch.Tensor]] = {}

    def clear(self) -> None:
        """Forget; the weights have moved."""
        self._heads.clear()

    def put(self, module: FinetuneModule, prefix: str) -> None:
        """Give the model the head of the weights that it has now, which are those of `prefix`."""
        if texts_of(module.model) is None:
            return
        if prefix not in self._heads:
            refresh_head(module.model)
            state = module.model.head.state_dict()
            self._heads[prefix] = {name: tensor.clone() for name, tensor in state.items()}
        module.model.head.load_state_dict(self._heads[prefix])
