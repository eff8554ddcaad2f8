"""Image transforms: the published evaluation view and the published linear-probing training view."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from eva_clip.specs import CLIP_MEAN, CLIP_STD


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB (itself if it is); transparency is laid on white, as a viewer shows it."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


class Normalize:
    """An RGB image to float32 [3, H, W], `(pixels / 255 - mean) / std` in one pass."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        center, spread = (torch.tensor(list(values)).view(3, 1, 1) for values in (mean, std))
        self.scale, self.shift = 1 / (255 * spread), -center / spread

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """The normalised image, contiguous."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return torch.addcmul(self.shift, pixels.to(torch.float32, memory_format=torch.contiguous_format), self.scale)


class EvalTransform:
    """The evaluation view: RGB, short side to `image_size` (bicubic, antialiased), centre crop, normalise.

    Sides and offsets are rounded as torchvision's `Resize` and `CenterCrop` round them.
    """

    def __init__(self, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.image_size = image_size
        self.normalize = Normalize(mean, std)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """A PIL image to float32 [3, image_size, image_size]."""
        image, size = to_rgb(image), self.image_size
        short = min(image.size)
        width, height = (int(size * side / short) for side in image.size)
        # Not Pillow's `box`, which would spare the pixels that are cropped: Pillow may then take the two directions in
        # another order, and rounds in between (measured: up to 22 levels on a tall picture).
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return self.normalize(resized.crop((left, top, left + size, top + size)))


def build_eval_transform(
    image_size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Callable[[Image.Image], torch.Tensor]:
    """`EvalTransform`: a function from a PIL image to float32 [3, image_size, image_size]."""
    return EvalTransform(image_size, mean, std)


class OneShotRandomResizedCrop:
    """The published linear-probing crop: drawn once, clipped to the image, never redrawn.

    area ~ U[scale]·H·W, aspect ~ exp(U[log ratio]); width and height are rounded, then clipped to the image (where
    torchvision's `RandomResizedCrop` draws again up to ten times); bicubic with antialias. Draws are made in the order
    area, aspect, top, left.
    """

    def __init__(
        self,
        image_size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        self.image_size = image_size
        self.scale = scale
        self.log_ratio = (math.log(ratio[0]), math.log(ratio[1]))

    def draw_box(self, height: int, width: int, generator: torch.Generator | None = None) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop in pixels, for an image of `height` x `width` pixels."""
        area = height * width * torch.empty(1).uniform_(*self.scale, generator=generator).item()
        aspect = math.exp(torch.empty(1).uniform_(*self.log_ratio, generator=generator).item())
        crop_width = min(round(math.sqrt(area * aspect)), width)
        crop_height = min(round(math.sqrt(area / aspect)), height)
        top = int(torch.randint(0, height - crop_height + 1, (1,), generator=generator).item())
        left = int(torch.randint(0, width - crop_width + 1, (1,), generator=generator).item())
        return top, left, crop_height, crop_width

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Image.Image:
        """A PIL image to one of `image_size` x `image_size` pixels; pixels outside of the crop have no part in it."""
        top, left, height, width = self.draw_box(image.height, image.width, generator)
        region = image.crop((left, top, left + width, top + height))
        return region.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)


class LinearProbeTransform:
    """The published linear-probing training view: one-shot crop, horizontal flip with probability 0.5, normalise."""

    def __init__(self, image_size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> None:
        self.crop = OneShotRandomResizedCrop(image_size)
        self.normalize = Normalize(mean, std)

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        """A PIL image to float32 [3, image_size, image_size]; all randomness comes from `generator`."""
        view = self.crop(to_rgb(image), generator)
        if torch.rand(1, generator=generator).item() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.normalize(view)
