"""Predicted hours from the published cost of a forward pass."""

from __future__ import annotations

import pytest

from eva_clip.specs import get_model_spec
from finetune.compute_cost import EFFICIENCY, forward_equivalents, measure_peak_gib, measure_tflops, predict_hours
from finetune.plan import hours_of
from finetune.sections import FinetuneRecipe, TuneSection


def test_hours_of_the_published_run():
    """533.6 GFLOP a forward pass, three of them an image."""
    images = 2502 * 512 * 20
    hours = predict_hours(get_model_spec("EVA01-CLIP-g-14"), images, 3.0, tflops=8 * 600)
    assert hours == pytest.approx(images * 3 * 533.6e9 / (EFFICIENCY * 8 * 600e12) / 3600, rel=2e-3)


def test_images_that_are_scored_pass_once_or_twice():
    recipe, spec = FinetuneRecipe(), get_model_spec("EVA01-CLIP-g-14")
    recipe.regularisation.drop_path = 0.0
    trained = hours_of(recipe, spec, 100, 0, False, 10.0)
    assert trained == pytest.approx(predict_hours(spec, 100 * 512 * recipe.schedule.epochs, 3.0, 10.0))
    both = hours_of(recipe, spec, 100, 7000, False, 10.0) - trained
    recipe.ema.decay = None
    raw = hours_of(recipe, spec, 100, 7000, False, 10.0) - trained
    assert both == pytest.approx(2 * raw)
    assert raw == pytest.approx(predict_hours(spec, 7000 * recipe.schedule.epochs, 1.0, 10.0), rel=1e-6)


@pytest.mark.parametrize(
    ("tune", "checkpointing", "passes"),
    [
        (TuneSection(), False, 3),
        (TuneSection(), True, 4),
        (TuneSection(what="lora"), False, 2),
        (TuneSection(what="head"), True, 1),
        (TuneSection(what="last_blocks", blocks=10), False, 1 + 2 * 10 / 40),
    ],
)
def test_passes_of_what_is_trained(tune, checkpointing, passes):
    assert forward_equivalents(tune, 40, checkpointing=checkpointing) == passes


def test_dropped_paths_cost_nothing():
    assert forward_equivalents(TuneSection(), 40, checkpointing=False, dropped=0.2) == pytest.approx(2.4)


def test_this_machine_multiplies_and_remembers():
    import torch

    before, what = measure_peak_gib()
    held = torch.ones(2**26)  # 0.25 GiB
    after, _ = measure_peak_gib()
    assert held.sum() == 2**26
    assert measure_tflops("fp32", seconds=0.01) > 0
    if what == "the whole process":
        assert before > 0.1
        assert after >= before
