from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published_layouts import Shapes, Sizes

from eva_clip import add_model_config

TEXT = {"context_length": 77, "vocab_size": 49408, "heads": 2, "layers": 2}
BASE = {"image_size": 32, "layers": 2, "head_width": 16, "patch_size": 8}
CONFIGS = {
    "tiny-eva01": ({"width": 32, "mlp_ratio": 2.5, "family": "eva01"}, 24, 16, False),
    "tiny-eva02": ({"width": 48, "mlp_ratio": 8 / 3, "family": "eva02"}, 20, 12, False),
    "tiny-post-norm": ({"width": 64, "mlp_ratio": 2.0, "family": "eva02_post_norm"}, 20, 12, False),
    "tiny-clip": ({"width": 80, "mlp_ratio": 4.0, "family": "clip"}, 28, 20, False),
    "tiny-quick": ({"width": 96, "mlp_ratio": 4.0, "family": "clip"}, 28, 20, True),
}
TINY = Sizes(depth=2, width=32, mlp=80, patch=8, grid=4, embed=24, text_depth=2, text_width=16, classes=7)
"""The published layouts at the size of tiny-eva01."""


@pytest.fixture(scope="session", autouse=True)
def _tiny_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("configs")
    for name, (vision, embed_dim, text_width, quick) in CONFIGS.items():
        document = {
            "embed_dim": embed_dim,
            "vision_cfg": BASE | vision,
            "text_cfg": TEXT | {"width": text_width},
            "quick_gelu": quick,
        }
        path = folder / f"{name}.json"
        path.write_text(json.dumps(document))
        add_model_config(path)


@pytest.fixture(scope="session")
def tiny() -> Sizes:
    return TINY


@pytest.fixture
def randomise() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Fill every parameter with noise, so that no bias is 0 and no norm 1."""

    def fill(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return module

    return fill


@pytest.fixture
def fabricate(tmp_path: Path) -> Callable[..., Path]:
    """Write a file of given names and shapes: noise, or nothing but shapes on the meta device."""

    def write(shapes: Shapes, wrap: str = "", *, meta: bool = False, prefix: str = "", **beside: object) -> Path:
        generator = torch.Generator().manual_seed(0)
        tensors = {
            prefix + key: torch.empty(shape, device="meta")
            if meta
            else torch.randn(shape, generator=generator).mul(0.1).abs()
            for key, shape in shapes.items()
        }
        path = tmp_path / "weights.pt"
        torch.save({wrap: tensors, **beside} if wrap else tensors, path)
        return path

    return write
