"""The pre-training corpus in memory: pictures of several vendors, captions, and batches of them.

A batch draws E emojis and V pictures of each (different vendors while there are enough), so that the
pictures of one emoji are positives of one another. Labels and the held-out vendor never enter here.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import open_clip
import torch

from scripts.nano.fetch import HELD_OUT

Numbers = npt.NDArray[np.int64]
MINIMUM_WORD_COUNT = 3
CAPTION_LENGTH = 24
"""Tokens kept of a caption, its end token included."""


@dataclass
class Batch:
    """Pictures [E * V, 4, H, W] uint8, ordered emoji by emoji, and the emojis' numbers [E]."""

    pictures: torch.Tensor
    emojis: torch.Tensor
    views: int


class Corpus:
    """Pictures, captions and caption words of every emoji that a pre-training vendor draws."""

    def __init__(self, work: Path, vendors: list[str] | None = None) -> None:
        document = json.loads((work / "emojis.json").read_text("utf-8"))
        names: list[str] = document["vendors"]
        kept = [i for i, name in enumerate(names) if name != HELD_OUT and (vendors is None or name in vendors)]
        stored = np.load(work / "pictures.npz")
        rows = np.isin(stored["vendor"], kept)
        self.pictures = torch.from_numpy(stored["images"][rows]).permute(0, 3, 1, 2).contiguous()
        emoji, vendor = stored["emoji"][rows], stored["vendor"][rows]
        self.vendor_counts = {names[v]: int((vendor == v).sum()) for v in kept}
        self.rows = {int(e): np.flatnonzero(emoji == e) for e in np.unique(emoji)}
        self.emojis = np.array(sorted(self.rows))
        texts = [record["captions"] for record in document["emojis"]]
        self.tokens = tokenize_captions(texts)  # [emojis, captions, CAPTION_LENGTH]
        self.words, self.word_weights = caption_words(
            [" ".join([r["name"], *r["keywords"]]) for r in document["emojis"]]
        )

    def batch(self, emojis: Numbers, views: int, rng: np.random.Generator) -> Batch:
        """`views` pictures of each of these emojis, vendors without repetition as long as possible."""
        chosen = []
        for emoji in emojis:
            rows = self.rows[int(emoji)]
            order = rng.permutation(rows)
            chosen.append(np.resize(order, views) if len(order) < views else order[:views])
        return Batch(self.pictures[torch.from_numpy(np.concatenate(chosen))], torch.from_numpy(emojis), views)

    def captions(self, emojis: Numbers, rng: np.random.Generator) -> torch.Tensor:
        """One random caption of each emoji: token ids [len(emojis), T], T the longest of them."""
        tokens = self.tokens[
            torch.from_numpy(emojis), torch.from_numpy(rng.integers(self.tokens.shape[1], size=len(emojis)))
        ]
        return tokens[:, : int((tokens != 0).sum(1).max())]


def tokenize_captions(texts: list[list[str]]) -> torch.Tensor:
    """Captions [E][C] to token ids [E, C, CAPTION_LENGTH], zero-padded; a cut caption keeps its end."""
    tokenizer = open_clip.SimpleTokenizer(context_length=CAPTION_LENGTH)
    flat: torch.Tensor = tokenizer([text for captions in texts for text in captions])
    return flat.view(len(texts), len(texts[0]), CAPTION_LENGTH)


def caption_words(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Bag-of-words targets [E, W] and word weights [W], log(E / count), of words seen at least three times.

    The targets of an emoji sum to one, as in "Classification Done Right for Vision-Language Pre-Training"
    (Huang et al., 2024), with words instead of sub-word tokens.
    """
    bags = [set(re.findall(r"[a-z]{2,}", text)) for text in texts]
    counts = Counter(word for bag in bags for word in bag)
    words = sorted(word for word, count in counts.items() if count >= MINIMUM_WORD_COUNT)
    column = {word: i for i, word in enumerate(words)}
    weights = torch.tensor([math.log(len(texts) / counts[word]) for word in words])
    targets = torch.zeros(len(texts), len(words))
    for row, bag in enumerate(bags):
        for word in bag & column.keys():
            targets[row, column[word]] = weights[column[word]]
    return targets / targets.sum(1, keepdim=True).clamp_min(1e-6), weights
