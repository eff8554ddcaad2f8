"""Images and texts through both towers: unit-length float32 embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from eva_clip.models import DTYPES, build_model
from eva_clip.specs import add_model_config
from eva_clip.tokenizer import tokenize
from eva_clip.transforms import build_eval_transform
from probes.data import SplitDataset, SplitLoader, available_cores, collate
from probes.progress import track

if TYPE_CHECKING:
    from eva_clip.models import EvaCLIP
    from probes.sections import DataSection, ModelSection
    from probes.splits import Split


def build_towers(model: ModelSection, precision: str) -> EvaCLIP:
    """Both towers of a recipe, on the GPU where there is one."""
    if model.config:
        add_model_config(model.config)
    towers, report = build_model(model.name, model.weights, image_size=model.image_size, pos_embed=model.pos_embed)
    print(f"{model.name}: {report.summary() if report else 'randomly initialised'}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return towers.to(device, DTYPES[precision])


@torch.no_grad()
def embed_images(model: EvaCLIP, batches: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [N, embed_dim] of all readable images, and their positions in the split, int64 [N]."""
    device = model.logit_scale.device
    rows, index = [], []
    for batch in track(batches, f"images of {name}", len(batches)):
        if len(batch["index"]):
            rows.append(model.encode_image(batch["image"].to(device)).float().cpu())
            index.append(batch["index"])
    if not rows:
        raise ValueError(f"no image of {name} could be read")
    return torch.nn.functional.normalize(torch.cat(rows), dim=1), torch.cat(index)


@torch.no_grad()
def embed_texts(model: EvaCLIP, texts: Sequence[str], batch: int) -> torch.Tensor:
    """Embeddings [len(texts), embed_dim].

    Raises:
        ValueError: a text is longer than the model's context.
    """
    device, rows = model.logit_scale.device, []
    starts = range(0, len(texts), batch)
    for start in track(starts, "texts", len(starts)):
        tokens = tokenize(texts[start : start + batch], model.spec.text.context_length)
        rows.append(model.encode_text(tokens.to(device)).float().cpu())
    return torch.nn.functional.normalize(torch.cat(rows), dim=1)


def evaluation_loader(model: EvaCLIP, split: Split, data: DataSection, batch: int) -> Any:
    """A split under the model's evaluation view, in order."""
    spec = model.spec
    transform = build_eval_transform(spec.vision.image_size, spec.image_mean, spec.image_std)
    return SplitLoader(
        SplitDataset(split, transform, 0, data.on_corrupt),
        batch_size=batch,
        num_workers=min(data.workers, available_cores()),
        collate_fn=collate,
    )
