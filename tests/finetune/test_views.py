"""The fine-tuning view where timm's operations and Pillow disagree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment

from eva_clip.specs import CLIP_MEAN, CLIP_STD
from finetune.sections import AugmentSection
from finetune.views import FinetuneTransform, posterize


def test_posterize_keeps_the_leading_bits_down_to_none():
    """As Pillow's own table did for every number of bits before it refused 0."""
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([pixels] * 3, axis=-1))
    for bits in range(9):
        expected = image.point([value & ~(2 ** (8 - bits) - 1) for value in range(256)] * 3)
        np.testing.assert_array_equal(np.asarray(posterize(image, bits)), np.asarray(expected), err_msg=str(bits))


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1", "augmix-m10", "original", "3a"])
def test_no_draw_of_a_policy_ends_a_run(policy):
    """At magnitude 10 posterizing keeps no bits."""
    view = FinetuneTransform(32, CLIP_MEAN, CLIP_STD, AugmentSection(policy=policy))
    steps = view.transform.transforms
    operations = [op for step in steps for op in getattr(step, "ops", [])]
    operations += [op for step in steps for pair in getattr(step, "policy", []) for op in pair]
    assert all(op.aug_fn is not auto_augment.posterize for op in operations)
    assert policy == "3a" or any(op.aug_fn is posterize for op in operations)
    image, generator = Image.fromarray(load_sample_images().images[0][::8, ::8]), torch.Generator().manual_seed(0)
    for _ in range(300):
        assert torch.isfinite(view(image, generator)).all()
