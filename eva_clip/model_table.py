"""The one table of supported models.

Shapes are those of timm's registered architectures and open_clip's bundled configurations (a test compares them);
hub files are the ones that open_clip's `pretrained.py` and the published model cards name. Revisions and digests are
pinned only where a public source states them.
"""

from __future__ import annotations

from eva_clip.spec_types import HubFile, ModelSpec, TextConfig, VisionConfig


def _text(width: int, layers: int) -> TextConfig:
    """A CLIP text tower: 77 tokens of CLIP's byte-pair encoding, heads 64 wide."""
    return TextConfig(context_length=77, vocab_size=49408, width=width, heads=width // 64, layers=layers)


def _vision(size: int, layers: int, width: int, head: int, ratio: float, patch: int, family: str) -> VisionConfig:
    return VisionConfig(size, layers, width, head, ratio, patch, family=family)


_EVA_G = _vision(224, 40, 1408, 88, 4.3637, 14, "eva01")
_EVA02_B = _vision(224, 12, 768, 64, 8 / 3, 16, "eva02")
_EVA02_L = _vision(224, 24, 1024, 64, 8 / 3, 14, "eva02")
_EVA02_L_336 = _vision(336, 24, 1024, 64, 8 / 3, 14, "eva02")
_EVA02_E = _vision(224, 64, 1792, 112, 15360 / 1792, 14, "eva02_post_norm")
_CLIP_L = _vision(224, 24, 1024, 64, 4.0, 14, "clip")
_CLIP_H = _vision(224, 32, 1280, 80, 4.0, 14, "clip")
_CLIP_G = _vision(224, 40, 1408, 88, 4.3637, 14, "clip")

_EVA_REPO = "QuanSun/EVA-CLIP"

BUILT_IN = (
    ModelSpec(
        "EVA01-CLIP-g-14",
        1024,
        _EVA_G,
        _text(768, 12),
        aliases=("EVA_CLIP_g_14", "EVA01-g-14", "eva_clip_psz14", "eva_giant_patch14_clip_224"),
        hub=HubFile("BAAI/EVA", "eva_clip_psz14.pt"),
    ),
    ModelSpec(
        "EVA01-CLIP-g-14-plus",
        1024,
        _EVA_G,
        _text(1024, 24),
        aliases=("EVA01_CLIP_g_14_plus", "EVA01-g-14-plus"),
        hub=HubFile(_EVA_REPO, "EVA01_CLIP_g_14_plus_psz14_s11B.pt"),
    ),
    ModelSpec(
        "EVA02-CLIP-B-16",
        512,
        _EVA02_B,
        _text(512, 12),
        aliases=("EVA02-B-16", "eva02_base_patch16_clip_224"),
        hub=HubFile(_EVA_REPO, "EVA02_CLIP_B_psz16_s8B.pt"),
    ),
    ModelSpec(
        "EVA02-CLIP-L-14",
        768,
        _EVA02_L,
        _text(768, 12),
        aliases=("EVA02-L-14", "eva02_large_patch14_clip_224"),
        hub=HubFile(_EVA_REPO, "EVA02_CLIP_L_psz14_s4B.pt"),
    ),
    ModelSpec(
        "EVA02-CLIP-L-14-336",
        768,
        _EVA02_L_336,
        _text(768, 12),
        aliases=("EVA02-L-14-336", "eva02_large_patch14_clip_336"),
        hub=HubFile(_EVA_REPO, "EVA02_CLIP_L_336_psz14_s6B.pt"),
    ),
    ModelSpec(
        "EVA02-CLIP-bigE-14",
        1024,
        _EVA02_E,
        _text(1024, 24),
        aliases=("EVA02-E-14", "eva02_enormous_patch14_clip_224"),
        hub=HubFile(_EVA_REPO, "EVA02_CLIP_E_psz14_s4B.pt"),
    ),
    ModelSpec(
        "EVA02-CLIP-bigE-14-plus",
        1024,
        _EVA02_E,
        _text(1280, 32),
        aliases=("EVA02-E-14-plus",),
        hub=HubFile(_EVA_REPO, "EVA02_CLIP_E_psz14_plus_s9B.pt"),
    ),
    ModelSpec(
        "OpenAI-CLIP-ViT-L-14",
        768,
        _CLIP_L,
        _text(768, 12),
        aliases=("OpenAI-CLIP-L", "OpenAI-ViT-L-14", "ViT-L/14", "ViT-L-14-quickgelu"),
        quick_gelu=True,
        hub=HubFile("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors"),
    ),
    ModelSpec(
        "OpenCLIP-ViT-H-14",
        1024,
        _CLIP_H,
        _text(1024, 24),
        aliases=("OpenCLIP-H", "ViT-H-14"),
        hub=HubFile(
            "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            "open_clip_pytorch_model.bin",
            revision="1c2b8495b28150b8a4922ee1c8edee224c284c0c",
            sha256="9a78ef8e8c73fd0df621682e7a8e8eb36c6916cb3c16b291a082ecd52ab79cc4",
        ),
    ),
    ModelSpec(
        "OpenCLIP-ViT-g-14",
        1024,
        _CLIP_G,
        _text(1024, 24),
        aliases=("OpenCLIP-g", "ViT-g-14"),
        # The published 76.65 is the 12-billion-sample model's, not the later 34-billion one's (78.4).
        hub=HubFile("laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "open_clip_pytorch_model.bin"),
    ),
)
