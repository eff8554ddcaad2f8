"""One step of EVA01-CLIP-nano's pre-training, its hyper-parameters, and all that a checkpoint holds."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from open_clip.transformer import TextTransformer
from timm.layers import PatchDropoutWithIndices
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from eva_clip.models import build_model
from scripts.nano.augment import augment
from scripts.nano.corpus import Corpus, Numbers
from scripts.nano.objective import TrainingHeads, image_image_loss, image_text_loss, layout_loss, word_loss

MODEL = "EVA01-CLIP-nano"


@dataclass
class Settings:
    """Hyper-parameters; every one is a command-line flag."""

    steps: int = 12000
    """Optimiser steps of the full schedule."""
    hours: float = 0.0
    """Wall-clock limit of the schedule in hours, 0 for none."""
    emojis: int = 64
    """Emojis of a batch."""
    views: int = 3
    """Pictures of each emoji in a batch."""
    extra_texts: int = 192
    """Captions of other emojis, as further negatives of every picture."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    warmup: int = 300
    """Steps of linear warm-up."""
    patch_drop: float = 0.5
    """Share of patch tokens dropped in training."""
    image_weight: float = 0.5
    """Weight of the picture-to-picture loss."""
    word_weight: float = 0.3
    """Weight of the caption-word loss."""
    layout_weight: float = 2.0
    """Weight of the layout loss."""
    unmasked: float = 0.15
    """Last share of the schedule, in which no patch is dropped."""
    ema: float = 0.998
    """Decay of the averaged weights per step; the average warms up with the step."""
    seed: int = 0
    threads: int = 2
    eval_every: int = 1000
    vendors: str = ""
    """Comma-separated pre-training vendors; all by default."""


def encode_short(tower: TextTransformer, tokens: torch.Tensor) -> torch.Tensor:
    """Text embeddings [N, D] of token ids [N, T] with T below the context length.

    Exact, because attention is causal and the pooled end token comes before the padding left out.
    """
    whole = tower.attn_mask
    length = tokens.shape[1]
    tower.attn_mask = whole[:length, :length]
    try:
        embedding: torch.Tensor = tower(tokens)
    finally:
        tower.attn_mask = whole
    return embedding


class Trainer:
    """Everything that a checkpoint holds, and one step of it."""

    def __init__(self, settings: Settings, corpus: Corpus) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.corpus = settings, corpus
        self.model = build_model(MODEL)[0].train()
        self.average = copy.deepcopy(self.model).eval()
        self.model.visual.patch_drop = PatchDropoutWithIndices(settings.patch_drop, num_prefix_tokens=1)
        for block in self.model.visual.blocks:
            block.attn.fused_attn = (
                False  # for 33 tokens on a CPU, plain products take half the time of the fused kernel
            )
        spec = self.model.spec
        self.image_size = spec.vision.image_size
        self.heads = TrainingHeads(spec.vision.width, corpus.words.shape[1])
        named = [*self.model.named_parameters(), *self.heads.named_parameters()]
        decayed = [p for n, p in named if p.ndim > 1 and "pos_embed" not in n and "token" not in n]
        rest = [p for n, p in named if not any(p is d for d in decayed)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(0.9, 0.98),
            eps=1e-6,
            fused=True,
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.rng = np.random.default_rng(settings.seed)
        self.step = 0
        self.seconds = 0.0
        self.queue = np.empty(0, dtype=np.int64)

    def progress(self) -> float:
        """Share of the schedule done, by steps or by time, whichever is further."""
        by_time = self.seconds / (3600 * self.settings.hours) if self.settings.hours else 0.0
        return min(1.0, max(self.step / self.settings.steps, by_time))

    def learning_rate(self) -> float:
        """Linear warm-up, then cosine to 1 % of the peak."""
        if self.step < self.settings.warmup:
            return self.settings.lr * (self.step + 1) / self.settings.warmup
        return self.settings.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.progress())))

    def draw(self) -> tuple[Numbers, Numbers]:
        """Emojis of the batch (each once an epoch), and others for their captions only."""
        if len(self.queue) < self.settings.emojis:
            self.queue = self.rng.permutation(self.corpus.emojis)
        batch, self.queue = self.queue[: self.settings.emojis], self.queue[self.settings.emojis :]
        others = np.setdiff1d(self.corpus.emojis, batch)
        return batch, self.rng.choice(others, self.settings.extra_texts, replace=False)

    def losses(self) -> dict[str, torch.Tensor]:
        """Forward pass of a fresh batch."""
        emojis, others = self.draw()
        batch = self.corpus.batch(emojis, self.settings.views, self.rng)
        images = augment(batch.pictures, self.image_size, self.generator)
        tokens = self.corpus.captions(np.concatenate([emojis, others]), self.rng)
        positives = torch.arange(len(emojis)).repeat_interleave(batch.views)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            hidden = self.model.visual.forward_features(images)
            features = self.model.visual.forward_head(hidden, pre_logits=True)  # [E * V, width]
            embedding = self.model.visual.head(features)
            projected, words = self.heads.projector(features), self.heads.words(features)
            layout = self.heads.layout(features)
            text = encode_short(self.model.text, tokens)
        embedding, text, projected = (F.normalize(x.float(), dim=-1) for x in (embedding, text, projected))
        scale = self.model.logit_scale.exp().clamp(max=100)
        targets = self.corpus.words[batch.emojis].repeat_interleave(batch.views, 0)
        return {
            "text": image_text_loss(embedding, text, positives, scale),
            "image": image_image_loss(projected, positives),
            "word": word_loss(words.float(), targets),
            "layout": layout_loss(layout.float(), images),
        }

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns the losses."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        if self.progress() > 1 - self.settings.unmasked:
            self.model.visual.patch_drop.prob = 0.0
        losses = self.losses()
        settings = self.settings
        total = (
            losses["text"]
            + settings.image_weight * losses["image"]
            + settings.word_weight * losses["word"]
            + settings.layout_weight * losses["layout"]
        )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        decay = min(settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        self.seconds += time.perf_counter() - start
        return {key: float(value.detach()) for key, value in losses.items()}

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "average", "heads", "optimizer")}
        state |= {"step": self.step, "seconds": self.seconds, "torch_rng": self.generator.get_state()}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint (the order of emojis is drawn anew)."""
        state = torch.load(path, weights_only=True)
        for name in ("model", "average", "heads", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        self.generator.set_state(state["torch_rng"])
        self.rng = np.random.default_rng([self.settings.seed, self.step])
