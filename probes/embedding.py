"""Images and texts through both towers: unit-length float32 embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from eva_clip.models import DTYPES, build_model
from eva_clip.specs import add_model_config
from eva_clip.transforms import build_eval_transform
from probes.data import SplitDataset, SplitLoader, available_cores, collate
from probes.processes import gather_rows, share, share_batches
from probes.progress import track

if TYPE_CHECKING:
    from eva_clip.models import EvaCLIP
    from probes.sections import DataSection, ModelSection
    from probes.splits import Split


def build_towers(model: ModelSection, precision: str) -> EvaCLIP:
    """Both towers of a recipe in a settled precision, on the GPU where there is one; the logit scale stays fp32."""
    if model.config:
        add_model_config(model.config)
    towers, report = build_model(model.name, model.weights, image_size=model.image_size, pos_embed=model.pos_embed)
    print(f"{model.name}: {report.summary() if report else 'randomly initialised'}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = towers.logit_scale.detach().clone()
    towers.to(device, DTYPES[precision])
    towers.logit_scale.data = scale.to(device)  # rounded to bf16 it would be off by 1 %
    return towers


@torch.no_grad()
def embed_images(model: EvaCLIP, batches: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [N, embed_dim] of all readable images, and their positions in the split, int64 [N], ascending.

    Under `join_processes` the batches are this process's (`evaluation_loader`) and the rows come from all.

    Raises:
        ValueError: no image could be read.
    """
    device = model.logit_scale.device
    rows, index = [torch.empty(0, model.spec.embed_dim)], [torch.empty(0, dtype=torch.int64)]
    for batch in track(batches, f"images of {name}", len(batches)):
        if len(batch["index"]):
            rows.append(model.encode_image(batch["image"].to(device)).float().cpu())
            index.append(batch["index"])
    images, positions = gather_rows(torch.cat(rows), torch.cat(index))
    if not len(positions):
        raise ValueError(f"no image of {name} could be read")
    return torch.nn.functional.normalize(images, dim=1), positions


@torch.no_grad()
def embed_tokens(model: EvaCLIP, tokens: torch.Tensor, batch: int) -> torch.Tensor:
    """Embeddings [T, embed_dim] of tokenised texts int64 [T, context]; under `join_processes` each does its share."""
    device = model.logit_scale.device
    rows, index = [torch.empty(0, model.spec.embed_dim)], [torch.empty(0, dtype=torch.int64)]
    starts = share(range(0, len(tokens), batch))
    for start in track(starts, "texts", len(starts)):
        rows.append(model.encode_text(tokens[start : start + batch].to(device)).float().cpu())
        index.append(torch.arange(start, start + len(rows[-1])))
    texts, positions = gather_rows(torch.cat(rows), torch.cat(index))
    assert len(positions) == len(tokens)
    return torch.nn.functional.normalize(texts, dim=1)


def evaluation_loader(model: EvaCLIP, split: Split, data: DataSection, batch: int) -> Any:
    """A split under the model's evaluation view, in order; under `join_processes` this process's whole batches."""
    spec = model.spec
    transform = build_eval_transform(spec.vision.image_size, spec.image_mean, spec.image_std)
    batches = share_batches(len(split), batch)
    return SplitLoader(
        SplitDataset(split, transform, 0, data.on_corrupt),
        batch_sampler=batches,
        num_workers=min(data.workers, available_cores(), len(batches)),
        collate_fn=collate,
    )
