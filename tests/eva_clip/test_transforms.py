"""Views against formulas and against torchvision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms as T

from eva_clip.specs import CLIP_MEAN, CLIP_STD
from eva_clip.transforms import LinearProbeTransform, OneShotRandomResizedCrop, build_eval_transform, to_rgb


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(mode)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(noise if channels > 1 else noise[..., 0], mode)


def levels(difference: torch.Tensor) -> int:
    """Largest difference of two normalised views in steps of 1/255."""
    return round(float((difference * torch.tensor(CLIP_STD).view(3, 1, 1) * 255).abs().max()))


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (50, 60), (224, 300)])
def test_views_of_a_photograph_are_pillows(size):
    image = Image.fromarray(load_sample_images().images[0]).resize(size)
    peer = T.Compose([T.Resize(224, T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor()])
    norm = T.Normalize(CLIP_MEAN, CLIP_STD)
    assert levels(build_eval_transform(224)(image) - norm(peer(image))) == 0
    train = LinearProbeTransform(224)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        top, left, height, width = train.crop.draw_box(image.height, image.width, generator)
        crop = image.crop((left, top, left + width, top + height)).resize((224, 224), Image.Resampling.BICUBIC)
        if torch.rand(1, generator=generator).item() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        view = train(image, torch.Generator().manual_seed(seed))
        assert levels(view - norm(T.functional.to_tensor(crop))) == 0


@pytest.mark.parametrize("size", [(300, 200), (80, 333), (224, 224), (31, 17)])
def test_evaluation_view_is_torchvisions(size):
    peer = T.Compose(
        [
            T.Resize(224, T.InterpolationMode.BICUBIC),
            T.CenterCrop(224),
            T.ToTensor(),
            T.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    view = build_eval_transform(224)(picture(*size))
    assert view.shape == (3, 224, 224)
    assert levels(view - peer(picture(*size))) == 0


def test_evaluation_view_takes_other_statistics():
    white = Image.new("RGB", (8, 8), "white")
    view = build_eval_transform(8, mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 2.0))(white)
    assert torch.allclose(view[:, 0, 0], torch.tensor([1.0, 1.5, 0.5]))


@pytest.mark.parametrize("size", [(640, 480), (50, 400), (9, 7)])
def test_one_shot_crop_follows_the_formula(size):
    width, height = size
    crop = OneShotRandomResizedCrop(32)
    clipped = 0
    for seed in range(200):
        box = crop.draw_box(height, width, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        area = height * width * torch.empty(1).uniform_(0.08, 1.0, generator=generator).item()
        log_aspect = torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3), generator=generator).item()
        free_width = round(math.sqrt(area * math.exp(log_aspect)))
        free_height = round(math.sqrt(area / math.exp(log_aspect)))
        expected = (min(free_height, height), min(free_width, width))
        assert box[2:] == expected
        clipped += expected != (free_height, free_width)
        assert 0 <= box[0] <= height - box[2]
        assert 0 <= box[1] <= width - box[3]
    assert clipped > 0  # where torchvision would draw again


def test_training_view_is_a_function_of_its_generator():
    view = LinearProbeTransform(32)
    image = picture(60, 40)
    first = [view(image, torch.Generator().manual_seed(seed)) for seed in range(20)]
    again = [view(image, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({float(view.sum()) for view in first}) == 20


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert to_rgb(half).getpixel((0, 0)) == (255, 127, 127)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 0])
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    grey = Image.new("L", (2, 2), 7)
    assert to_rgb(grey).getpixel((0, 0)) == (7, 7, 7)
