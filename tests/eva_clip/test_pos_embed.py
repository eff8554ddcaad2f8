"""Position embeddings are resized the published way, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from eva_clip import build_encoder, resize_pos_embed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_published_way_is_bit_equal_to_interpolate(dtype):
    rows = torch.randn(1, 257, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    grid = rows[:, 1:].float().reshape(1, 16, 16, 8).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(24, 24), mode="bicubic", align_corners=False, antialias=False)
    resized = resize_pos_embed(rows, 24)
    assert resized.dtype == dtype
    assert torch.equal(resized[:, 1:], grid.permute(0, 2, 3, 1).reshape(1, 576, 8).to(dtype))
    assert torch.equal(resized[:, :1], rows[:, :1])


def test_timms_way_is_timms_and_differs():
    from timm.layers import resample_abs_pos_embed

    rows = torch.randn(1, 257, 8, generator=torch.Generator().manual_seed(0))
    timm_way = resize_pos_embed(rows, 24, mode="timm")
    assert torch.equal(timm_way, resample_abs_pos_embed(rows, [24, 24], num_prefix_tokens=1))
    assert (timm_way - resize_pos_embed(rows, 24)).abs().max() > 0.1


def test_same_grid_is_untouched_and_rectangles_work():
    rows = torch.randn(1, 17, 8)
    assert resize_pos_embed(rows, 4) is rows
    assert resize_pos_embed(rows, (3, 5)).shape == (1, 16, 8)
    assert resize_pos_embed(rows[:, 1:], 2, num_prefix_tokens=0).shape == (1, 4, 8)


@pytest.mark.parametrize("mode", ["eva", "timm"])
def test_builders_resize_as_asked(mode):
    small, _ = build_encoder("nano")
    large, report = build_encoder("nano", image_size=96, pos_embed=mode)
    assert report.resized == {"visual.pos_embed": (65, 145)}
    stored = small.tower.pos_embed.half()  # the dtype of the embedded file, which a resize keeps
    assert torch.equal(stored.float(), small.tower.pos_embed)
    assert torch.equal(large.tower.pos_embed, resize_pos_embed(stored, 12, mode=mode).float())


@pytest.mark.parametrize(
    ("rows", "target", "mode", "message"),
    [
        (torch.zeros(1, 17, 2), 4, "lanczos", "unknown pos_embed mode 'lanczos'"),
        (torch.zeros(1, 17, 2), 0, "eva", "0x0 is empty"),
        (torch.zeros(17, 2), 4, "eva", r"shape \[17, 2\]; expected \[1, tokens, width\]"),
        (torch.zeros(1, 18, 2), 5, "eva", "no square grid"),
    ],
)
def test_bad_input(rows, target, mode, message):
    with pytest.raises(ValueError, match=message):
        resize_pos_embed(rows, target, mode=mode)
