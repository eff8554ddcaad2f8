"""Every official layout loads with nothing missing; every fault is named."""

from __future__ import annotations

import argparse

import numpy as np
import published_layouts as published
import pytest
import torch
from published_layouts import Sizes

from eva_clip import build_classifier, build_encoder, build_model, load_checkpoint
from eva_clip.encoder import FeatureDefinition

# name: (rule, kind, pool, tensors, parameters without buffers)
FULL_SIZE = {
    "eva_clip_psz14": (published.full_clip, 16, "clip", "cls", 678, 1_136_435_841),
    "eva_clip_psz14_vision_enc": (published.encoder, 16, "vision", "cls", 526, 1_011_146_112),
    "lincls_224": (published.linear_probe, 16, "classifier", "cls", 531, 1_012_555_112),
    "lincls_336": (published.linear_probe, 24, "classifier", "cls", 531, 1_013_005_672),
    "ftcls_224": (published.fine_tuned, 16, "classifier", "gap", 528, 1_012_555_112),
    "ftcls_336": (published.fine_tuned, 24, "classifier", "gap", 528, 1_013_005_672),
}


@pytest.mark.parametrize("name", FULL_SIZE)
@pytest.mark.parametrize("wrap", ["", "model", "module", "state_dict"])
def test_official_file_loads_at_full_size(name, wrap, fabricate):
    rule, grid, kind, pool, tensors, parameters = FULL_SIZE[name]
    shapes = rule(Sizes(grid=grid))
    counted = [key for key in shapes if "running_" not in key and "num_batches" not in key]
    assert (len(shapes), sum(int(np.prod(shapes[key])) for key in counted)) == (tensors, parameters)
    found = load_checkpoint(fabricate(shapes, wrap, meta=True))
    assert (found.spec.name, found.spec.vision.image_size) == ("EVA01-CLIP-g-14", grid * 14)
    assert (found.kind, found.pool, found.wrapper) == (kind, pool, wrap)
    assert len(found.report.loaded) == tensors
    assert not found.report.missing
    assert not found.report.unexpected


@pytest.mark.parametrize(("size", "count"), [(224, 1_012_555_112), (336, 1_013_005_672)])
@pytest.mark.parametrize(("pool", "head"), [("cls", "bn_linear"), ("gap", "linear")])
def test_classifier_has_the_published_parameter_count(size, count, pool, head):
    with torch.device("meta"):
        model = build_classifier("EVA_CLIP_g_14", 1000, image_size=size, pool=pool, head=head)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("scale", ["text.logit_scale", "logit_scale"])
def test_full_clip_values_arrive(scale, tiny, fabricate):
    path = fabricate(published.full_clip(tiny, scale), "module", prefix="module.")
    model, report = build_model("tiny-eva01", str(path))
    stored = torch.load(path, weights_only=True)["module"]
    assert model.logit_scale.item() == stored[f"module.{scale}"].item()
    key = "visual.blocks.1.attn.q_bias"
    assert torch.equal(model.state_dict()[key], stored[f"module.{key}"])
    assert report.renamed == ({} if scale == "logit_scale" else {scale: "logit_scale"})


def test_linear_probe_with_its_training_extras(tiny, fabricate):
    extras = {
        "args": argparse.Namespace(lr=0.1, nested=[1, "a"]),
        "optimizer": {"param_groups": [{"lr": np.float64(0.5)}]},
        "epoch": 89,
        "scaler": {"scale": 65536.0},
    }
    path = fabricate(published.linear_probe(tiny), "model", **extras)
    model = build_classifier("tiny-eva01", 7, head="bn_linear", checkpoint=path)
    stored = torch.load(path, weights_only=False)["model"]
    assert torch.equal(model.head[1].weight, stored["head.1.weight"])
    assert torch.equal(model.head[0].running_var, stored["head.0.running_var"])
    assert not model.load_report.missing
    images = torch.randn(2, 3, 32, 32)
    mean, var = stored["head.0.running_mean"], stored["head.0.running_var"]
    with torch.no_grad():
        normal = (model.forward_features(images) - mean) / (var + 1e-6).sqrt()
        assert torch.allclose(model(images), normal @ stored["head.1.weight"].T + stored["head.1.bias"], atol=1e-5)


def test_old_numpy_module_name_is_read(tiny, fabricate):
    path = fabricate(published.encoder(tiny), "model", lr=np.float64(0.5))
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    from zipfile import ZIP_STORED, ZipFile

    old = path.with_name("old.pt")
    with ZipFile(path) as source, ZipFile(old, "w", ZIP_STORED) as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                assert data.count(b"numpy._core.multiarray") == 1
                new = b"numpy.core.multiarray"
                data = data.replace(b"cnumpy._core.multiarray\n", b"c" + new + b"\n")
            target.writestr(name, data)
    assert b"numpy.core.multiarray" in old.read_bytes()
    assert load_checkpoint(old).kind == "vision"


def test_averaged_weights_only_when_asked_for(tiny, fabricate):
    shapes = published.fine_tuned(tiny)
    ema = {key: torch.full(shape, 0.25) for key, shape in shapes.items()}
    path = fabricate(shapes, "model", model_ema=ema)
    live = load_checkpoint(path)
    averaged = load_checkpoint(path, ema=True)
    assert averaged.wrapper == "model_ema"
    assert averaged.tensors["classifier.bias"][0] == 0.25
    assert live.tensors["classifier.bias"][0] != 0.25
    only = path.with_name("only.pt")
    torch.save({"model_ema": ema}, only)
    with pytest.raises(ValueError, match="ema=True"):
        load_checkpoint(only)
    with pytest.raises(ValueError, match="model_ema"):
        load_checkpoint(fabricate(shapes, "model"), ema=True)


def test_fine_tune_starts_from_a_class_token_encoder(tiny, fabricate):
    path = fabricate(published.encoder(tiny))
    model = build_classifier("tiny-eva01", 5, pool="gap", checkpoint=path, image_size=48)
    report = model.load_report
    assert report.missing == ["classifier.bias", "classifier.weight", "visual.fc_norm.bias", "visual.fc_norm.weight"]
    assert report.unexpected == ["norm.bias", "norm.weight"]
    assert report.resized == {"visual.pos_embed": (17, 37)}


def test_both_towers_give_a_classifier_and_an_encoder(tiny, fabricate):
    path = fabricate(published.full_clip(tiny))
    model = build_classifier("tiny-eva01", 5, checkpoint=path)
    assert model.load_report.missing == ["classifier.bias", "classifier.weight"]
    encoder, _ = build_encoder("tiny-eva01", str(path))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.forward_features(images), encoder(images), rtol=1e-5, atol=1e-6)


def test_other_class_count_gets_a_fresh_head_that_is_reported(tiny, fabricate):
    path = fabricate(published.fine_tuned(tiny))
    model = build_classifier("tiny-eva01", 3, pool="gap", checkpoint=path)
    assert model.load_report.missing == ["classifier.bias", "classifier.weight"]
    assert model.load_report.unexpected == ["head.bias", "head.weight"]


def test_half_a_head_is_an_error(tiny, fabricate):
    shapes = published.fine_tuned(tiny)
    del shapes["head.bias"]
    with pytest.raises(ValueError, match=r"missing \(classifier.bias\)"):
        build_classifier("tiny-eva01", 7, pool="gap", checkpoint=fabricate(shapes))


def test_layout_decides_the_pooling(tiny, fabricate):
    path = str(fabricate(published.fine_tuned(tiny)))
    with pytest.raises(ValueError, match=r"mean-pool.*pool='gap'"):
        build_classifier("tiny-eva01", 7, pool="cls", checkpoint=path)
    with pytest.raises(ValueError, match="mean-pool"):
        build_encoder("tiny-eva01", path)
    encoder, _ = build_encoder("tiny-eva01", path, definition=FeatureDefinition("gap"))
    model = build_classifier("tiny-eva01", 7, pool="gap", checkpoint=path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(encoder(images), model.forward_features(images), rtol=1e-5, atol=1e-6)
    path = fabricate(published.linear_probe(tiny))
    with pytest.raises(ValueError, match=r"class-token classifier.*pool='cls'"):
        build_classifier("tiny-eva01", 7, pool="gap", checkpoint=path)


def test_changed_missing_and_extra_keys_are_named(tiny, fabricate):
    shapes = published.encoder(tiny)
    del shapes["blocks.1.attn.v_bias"]
    shapes["blocks.0.mlp.fc3.weight"] = [2, 2]
    shapes["blocks.0.norm2.bias"] = [33]
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_checkpoint(fabricate(shapes))
    for part in (
        "1 of 32 tensors missing (visual.blocks.1.attn.v_bias)",
        "1 unexpected (blocks.0.mlp.fc3.weight)",
        "blocks.0.norm2.bias is [33], expected [32]",
    ):
        assert part in str(caught.value)


def test_half_the_keys_missing(tiny, fabricate):
    shapes = dict(list(published.encoder(tiny).items())[::2])
    with pytest.raises(ValueError, match=r"16 of 34 tensors missing .* and 8 more"):
        build_classifier("tiny-eva01", 7, checkpoint=fabricate(shapes))


def test_wrong_name_is_answered_with_the_right_one(tiny, fabricate):
    path = fabricate(published.full_clip(tiny))
    with pytest.raises(ValueError, match=r"width 32, expected 192.*tiny-eva01: name that model"):
        build_model("nano", str(path))
    with pytest.raises(ValueError, match="tiny-eva01"):
        load_checkpoint(path, model_name="tiny-clip")


def test_encoder_alone_is_no_whole_model(tiny, fabricate):
    with pytest.raises(ValueError, match=r"vision encoder alone.*build_encoder"):
        build_model("tiny-eva01", str(fabricate(published.encoder(tiny))))
    path = str(fabricate(published.encoder(tiny)))
    with pytest.raises(ValueError, match="no projection"):
        build_encoder("tiny-eva01", path, definition=FeatureDefinition(projected=True))


def test_unknown_shapes(tiny, fabricate):
    path = fabricate(published.encoder(Sizes(depth=3, width=32, mlp=80, patch=8, grid=4)))
    with pytest.raises(ValueError, match=r"fits no known model: found .*layers 3.*add_model_config"):
        load_checkpoint(path)
