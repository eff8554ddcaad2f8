"""Fully sharded training computes in bf16 what one process does, in the same types."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from eva_clip.classifier import Classifier, build_classifier
from eva_clip.specs import add_model_config
from finetune.sharding import gather, shard
from probes.precision import mixed_precision

FAMILIES = ["eva01", "eva02", "eva02_post_norm", "clip"]
VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "mlp_ratio": 2.0, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


@pytest.fixture
def mesh(tmp_path):
    """One process as a mesh."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.fixture
def pair(request, tmp_path):
    """A classifier of a family, and its copy."""
    config = tmp_path / f"sharded-{request.param}.json"
    vision = VISION | {"family": request.param}
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}), encoding="utf-8")
    torch.manual_seed(0)
    model = build_classifier(add_model_config(config), 5, pool="gap", drop_path_rate=0.0).train()
    with torch.no_grad():
        for parameter in model.parameters():  # values that bf16 rounds, those of norms too
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, copy.deepcopy(model)


def record(model: Classifier, images: torch.Tensor) -> tuple[list[torch.dtype], torch.Tensor]:
    """Types of the residual stream behind every block, and the logits, under bf16 autocast."""
    types: list[torch.dtype] = []
    hooks = [block.register_forward_hook(lambda *given: types.append(given[2].dtype)) for block in model.tower.blocks]
    with mixed_precision("bf16", images.device):
        logits = model(images)
    for hook in hooks:
        hook.remove()
    return types, logits


@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
@pytest.mark.parametrize("recompute", [False, True])
def test_types_logits_and_gradients_are_those_of_one_process(pair, mesh, recompute):
    sharded = pair[1]
    for model in pair:
        model.tower.set_grad_checkpointing(recompute)
    shard(sharded, mesh, "bf16")
    images, target = torch.randn(3, 3, 32, 32), torch.tensor([0, 3, 4])
    found = []
    for model in pair:
        types, logits = record(model, images)
        assert set(types) == {torch.float32}, "the residual stream"
        assert logits.dtype == torch.float32
        torch.nn.functional.cross_entropy(logits, target).backward()
        found.append((logits.detach(), gather({n: p.grad for n, p in model.named_parameters() if p.grad is not None})))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
