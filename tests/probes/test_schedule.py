"""The published schedule, step by step."""

from __future__ import annotations

import math

import numpy as np
import pytest

from probes.schedule import epoch_means, warmup_cosine


def test_every_step_follows_the_published_rule():
    rates = warmup_cosine(2.0, 0.5, epochs=6, steps_per_epoch=5, warmup_epochs=2)
    warm = [2.0 * step / 9 for step in range(10)]
    cosine = [0.5 + 0.5 * 1.5 * (1 + math.cos(math.pi * i / 20)) for i in range(20)]
    assert rates.shape == (30,)
    assert rates.dtype == np.float64
    np.testing.assert_allclose(rates, warm + cosine, rtol=1e-12, atol=0)


def test_the_first_step_is_zero_and_the_peak_occurs_twice():
    rates = warmup_cosine(1.0, 0.0, epochs=10, steps_per_epoch=8, warmup_epochs=2)
    assert rates[0] == 0
    assert np.flatnonzero(rates == 1.0).tolist() == [15, 16]
    assert 0 < rates[-1] < rates[-2]


def test_without_warmup_the_run_starts_at_the_peak():
    rates = warmup_cosine(0.3, 0.0, epochs=2, steps_per_epoch=4, warmup_epochs=0)
    assert rates[0] == 0.3
    assert np.all(np.diff(rates) < 0)


def test_a_run_of_warmup_alone_ends_at_the_peak():
    rates = warmup_cosine(0.3, 0.0, epochs=2, steps_per_epoch=4, warmup_epochs=2)
    np.testing.assert_array_equal(rates, np.linspace(0, 0.3, 8))


def test_part_of_an_epoch_of_warmup_is_whole_steps():
    rates = warmup_cosine(1.0, 0.0, epochs=2, steps_per_epoch=5, warmup_epochs=0.5)
    np.testing.assert_allclose(rates[:3], [0.0, 1.0, 1.0])
    assert rates[3] < 1


def test_a_final_rate_equal_to_the_peak_stays_there():
    rates = warmup_cosine(0.1, 0.1, epochs=3, steps_per_epoch=4, warmup_epochs=1)
    np.testing.assert_allclose(rates[4:], 0.1)


@pytest.mark.parametrize(("epochs", "steps", "warmup"), [(0, 5, 0), (5, 0, 0), (5, 4, 6), (5, 4, -1)], ids=str)
def test_no_schedule_is_refused(epochs, steps, warmup):
    with pytest.raises(ValueError, match=f"{epochs} epochs of {steps} steps"):
        warmup_cosine(1.0, 0.0, epochs, steps, warmup)


def test_epoch_means_are_over_steps():
    assert epoch_means(np.array([0.0, 1.0, 2.0, 4.0, 6.0, 8.0]), 2) == [1.0, 6.0]
