"""What we save, we, timm and open_clip open with equal outputs."""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch
from safetensors import safe_open

import eva_clip
from eva_clip import build_classifier, build_encoder, build_model, load_checkpoint, tokenize

TEXTS = ["a dog", "two cats on a mat", ""]
MODELS = ["nano", "tiny-eva01", "tiny-eva02", "tiny-post-norm", "tiny-clip", "tiny-quick"]


@pytest.fixture
def model(request, randomise):
    if request.param == "nano":
        return build_model("nano", "pretrained")[0]
    return randomise(build_model(request.param)[0])


def images(model: eva_clip.EvaCLIP) -> torch.Tensor:
    side = model.spec.vision.image_size
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", MODELS, indirect=True)
@torch.no_grad()
def test_timm_opens_it(model, tmp_path):
    folder = eva_clip.save_for_timm(model, tmp_path / "timm")
    peer = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    expected = model.encode_image(images(model))
    assert expected.std() > 0.01
    assert torch.allclose(peer(images(model)), expected, atol=1e-5)


@pytest.mark.parametrize("model", MODELS, indirect=True)
@torch.no_grad()
def test_open_clip_opens_both_towers(model, tmp_path):
    folder = eva_clip.save_for_open_clip(model, tmp_path / "open_clip")
    peer, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    peer.eval()
    assert torch.allclose(peer.encode_image(images(model)), model.encode_image(images(model)), atol=1e-5)
    assert torch.allclose(peer.encode_text(tokenize(TEXTS)), model.encode_text(tokenize(TEXTS)), atol=1e-5)
    assert torch.equal(peer.logit_scale, model.logit_scale)
    assert tuple(preprocess.transforms[-1].mean) == model.spec.image_mean


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_we_open_it(model, tmp_path):
    path = eva_clip.save_model(model, tmp_path / "deep" / "model.safetensors")
    again, report = build_model(model.spec.name, str(path))
    assert not report.renamed
    one, other = model.state_dict(), again.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(("pool", "head"), [("cls", "linear"), ("cls", "bn_linear"), ("gap", "linear")])
@torch.no_grad()
def test_classifier_round_trip(pool, head, tmp_path, randomise):
    # 24 classes: as many as the projection has rows, so that the head's shape alone does not tell
    model = randomise(build_classifier("tiny-eva01", 24, pool=pool, head=head, image_size=48))
    path = eva_clip.save_model(model, tmp_path / "c.safetensors")
    found = load_checkpoint(path)
    assert (found.kind, found.pool, found.num_classes, found.spec.vision.image_size) == ("classifier", pool, 24, 48)
    again = build_classifier("tiny-eva01", 24, pool=pool, head=head, image_size=48, checkpoint=path)
    assert torch.equal(again(torch.ones(2, 3, 48, 48)), model(torch.ones(2, 3, 48, 48)))
    with safe_open(str(path), "pt") as stream:
        assert stream.metadata() == {"format": "pt", "model": "tiny-eva01", "kind": "classifier", "pool": pool}
        assert "blocks.0.attn.qkv.weight" in stream.keys()  # noqa: SIM118


def test_encoder_round_trip(tmp_path):
    encoder, _ = build_encoder("nano", image_size=96)
    path = eva_clip.save_model(encoder, tmp_path / "e.safetensors")
    again, _ = build_encoder("nano", str(path), image_size=96)
    assert again.weights_sha256() == encoder.weights_sha256()


def test_only_safetensors_are_written(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        eva_clip.save_model(build_model("tiny-eva01")[0], tmp_path / "m.pt")
    with pytest.raises(ValueError, match="BatchNorm"):
        eva_clip.to_timm_state_dict(build_classifier("tiny-eva01", 3, head="bn_linear"))
