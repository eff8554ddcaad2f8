"""Image transforms: the published evaluation view and the published linear-probing training view."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from eva_clip.specs import CLIP_MEAN, CLIP_STD

BICUBIC = vision.InterpolationMode.BICUBIC


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB; transparency is laid on white, as a viewer shows it."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_tensor_and_normalize(mean: Sequence[float], std: Sequence[float]) -> list[torch.nn.Module]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


def build_eval_transform(
    image_size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Callable[[Image.Image], torch.Tensor]:
    """The evaluation view: RGB, short side to `image_size` (bicubic, antialiased), centre crop, normalise.

    Returns:
        A function from a PIL image to float32 [3, image_size, image_size].
    """
    steps = [v2.Lambda(to_rgb), v2.Resize(image_size, BICUBIC), v2.CenterCrop(image_size)]
    transform: Callable[[Image.Image], torch.Tensor] = v2.Compose([*steps, *_to_tensor_and_normalize(mean, std)])
    return transform


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
        """A PIL image to one of `image_size` x `image_size` pixels."""
        box = self.draw_box(image.height, image.width, generator)
        size = [self.image_size, self.image_size]
        cropped: Image.Image = vision.resized_crop(image, *box, size, BICUBIC)
        return cropped


class LinearProbeTransform:
    """The published linear-probing training view: one-shot crop, horizontal flip with probability 0.5, normalise."""

    def __init__(self, image_size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> None:
        self.crop = OneShotRandomResizedCrop(image_size)
        self.finish = v2.Compose(_to_tensor_and_normalize(mean, std))

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        """A PIL image to float32 [3, image_size, image_size]; all randomness comes from `generator`."""
        view = self.crop(to_rgb(image), generator)
        if torch.rand(1, generator=generator).item() < 0.5:
            view = vision.hflip(view)
        tensor: torch.Tensor = self.finish(view)
        return tensor
