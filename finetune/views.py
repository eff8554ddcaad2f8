"""The fine-tuning view: timm's random resized crop, flip and automatic augmentation, seeded sample by sample."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms_factory import create_transform

from eva_clip.transforms import to_rgb

if TYPE_CHECKING:
    from finetune.sections import AugmentSection


@contextlib.contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Let the ambient generators (torch's, NumPy's, Python's) start from a draw of `generator`; restored afterwards.

    timm's augmentations draw from all three.
    """
    python, numpy, ambient = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(torch.randint(2**62, (1,), generator=generator).item())
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # views are made on the CPU; seeding GPUs too takes 0.1 ms
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(ambient)


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's posterize, also to no bits: black.

    The published policy draws magnitude 10, which means none, now and then; Pillow 13 refuses it.
    """
    result: Image.Image = auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
    return result


def replace_posterize(steps: Sequence[Any]) -> None:
    """Give timm's automatic augmentations, wherever they are among `steps`, the `posterize` above."""
    for step in steps:
        for operation in [*getattr(step, "ops", []), *itertools.chain(*getattr(step, "policy", []))]:
            if getattr(operation, "aug_fn", None) is auto_augment.posterize:
                operation.aug_fn = posterize


class FinetuneTransform:
    """A PIL image to a normalised view, float32 [3, image_size, image_size].

    With the published settings this is timm's random resized crop (area 0.08–1, bicubic), flip with probability 0.5 and
    RandAugment; a policy replaces colour jitter. All draws come from the generator that it is called with.

    Raises:
        ValueError: timm does not know the policy.
    """

    def __init__(self, image_size: int, mean: Sequence[float], std: Sequence[float], augment: AugmentSection) -> None:
        try:
            self.transform: Callable[[Image.Image], torch.Tensor] = create_transform(
                image_size,
                is_training=True,
                scale=(augment.scale, 1.0),
                hflip=augment.flip,
                auto_augment=augment.policy,
                color_jitter=augment.color_jitter,
                re_prob=augment.erasing,
                re_mode="pixel",
                interpolation="bicubic",
                mean=tuple(mean),
                std=tuple(std),
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(
                f"augment.policy {augment.policy!r} is unknown to timm ({error}); expected such as "
                "rand-m9-mstd0.5-inc1, augmix-m5, 3a, or null"
            ) from error

        replace_posterize(getattr(self.transform, "transforms", []))

    def __call__(self, image: Image.Image, generator: torch.Generator) -> torch.Tensor:
        """One view."""
        with seeded(generator):
            return self.transform(to_rgb(image))
