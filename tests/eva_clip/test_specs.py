"""The table against the libraries that carry the architectures; names; models of one's own."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

import eva_clip
from eva_clip.specs import all_model_specs, get_model_spec
from eva_clip.towers import build_text_tower, build_vision_tower

# our name: timm's architecture, open_clip's bundled configuration
PEERS = {
    "EVA01-CLIP-g-14": ("eva_giant_patch14_clip_224", "EVA01-g-14"),
    "EVA01-CLIP-g-14-plus": ("eva_giant_patch14_clip_224", "EVA01-g-14-plus"),
    "EVA02-CLIP-B-16": ("eva02_base_patch16_clip_224", "EVA02-B-16"),
    "EVA02-CLIP-L-14": ("eva02_large_patch14_clip_224", "EVA02-L-14"),
    "EVA02-CLIP-L-14-336": ("eva02_large_patch14_clip_336", "EVA02-L-14-336"),
    "EVA02-CLIP-bigE-14": ("eva02_enormous_patch14_clip_224", "EVA02-E-14"),
    "EVA02-CLIP-bigE-14-plus": ("eva02_enormous_patch14_clip_224", "EVA02-E-14-plus"),
    "OpenAI-CLIP-ViT-L-14": ("vit_large_patch14_clip_quickgelu_224", "ViT-L-14-quickgelu"),
    "OpenCLIP-ViT-H-14": ("vit_huge_patch14_clip_224", "ViT-H-14"),
    "OpenCLIP-ViT-g-14": ("vit_giant_patch14_clip_224", "ViT-g-14"),
}


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", PEERS)
def test_shapes_are_timms_and_open_clips(name):
    import open_clip
    import timm

    spec = get_model_spec(name)
    architecture, config_name = PEERS[name]
    config = open_clip.get_model_config(config_name)
    with torch.device("meta"):
        tower = build_vision_tower(spec)
        theirs = timm.create_model(architecture, num_classes=spec.embed_dim)
        expected = shapes(theirs)
        if spec.vision.family == "clip":
            del expected["head.bias"]
            assert type(tower.blocks[0].mlp.act) is type(theirs.blocks[0].mlp.act)
        assert shapes(tower) == expected
        assert tower.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
        assert type(tower.blocks[0]) is type(theirs.blocks[0])
        assert tower.blocks[0].norm1.eps == theirs.blocks[0].norm1.eps
    assert spec.embed_dim == config["embed_dim"]
    assert spec.quick_gelu == config.get("quick_gelu", False)
    assert spec.vision.image_size == config["vision_cfg"]["image_size"]
    assert {key: getattr(spec.text, key) for key in config["text_cfg"]} == config["text_cfg"]


def test_every_model_of_the_table_has_a_peer():
    names = {spec.name for spec in all_model_specs() if not spec.name.startswith("tiny")}
    assert names == {*PEERS, "EVA01-CLIP-nano"}


@pytest.mark.parametrize("family", ["eva01", "eva02", "eva02_post_norm", "clip", "quick"])
def test_text_tower_uses_the_models_gelu(family):
    name = "tiny-" + family.replace("eva02_", "").replace("_", "-")
    activation = build_text_tower(get_model_spec(name)).transformer.resblocks[0].mlp.gelu
    assert type(activation).__name__ == ("QuickGELU" if family == "quick" else "GELU")


def test_pins_have_the_right_form():
    for spec in all_model_specs():
        if spec.hub is not None:
            assert spec.hub.sha256 is None or re.fullmatch("[0-9a-f]{64}", spec.hub.sha256)
            assert spec.hub.revision is None or re.fullmatch("[0-9a-f]{40}", spec.hub.revision)


@pytest.mark.parametrize("alias", ["EVA_CLIP_g_14", "eva01-g-14", "EVA_GIANT_PATCH14_CLIP_224"])
def test_aliases(alias):
    assert get_model_spec(alias).name == "EVA01-CLIP-g-14"


def test_unknown_name_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown model 'EVA02-CLIP-L-15'; did you mean 'EVA02-CLIP-L-14'"):
        get_model_spec("EVA02-CLIP-L-15")


def test_resolution_that_patches_do_not_divide():
    with pytest.raises(ValueError, match="nearest multiples are 224 and 238"):
        get_model_spec("EVA_CLIP_g_14").at_image_size(230)


def test_every_mistake_of_a_config_is_named(tmp_path):
    path = tmp_path / "mine.json"
    document = {
        "embed_dim": "8",
        "vision_cfg": {"image_size": 32, "layrs": 2, "width": 32, "head_width": 16, "mlp_ratio": True, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2},
        "quick": 1,
    }
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="unknown key 'quick'") as caught:
        eva_clip.add_model_config(path)
    for part in ("embed_dim is '8'", "layrs (did you mean vision_cfg.layers?)", "mlp_ratio is True", "text_cfg.layers"):
        assert part in str(caught.value)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        eva_clip.add_model_config(path)


def test_unknown_family():
    vision = get_model_spec("nano").vision
    with pytest.raises(ValueError, match="family is 'eva03'; expected one of eva01"):
        replace(vision, family="eva03")


def test_a_name_cannot_be_taken_twice(tmp_path):
    document = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "mlp_ratio": 2, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    path = tmp_path / "EVA01-CLIP-nano.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="already belongs to another model"):
        eva_clip.add_model_config(path)
