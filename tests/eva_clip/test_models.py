"""Outputs equal timm's and open_clip's own classes, in every family; the published API."""

from __future__ import annotations

import open_clip
import published_layouts as published
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

import eva_clip
from eva_clip import build_classifier, build_encoder, build_eva_model_and_transforms, build_model, tokenize
from eva_clip.encoder import FeatureDefinition
from eva_clip.specs import get_model_spec

FAMILIES = ["tiny-eva01", "tiny-eva02", "tiny-post-norm", "tiny-clip", "tiny-quick"]
ARCHITECTURES = {
    "tiny-eva01": "eva_giant_patch14_clip_224",
    "tiny-eva02": "eva02_base_patch16_clip_224",
    "tiny-post-norm": "eva02_enormous_patch14_clip_224",
    "tiny-clip": "vit_huge_patch14_clip_224",
    "tiny-quick": "vit_large_patch14_clip_quickgelu_224",
}
TEXTS = ["a dog", "two cats on a mat", ""]


def timm_peer(name: str, num_classes: int, pool: str = "token", image_size: int = 32) -> torch.nn.Module:
    """timm's own architecture, with nothing but its sizes overridden."""
    vision = get_model_spec(name).vision
    return timm.create_model(
        ARCHITECTURES[name],
        img_size=image_size,
        patch_size=vision.patch_size,
        embed_dim=vision.width,
        depth=vision.layers,
        num_heads=vision.width // vision.head_width,
        mlp_ratio=vision.mlp_ratio,
        num_classes=num_classes,
        global_pool=pool,
    ).eval()


def images(side: int = 32, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_image_tower_is_timms(name, randomise):
    model, _ = build_model(name)
    randomise(model)
    peer = timm_peer(name, model.spec.embed_dim)
    peer.load_state_dict(eva_clip.to_timm_state_dict(model))
    expected = peer(images())
    assert expected.std() > 0.01
    assert torch.allclose(model.encode_image(images()), expected, atol=1e-5)
    assert torch.allclose(model.encode_image(images(), normalize=True), F.normalize(expected, dim=-1), atol=1e-5)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-quick"])
@torch.no_grad()
def test_clip_towers_are_open_clips_own(name, randomise):
    model, _ = build_model(name)
    randomise(model)
    spec = model.spec
    peer = open_clip.CLIP(
        spec.embed_dim,
        {"image_size": 32, "layers": 2, "width": spec.vision.width, "head_width": 16, "patch_size": 8},
        {"context_length": 77, "vocab_size": 49408, "width": spec.text.width, "heads": 2, "layers": 2},
        quick_gelu=spec.quick_gelu,
    ).eval()
    peer.load_state_dict(eva_clip.to_open_clip_state_dict(model))
    assert torch.allclose(model.encode_image(images()), peer.encode_image(images()), atol=1e-5)
    assert torch.allclose(model.encode_text(tokenize(TEXTS)), peer.encode_text(tokenize(TEXTS)), atol=1e-5)
    mine, theirs = model(images(), tokenize(TEXTS)), peer(images(), tokenize(TEXTS))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, theirs, strict=True))


@torch.no_grad()
def test_gelus_are_told_apart(randomise):
    """The quick GELU would load into a model of the exact one without a word: the outputs must differ."""
    model, _ = build_model("tiny-quick")
    randomise(model)
    peer = timm_peer("tiny-quick", 28)
    peer.load_state_dict(eva_clip.to_timm_state_dict(model))
    for block in peer.blocks:
        block.mlp.act = torch.nn.GELU()
    assert not torch.allclose(model.encode_image(images()), peer(images()), atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pool", ["cls", "gap"])
@torch.no_grad()
def test_classifier_is_timms(name, pool, randomise):
    model = build_classifier(name, 5, pool=pool, image_size=48)
    randomise(model)
    peer = timm_peer(name, 5, "token" if pool == "cls" else "avg", image_size=48)
    peer.load_state_dict(eva_clip.to_timm_state_dict(model))
    assert torch.allclose(model(images(48)), peer(images(48)), atol=1e-5)
    features = peer.forward_head(peer.forward_features(images(48)), pre_logits=True)
    assert torch.allclose(model.forward_features(images(48)), features, atol=1e-5)


def test_heads_start_as_published():
    torch.manual_seed(0)
    probe = build_classifier("tiny-eva01", 4000, head="bn_linear")
    norm, linear = probe.head
    assert (norm.affine, norm.eps, norm.momentum) == (False, 1e-6, 0.1)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert linear.weight.abs().max() > 0.035  # not truncated
    tuned = build_classifier("tiny-eva01", 4000, pool="gap")
    assert tuned.head.weight.std().item() == pytest.approx(2e-5, rel=0.02)
    assert not linear.bias.any()
    assert not tuned.head.bias.any()
    assert isinstance(tuned.tower.norm, torch.nn.Identity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool": "mean"}, "unknown pool 'mean'; expected one of cls, gap"),
        ({"head": "mlp"}, "unknown head 'mlp'; expected one of linear, bn_linear"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"image_size": 33}, "not a multiple of patch_size 8"),
    ],
)
def test_bad_classifier_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_classifier("tiny-eva01", **({"num_classes": 3} | arguments))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_a_probes_encoder_at_any_size(name, tmp_path, randomise):
    model, _ = build_model(name)
    path = eva_clip.save_model(randomise(model), tmp_path / "model.safetensors")
    width = model.spec.vision.width
    for definition, dim in (
        (FeatureDefinition("cls"), width),
        (FeatureDefinition("gap"), width),
        (FeatureDefinition("cls+gap"), 2 * width),
        (FeatureDefinition(projected=True, l2norm=True), model.spec.embed_dim),
    ):
        encoder, report = build_encoder(name, str(path), definition=definition, image_size=48)
        assert encoder(images(48)).shape == (3, dim) == (3, encoder.feature_dim)
        assert report.resized == {"visual.pos_embed": (17, 37)}
    small, _ = build_encoder(name, str(path), definition=FeatureDefinition(projected=True))
    with torch.no_grad():
        assert torch.allclose(small(images()), model.encode_image(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokenizer", ["ours", "clip's, int32"])
def test_readme_example(tokenizer, tmp_path, tiny, fabricate):
    """The seed's example on a file of the published layout, with the nano architecture's random weights."""
    nano = published.Sizes(6, 192, 384, 8, 8, 128, 2, 56)
    eva_clip_path = str(fabricate(published.full_clip(nano), "module"))
    image_path = tmp_path / "CLIP.png"
    Image.new("RGB", (90, 70), (200, 30, 30)).save(image_path)
    caption = ["a diagram", "a dog", "a cat"]
    device = "cuda" if torch.cuda.is_available() else "cpu"

    model, preprocess = build_eva_model_and_transforms("EVA01_CLIP_nano", pretrained=eva_clip_path)
    model = model.to(device)
    image = preprocess(Image.open(image_path)).unsqueeze(0).to(device)
    text = tokenize(caption).to(device)
    if tokenizer != "ours":
        text = text.int()
    with torch.no_grad():
        image_features = model.encode_image(image)
        text_features = model.encode_text(text)
        image_features /= image_features.norm(dim=-1, keepdim=True)
        text_features /= text_features.norm(dim=-1, keepdim=True)
        text_probs = (100.0 * image_features @ text_features.T).softmax(dim=-1)
    assert text_probs.shape == (1, 3)
    assert text_probs.sum().item() == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        mine = model(image, text)
    assert torch.allclose(mine[0], image_features, atol=1e-6)
    assert torch.allclose(mine[1], text_features, atol=1e-6)
    assert mine[2].item() == pytest.approx(model.logit_scale.exp().item())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_low_precision(precision, dtype):
    exact, preprocess = build_eva_model_and_transforms("nano", "pretrained")
    model, _ = build_eva_model_and_transforms("nano", "pretrained", precision=precision, device="cpu")
    image = preprocess(Image.effect_noise((80, 70), 60).convert("RGB")).unsqueeze(0)
    with torch.no_grad():
        low, full = model.encode_image(image), exact.encode_image(image)
        low_text, full_text = model.encode_text(tokenize(TEXTS)), exact.encode_text(tokenize(TEXTS))
    assert low.dtype == low_text.dtype == dtype
    assert F.cosine_similarity(low.float(), full).min() > 0.999
    assert F.cosine_similarity(low_text.float(), full_text).min() > 0.999


def test_api_arguments():
    _, preprocess = build_eva_model_and_transforms("nano", image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
    assert torch.allclose(preprocess(Image.new("RGB", (70, 70), "white")), torch.ones(3, 64, 64))
    with pytest.raises(ValueError, match="unknown precision 'amp'; expected one of fp32, bf16, fp16"):
        build_eva_model_and_transforms("nano", precision="amp")


@pytest.mark.slow
def test_full_size_encodes_in_bf16_within_10_gb():
    """g/14 at 336 px: built, resized, one image encoded; measured in a process of its own."""
    import subprocess
    import sys

    script = (
        "import resource, torch\n"
        "from eva_clip import build_encoder\n"
        "encoder, _ = build_encoder('EVA_CLIP_g_14', 'random', image_size=336, precision='bf16')\n"
        "features = encoder(torch.randn(1, 3, 336, 336))\n"
        "assert features.shape == (1, 1408) and features.isfinite().all()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 10e9
