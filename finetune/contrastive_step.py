"""The contrastive objective of an optimizer step: every image against every other's prompt, over all micro-batches.

A micro-batch's own loss would have its images compete with each other alone; how many they are is decided by memory.
Here embeddings wait for the last micro-batch, the loss is that of the whole global batch, and the backward pass
computes each micro-batch's activations again (gradient caching, Gao et al. 2021), with its own random state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from finetune.contrastive import ABSENT, ClassTexts, contrastive_losses
from finetune.no_images import zero_of
from finetune.objective import Scored

if TYPE_CHECKING:
    from eva_clip.classifier import Classifier


class ContrastiveStep:
    """Gathers the micro-batches of one optimizer step.

    Args:
        model: of image and class tokens.
        texts: its texts.
    """

    def __init__(self, model: Classifier, texts: ClassTexts) -> None:
        self.model, self.texts = model, texts
        self._rows: list[torch.Tensor] = []
        self._targets: list[torch.Tensor] = []
        self._read: list[int] = []

    def score(
        self, images: torch.Tensor, target: torch.Tensor, size: int, part: int, parts: int, rank: int, world_size: int
    ) -> Scored:
        """Take a micro-batch: the last gives the losses of all this process's images, those before it a 0.

        The total is the sum over the images of all processes, with this process's part of its gradient: over the
        processes these add up to the whole. Logits of classes whose text has no part in the step are far below others.

        Args:
            images: [b, 3, H, W].
            target: classes, int64 [b].
            size: images of the micro-batch, the unreadable ones too; the same for all.
            part: its number within the step.
            parts: micro-batches of a step.
            rank: of this process.
            world_size: number of processes.
        """
        self._add(images, target, size, alone=parts == 1)
        if part + 1 == parts:
            return self._finish(rank, world_size)
        empty = target[:0]
        return Scored(torch.zeros((), device=images.device, requires_grad=True), empty, empty, empty)

    def _add(self, images: torch.Tensor, target: torch.Tensor, size: int, *, alone: bool) -> None:
        """Embed a micro-batch; the activations of a step's only one may stay."""
        if len(images):
            rows = self._embed(images) if alone else recomputed(self._embed, images)
        else:
            rows = zero_of(self.model, self._embed).expand(1, self.texts.projection.out_features)
        self._rows.append(F.pad(rows, (0, 0, 0, size - len(rows))))
        self._targets.append(F.pad(target, (0, size - len(target)), value=-1))
        self._read.append(len(target))

    def _finish(self, rank: int, world_size: int) -> Scored:
        """Losses over all micro-batches and processes, which call this together; N rows a process, B in all."""
        size, parts = len(self._rows[0]), len(self._rows)
        rows, target = torch.cat(self._rows), torch.cat(self._targets)  # [N, E], [N]
        mine = slice(rank * len(rows), (rank + 1) * len(rows))
        images = gather_rows(rows, rank, world_size)  # [B, E]
        targets = gather_rows(target, rank, world_size)  # [B]
        known, targets = targets >= 0, targets.clamp(min=0)
        texts, of_image, classes = self._embed_texts(
            targets[mine], targets, rank, world_size, chunk=size, alone=parts == 1
        )
        with torch.autocast(rows.device.type, enabled=False):
            scale = self.texts.scale().float()
            scale = scale.detach() + (scale - scale.detach()) / world_size  # every process has its whole gradient
            losses = contrastive_losses(images, texts[of_image], scale, known)
            found = (scale * rows @ texts.T).detach()  # [N, K]
        if len(classes) != len(self.texts.tokens):
            found = found.masked_fill(~known, ABSENT)  # texts are those of the images
            by_class = found.new_full((len(rows), len(self.texts.tokens)), ABSENT)
            found = by_class.scatter_reduce(1, classes.expand(len(rows), -1), found, "amax")
        own = [slice(part * size, part * size + read) for part, read in enumerate(self._read)]
        result = Scored(
            losses.sum(),
            *(torch.cat([values[some] for some in own]) for values in (losses.detach()[mine], found, target)),
        )
        self._rows, self._targets, self._read = [], [], []
        return result

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        return self.texts.embed_images(self.model.forward_features(images))

    def _embed_texts(
        self, target: torch.Tensor, targets: torch.Tensor, rank: int, world_size: int, *, chunk: int, alone: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Texts [K, E] of the step's images, the row [B] of each, and the class [K] of each row.

        The work is shared out. Which classes the images have is never asked of the device: where there are fewer
        classes than images all are embedded, else every image's own.
        """
        count = len(self.texts.tokens)
        if count > len(targets):
            own, of_image, classes = target, torch.arange(len(targets), device=target.device), targets
        else:
            share = -(-count // world_size)
            own = torch.arange(rank * share, (rank + 1) * share, device=target.device).clamp(max=count - 1)
            of_image, classes = targets, torch.arange(count, device=target.device)
        if alone and len(own) <= chunk:
            rows = self.texts.embed(own)
        else:
            rows = torch.cat([recomputed(self.texts.embed, part) for part in torch.split(own, chunk)])
        return gather_rows(rows, rank, world_size)[: len(classes)], of_image, classes


def recomputed(part: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """`part(inputs)`, whose activations are computed anew for the backward pass, with the same random draws."""
    result: torch.Tensor = checkpoint(part, inputs, use_reentrant=False)
    return result


def gather_rows(own: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """Rows of all processes in their order; gradients flow to this process's own."""
    if world_size == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(world_size)]
    torch.distributed.all_gather(parts, own.detach().contiguous())
    parts[rank] = own
    return torch.cat(parts)
