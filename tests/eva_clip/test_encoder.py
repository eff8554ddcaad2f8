"""The frozen encoder: features by definition, and frozen in earnest."""

from __future__ import annotations

import pytest
import torch

from eva_clip import FeatureDefinition, build_encoder, build_model, get_model_spec


def images() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_features_are_what_they_say():
    model, _ = build_model("nano", "pretrained")
    tokens = model.visual.forward_features(images())  # after the final norm
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(dim=1)
    projected = model.visual.head(cls)
    for definition, expected in (
        (FeatureDefinition(), cls),
        (FeatureDefinition("gap"), mean),
        (FeatureDefinition("cls+gap"), torch.cat([cls, mean], dim=1)),
        (FeatureDefinition(projected=True), projected),
        (FeatureDefinition(projected=True, l2norm=True), projected / projected.norm(dim=1, keepdim=True)),
    ):
        encoder, _ = build_encoder("nano", definition=definition)
        assert torch.allclose(encoder(images()), expected, atol=1e-6)
        assert encoder.feature_dim == expected.shape[1] == definition.feature_dim(encoder.spec)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-eva01", "tiny-eva02", "tiny-post-norm", "tiny-clip", "tiny-quick"])
def test_the_class_token_alone_is_the_whole_towers(name, randomise):
    encoder, _ = build_encoder(name, "random", definition=FeatureDefinition(projected=True))
    randomise(encoder)
    pictures, rows = images()[:, :, :32, :32], []
    tower = encoder.tower
    tokens = tower.forward_features(pictures)
    hook = tower.blocks[-1].mlp.register_forward_hook(lambda *given: rows.append(given[2].shape[1]))
    for kinds in (["cls"], ["projected"], ["cls", "projected"], ["cls", "gap"]):
        found = encoder.take_kinds(pictures, kinds)
        expected = {"cls": tokens[:, 0], "gap": tokens[:, 1:].mean(dim=1), "projected": tower.head(tokens[:, 0])}
        for kind in kinds:
            torch.testing.assert_close(found[kind], expected[kind], rtol=1e-5, atol=1e-5)
    hook.remove()
    assert rows == [1, 1, 1, 17], "only the mean needs the patch tokens of the last block"
    assert torch.equal(tower.forward_features(pictures), tokens), "the tower itself is as before"


def test_frozen_in_earnest():
    encoder, _ = build_encoder("nano")
    before = encoder.weights_sha256()
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    features = encoder(images().requires_grad_())
    assert not features.requires_grad
    assert encoder.weights_sha256() == before
    with torch.no_grad():
        encoder.tower.cls_token[0, 0, 0] += 1
    assert encoder.weights_sha256() != before


def test_unprojected_encoder_carries_no_projection():
    encoder, report = build_encoder("nano")
    assert not any(name.startswith("head") for name in encoder.tower.state_dict())
    assert "visual.head.weight" in report.unexpected
    assert {key.split(".")[0] for key in report.unexpected} == {"visual", "text", "logit_scale"}


def test_random_weights_follow_the_seed():
    torch.manual_seed(0)
    one, report = build_encoder("nano", "random")
    torch.manual_seed(0)
    model, _ = build_model("nano", "random")
    assert report is None
    assert torch.equal(one.tower.pos_embed, model.visual.pos_embed)


def test_precision():
    encoder, _ = build_encoder("nano", precision="bf16")
    assert encoder(images()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        build_encoder("nano", precision="half")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool": "mean"}, "unknown pool 'mean'"),
        ({"pool": "gap", "projected": True}, "projected features need pool 'cls'"),
    ],
)
def test_bad_definitions(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureDefinition(**arguments)


def test_grid_follows_the_resolution():
    encoder, _ = build_encoder("nano", image_size=96)
    assert encoder.spec.vision.grid_size == 12
    assert get_model_spec("nano").vision.grid_size == 8
