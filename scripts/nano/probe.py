"""Logistic-regression probes and name retrieval on the quickstart shards: how good are frozen features?"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from eva_clip.models import EvaCLIP
from scripts.nano.augment import normalise

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidate inverse regularisation strengths C; chosen on 20 % of train."""
Features = npt.NDArray[np.float32]


@dataclass
class Shard:
    """Pictures [N, 3, 64, 64] in [0, 1], their labels and lower-case names."""

    images: torch.Tensor
    labels: list[str]
    names: list[str]


def load_shard(path: Path) -> Shard:
    """Read one of the quickstart's `.tar.gz` shards into memory."""
    images, records = [], []
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None, member.name
            if member.name.endswith(".json"):
                records.append(json.load(file))
            else:
                pixels = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
                images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    stacked = torch.stack(images).float() / 255
    return Shard(stacked, [r["label"] for r in records], [r["caption"] for r in records])


@torch.inference_mode()
def encode(model: EvaCLIP, images: torch.Tensor, projected: bool = False) -> torch.Tensor:
    """Class token after the final norm [N, width], or unit embeddings [N, embed_dim], of images in [0, 1]."""
    model.eval()
    parts = []
    for chunk in torch.split(normalise(images), 256):
        if projected:
            parts.append(model.encode_image(chunk, normalize=True))
        else:
            parts.append(model.visual.forward_head(model.visual.forward_features(chunk), pre_logits=True))
    return torch.cat(parts).float()


def probe_accuracy(
    train: Features, train_labels: list[str], test: Features, test_labels: list[str], standardise: bool
) -> float:
    """Top-1 (%) on a test set of one logistic regression, on standardised (or only centred) features.

    C is chosen on a stratified, seeded 20 % of train; then the probe is refitted on all of train. Test
    is not looked at before that. The rotation onto principal components, all of them kept, leaves the
    optimum as it is and makes raw pixels affordable.
    """
    fit, held, fit_labels, held_labels = train_test_split(
        train, train_labels, test_size=0.2, random_state=0, stratify=train_labels
    )

    def fitted(strength: float, x: Features, y: list[str]) -> Pipeline:
        classifier = LogisticRegression(C=strength, max_iter=300)
        return make_pipeline(StandardScaler(with_std=standardise), PCA(svd_solver="full"), classifier).fit(x, y)

    scores = [fitted(c, fit, fit_labels).score(held, held_labels) for c in STRENGTHS]
    best = fitted(STRENGTHS[int(np.argmax(scores))], train, train_labels)
    return 100 * float(best.score(test, test_labels))


def transfer(features: dict[str, Features], shards: dict[str, Shard], standardise: bool = True) -> dict[str, float]:
    """`within` (Twemoji train -> Twemoji test) and `across` (Noto -> all of Twemoji), top-1 in %."""
    train, test, noto = (features[key] for key in ("twemoji_train", "twemoji_test", "noto"))
    labels = {key: shard.labels for key, shard in shards.items()}
    train_labels, test_labels = labels["twemoji_train"], labels["twemoji_test"]
    twemoji, twemoji_labels = np.concatenate([train, test]), train_labels + test_labels
    return {
        "within": probe_accuracy(train, train_labels, test, test_labels, standardise),
        "across": probe_accuracy(noto, labels["noto"], twemoji, twemoji_labels, standardise),
    }


@torch.inference_mode()
def name_retrieval(model: EvaCLIP, images: torch.Tensor, names: list[str]) -> dict[str, float]:
    """Share (%) of pictures whose own name is the nearest (R@1) or among the five nearest (R@5)."""
    model.eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=model.spec.text.context_length)
    text = torch.cat([model.encode_text(t) for t in tokenizer([n.replace(":", "") for n in names]).split(256)])
    similarity = encode(model, images, projected=True) @ F.normalize(text.float(), dim=-1).t()
    own = similarity.diagonal()[:, None]
    rank = (similarity > own).sum(1)  # 0: the own name is the nearest
    return {"R@1": 100 * float((rank < 1).float().mean()), "R@5": 100 * float((rank < 5).float().mean())}


def load_shards(folder: Path) -> dict[str, Shard]:
    """The three quickstart shards by name."""
    return {key: load_shard(folder / f"{key}.tar.gz") for key in ("twemoji_train", "twemoji_test", "noto")}


def evaluate(model: EvaCLIP, shards: dict[str, Shard]) -> dict[str, float]:
    """Both transfers, and retrieval among the names of all Twemoji pictures in the shards."""
    features = {key: encode(model, shard.images).numpy() for key, shard in shards.items()}
    pictures = torch.cat([shards["twemoji_train"].images, shards["twemoji_test"].images])
    names = shards["twemoji_train"].names + shards["twemoji_test"].names
    return {**transfer(features, shards), **name_retrieval(model, pictures, names)}
