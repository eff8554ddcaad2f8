"""Other repositories' names lead to the same model as ours."""

from __future__ import annotations

import re

import pytest
import torch

import eva_clip
from eva_clip import build_encoder, build_model, load_checkpoint

FAMILIES = ["tiny-eva01", "tiny-eva02", "tiny-post-norm", "tiny-clip", "tiny-quick"]


def published_eva02(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our EVA-02 tensors under the later EVA-CLIP repository's names, with the rotary tables it stores."""
    theirs = {
        r"(visual\.blocks\.\d+\.attn)\.q_proj\.bias": r"\1.q_bias",
        r"(visual\.blocks\.\d+\.attn)\.v_proj\.bias": r"\1.v_bias",
        r"(visual\.blocks\.\d+\.attn)\.norm\.": r"\1.inner_attn_ln.",
        r"(visual\.blocks\.\d+\.mlp)\.fc1_g\.": r"\1.w1.",
        r"(visual\.blocks\.\d+\.mlp)\.fc1_x\.": r"\1.w2.",
        r"(visual\.blocks\.\d+\.mlp)\.fc2\.": r"\1.w3.",
        r"(visual\.blocks\.\d+\.mlp)\.norm\.": r"\1.ffn_ln.",
    }
    named = {}
    for key, tensor in state.items():
        for pattern, replacement in theirs.items():
            key = re.sub("^" + pattern, replacement, key)
        named[key] = tensor
    table = torch.randn(16, 24)
    for i in range(2):
        named[f"visual.blocks.{i}.attn.rope.freqs_cos"] = named[f"visual.blocks.{i}.attn.rope.freqs_sin"] = table
    return named | {"visual.rope.freqs_cos": table, "visual.rope.freqs_sin": table}


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def source(request, randomise):
    return randomise(build_model(request.param)[0])


@pytest.mark.parametrize("source", ["tiny-eva02"], indirect=True)
def test_later_eva_clip_repository(source, tmp_path):
    torch.save(published_eva02(source.state_dict()), tmp_path / "w.pt")
    model, report = build_model("tiny-eva02", str(tmp_path / "w.pt"))
    assert same(model, source)
    assert report.renamed["visual.blocks.0.mlp.w2.weight"] == "visual.blocks.0.mlp.fc1_x.weight"
    assert len(report.renamed) == 2 * 12
    assert len(load_checkpoint(tmp_path / "w.pt").ignored) == 6


@pytest.mark.parametrize("source", ["tiny-post-norm"], indirect=True)
def test_post_norm_keeps_eva01_names(source, tmp_path):
    assert "visual.blocks.0.attn.q_bias" in source.state_dict()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    assert same(build_model("tiny-post-norm", str(tmp_path / "w.pt"))[0], source)


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
@pytest.mark.parametrize("wrap", ["", "state_dict"])
def test_open_clips_layout(source, wrap, tmp_path):
    tensors = eva_clip.to_open_clip_state_dict(source)
    prefixed = {f"module.{key}": tensor for key, tensor in tensors.items()}
    torch.save({wrap: prefixed} if wrap else tensors, tmp_path / "w.pt")
    found = load_checkpoint(tmp_path / "w.pt")
    assert (found.spec.name, found.kind) == (source.spec.name, "clip")
    assert found.layout.startswith("open_clip")
    assert same(build_model(source.spec.name, str(tmp_path / "w.pt"))[0], source)


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_timms_layout(source, tmp_path):
    torch.save(eva_clip.to_timm_state_dict(source), tmp_path / "w.pt")
    found = load_checkpoint(tmp_path / "w.pt")
    assert (found.spec.name, found.kind, found.layout) == (source.spec.name, "vision", "vision tower")
    definition = eva_clip.FeatureDefinition(projected=True)
    encoder, _ = build_encoder(source.spec.name, str(tmp_path / "w.pt"), definition=definition)
    assert same(encoder.tower, source.visual)


@pytest.mark.parametrize("source", ["tiny-clip"], indirect=True)
def test_clip_vision_tower_alone(source, tmp_path):
    tensors = eva_clip.to_open_clip_state_dict(source)
    bare = {key.removeprefix("visual."): value for key, value in tensors.items() if key.startswith("visual.")}
    torch.save(bare, tmp_path / "w.pt")
    found = load_checkpoint(tmp_path / "w.pt")
    assert (found.kind, found.layout) == ("vision", "CLIP vision tower")
    encoder, _ = build_encoder("tiny-clip", str(tmp_path / "w.pt"), image_size=48)
    assert encoder.tower.pos_embed.shape == (1, 37, 80)


@pytest.mark.parametrize("source", ["tiny-quick"], indirect=True)
def test_openai_extras_are_ignored(source, tmp_path):
    extras = {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408),
    }
    torch.save(eva_clip.to_open_clip_state_dict(source) | extras, tmp_path / "w.pt")
    assert sorted(load_checkpoint(tmp_path / "w.pt").ignored) == sorted(extras)


@pytest.mark.parametrize("source", ["tiny-eva01"], indirect=True)
def test_both_norms_contradict(source, tmp_path):
    tensors = eva_clip.to_timm_state_dict(source) | {"fc_norm.weight": torch.ones(32), "fc_norm.bias": torch.ones(32)}
    torch.save(tensors, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="both norm and fc_norm"):
        load_checkpoint(tmp_path / "w.pt")
