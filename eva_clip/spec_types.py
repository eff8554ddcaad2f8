"""What a model specification is: shapes, names, normalisation, and where its weights are. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

# https://github.com/openai/CLIP: the statistics every CLIP-family model was trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

FAMILIES = ("eva01", "eva02", "eva02_post_norm", "clip")
"""Kinds of vision tower. "eva01": absolute positions, query and value bias. "eva02": rotary positions as well, SwiGLU,
inner norms. "eva02_post_norm": eva01 with norms after each residual branch (bigE). "clip": OpenAI's, with a norm before
the blocks, full bias inside attention and a projection without bias."""


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a vision tower (`vision_cfg` of the published JSON)."""

    image_size: int
    """Side of the square input in pixels."""
    layers: int
    """Number of transformer blocks."""
    width: int
    """Token width (1408 for ViT-g)."""
    head_width: int
    """Width of one attention head; `width` is a multiple of it."""
    mlp_ratio: float
    """Hidden width of the MLP over `width`."""
    patch_size: int
    """Side of a square patch in pixels; divides `image_size`."""
    drop_path_rate: float = 0.0
    """Stochastic depth rate of the last block; rates grow linearly from 0."""
    family: str = "eva01"
    """One of `FAMILIES`."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"vision_cfg.image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                f"the nearest multiples are {self.image_size // self.patch_size * self.patch_size} and "
                f"{(self.image_size // self.patch_size + 1) * self.patch_size}"
            )
        if self.width % self.head_width:
            raise ValueError(
                f"vision_cfg.width {self.width} is not a multiple of head_width {self.head_width}; "
                "choose a head_width that divides it"
            )
        if self.family not in FAMILIES:
            raise ValueError(f"vision_cfg.family is {self.family!r}; expected one of {', '.join(FAMILIES)}")

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True)
class TextConfig:
    """Shape of the causal text tower (`text_cfg` of the published JSON)."""

    context_length: int
    """Tokens of one text, start and end tokens included."""
    vocab_size: int
    """Words of the tokenizer (49,408 for CLIP's byte-pair encoding)."""
    width: int
    """Token width."""
    heads: int
    """Attention heads; divides `width`."""
    layers: int
    """Number of transformer blocks."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"text_cfg.width {self.width} is not a multiple of heads {self.heads}")


@dataclass(frozen=True)
class HubFile:
    """A weight file on the Hugging Face hub."""

    repo: str
    """Repository, "owner/name"."""
    filename: str
    """File inside it."""
    revision: str | None = None
    """Commit, 40 hex digits; None where no published source names one (the newest is taken then)."""
    sha256: str | None = None
    """Digest of the file, 64 hex digits; None where no published source names one (the loader warns then)."""


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build one model, and where to find its weights."""

    name: str
    """Official name."""
    embed_dim: int
    """Width of the joint image-text space."""
    vision: VisionConfig
    text: TextConfig
    aliases: tuple[str, ...] = ()
    """Other accepted names."""
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    quick_gelu: bool = False
    """Both towers use x·sigmoid(1.702·x) (OpenAI's weights); otherwise the exact GELU."""
    hub: HubFile | None = None
    """Where weights="pretrained" comes from, for models whose weights are not in this package."""
    embedded_weights: str = ""
    """Path, inside this package, of weights that ship with it ("" when none do)."""

    @property
    def weights_path(self) -> Path | None:
        """File of the weights that ship inside the package, or None."""
        return Path(__file__).parent / self.embedded_weights if self.embedded_weights else None

    def at_image_size(self, image_size: int) -> ModelSpec:
        """The same model for another input resolution (pixels). Raises ValueError if the patches do not fit."""
        return replace(self, vision=replace(self.vision, image_size=image_size))
