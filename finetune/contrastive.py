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
"""Logit of a class that has no text in a batch."""


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


def contrastive_loss(
    features: torch.Tensor, target: torch.Tensor, texts: ClassTexts
) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's symmetric loss of a micro-batch, each image paired with its class's prompt, and logits of its classes.

    Prompts of equal classes count as different pairs, as in the published method. A class's text is computed once.

    Args:
        features: class tokens [B, D].
        target: classes, int64 [B].
        texts: of all classes.

    Returns:
        Loss [] and logits float32 [B, C], in which classes outside the batch are far below all others.
    """
    present, of_image = torch.unique(target, return_inverse=True)  # [K], [B]
    embeddings = texts.embed(present)
    with without_autocast(features.device):  # similarities times a scale of 100 are too coarse in half precision
        images = F.normalize(texts.projection(features.float()), dim=1)
        by_class = texts.scale() * images @ embeddings.T  # [B, K]
    pairs = by_class[:, of_image]  # [B, B]: image i with the prompt of image j
    label = torch.arange(len(target), device=target.device)
    loss = (F.cross_entropy(pairs, label) + F.cross_entropy(pairs.T, label)) / 2
    logits = by_class.new_full((len(target), len(texts.tokens)), ABSENT)
    logits[:, present] = by_class.detach()
    return loss, logits


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
