"""What is planned for a device: published sizes, sharding, copies, and free memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune.activations import Activations, StepCounter, build_meta
from finetune.memory import (
    OVERHEAD_GIB,
    Memory,
    Parameters,
    Room,
    choose_micro_batch,
    count_parameters,
    divisors,
    measure_room,
    predict_memory,
)
from finetune.plan import plan_finetune, settle_batch
from finetune.sections import FinetuneRecipe
from probes.recipe import load_recipe
from probes.sections import RecipeError

REPO = Path(__file__).resolve().parents[2]
GIANT = 1_012_555_112
GIB = 2**30


def recipe(name: str, *overrides: str) -> FinetuneRecipe:
    return load_recipe(REPO / "recipes" / "imagenet1k" / f"{name}.yaml", overrides, FinetuneRecipe)


def memory_of(*overrides: str) -> Memory:
    """Of g/14 without activations."""
    nothing = Activations(0, 0, 0)
    return predict_memory(recipe("finetune_224", *overrides), Parameters(GIANT, GIANT, 25 * 10**6, 2 * 10**6), nothing)


def test_state_is_five_fp32_tensors_of_what_is_trained():
    assert memory_of().tensors == pytest.approx(20 * GIANT / GIB)
    assert memory_of("ema.decay=null").tensors == pytest.approx(16 * GIANT / GIB)
    assert memory_of("ema.decay=null", "optimizer.name=sgd").tensors == pytest.approx(12 * GIANT / GIB)
    assert memory_of("ema.decay=null", "optimizer.name=adamw_8bit").tensors == pytest.approx(10 * GIANT / GIB)
    assert memory_of("trainer.devices=8").tensors == pytest.approx(20 * GIANT / GIB), "ddp: gradients once"


def test_sharding_divides_all_of_it():
    part = memory_of("trainer.strategy=fsdp2", "trainer.devices=4", "trainer.nodes=2", "trainer.precision=bf16")
    state = part.weights + part.average + part.gradients + part.moments
    assert state == pytest.approx(20 * GIANT / 8 / GIB)
    assert state == pytest.approx(2.36, abs=0.01)
    assert 0.2 < part.gathered < 0.6
    copies = Activations(10 * GIB, 2 * GIB, GIB)
    sharded = recipe("finetune_224", "trainer.strategy=fsdp2", "trainer.devices=8", "trainer.precision=bf16")
    assert predict_memory(sharded, Parameters(1, 1, 1, 1), copies).tensors == pytest.approx(11, abs=1e-3), "no copies"
    sharded = recipe("finetune_224", "trainer.strategy=fsdp2", "trainer.devices=8")  # fp16 is cast from gathered fp32
    assert predict_memory(sharded, Parameters(1, 1, 1, 1), copies).tensors == pytest.approx(13, abs=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_giant_fits_eight_devices_of_16_gib(precision):
    asked = recipe("finetune_224", "trainer.strategy=fsdp2", "trainer.devices=8", f"trainer.precision={precision}")
    planned, memory = settle_batch(asked, 1000, Room(free=15.5, total=16.0))
    assert planned.trainer.micro_batch >= 8
    assert memory.total <= 15.5
    with pytest.raises(RecipeError, match=r"needs about 20\.\d GiB, and the device has 15\.5 free of 16\.0"):
        settle_batch(recipe("finetune_224", "trainer.devices=8"), 1000, Room(free=15.5, total=16.0))


def test_eva02_l14_at_336_is_planned_at_what_80_gib_hold():
    asked, room = recipe("finetune_eva02_l14_336", "trainer.precision=bf16"), Room(free=78.5, total=79.1)
    planned, memory = settle_batch(asked, 1000, room)
    assert (planned.trainer.micro_batch, planned.trainer.checkpointing) == (64, False)
    assert memory.total <= room.free
    counter = StepCounter(asked, 1000)
    twice = predict_memory(asked, counter.parameters, counter.count(128, checkpointing=False))
    assert twice.total > room.total, "the micro-batch that was planned when a formula of other towers was used"


def test_free_memory_counts_not_all_of_it():
    asked = recipe("finetune_eva02_b16", "trainer.precision=bf16")
    alone, _ = settle_batch(asked, 1000, Room(free=23.5, total=24.0))
    shared, memory = settle_batch(asked, 1000, Room(free=8.0, total=24.0))
    assert shared.trainer.micro_batch < alone.trainer.micro_batch
    assert memory.total <= 8


def test_what_a_recipe_fixes_stays_and_the_rest_is_chosen():
    def predict(size: int, checkpointing: bool) -> Memory:
        return Memory(1, 0, 0, 0, 0, 0, size * (0.1 if checkpointing else 1.0))

    def choose(free: float, **trainer: object) -> tuple[int, bool]:
        asked = recipe("finetune_224")
        for name, value in {"global_batch": 48, **trainer}.items():
            setattr(asked.trainer, name, value)
        return choose_micro_batch(asked, predict, Room(free, 80.0))

    assert choose(14.1 + OVERHEAD_GIB - 1) == (12, False)
    assert choose(6.9 + OVERHEAD_GIB) == (48, True), "fewer than 8 images: recomputation pays"
    assert choose(6.9 + OVERHEAD_GIB, checkpointing=False) == (4, False)
    assert choose(6.9 + OVERHEAD_GIB, micro_batch=8) == (8, True)
    assert choose(60) == (48, False)
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    with pytest.raises(RecipeError, match=r"needs about 2\.1 GiB, and the device has 1\.0 free of 80\.0; try tune"):
        choose(1.0)
    assert choose_micro_batch(recipe("finetune_224"), predict, None) == (32, False)


def test_a_device_says_what_is_free():
    room = measure_room()
    assert (room is not None) == torch.cuda.is_available()
    assert room is None or 0 < room.free <= room.total


def test_parameters_are_counted_with_the_text_side():
    contrastive = ["head.pool=cls", "head.start=zero_shot", "head.objective=contrastive"]
    contrastive += ["regularisation.label_smoothing=0"]
    alone = count_parameters(build_meta(recipe("finetune_eva02_b16", "head.pool=cls"), 10))
    both = count_parameters(build_meta(recipe("finetune_eva02_b16", *contrastive), 10))
    text = 49408 * 512 + 77 * 512 + 12 * (12 * 512**2 + 13 * 512) + 2 * 512 + 512 * 512  # open_clip's tower of B/16
    sides = text + 768 * 512 + 512 + 1  # the image's projection, which has a bias, and the scale
    assert both.total - alone.total == sides
    assert both.trainable - alone.trainable == sides - 10 * 769
    assert alone.block == pytest.approx(7.1e6, rel=0.02)


def test_the_plan_lists_the_parts():
    plan = plan_finetune(recipe("finetune_eva02_b16", "trainer.precision=bf16"), Room(free=23.5, total=24.0))
    assert sum(plan["memory_gib"].values()) + OVERHEAD_GIB == pytest.approx(plan["peak_memory_gib"], abs=0.01)
    assert plan["memory_gib"]["weights"] == pytest.approx(4 * plan["total_parameters"] / GIB, abs=1e-3)
    assert plan["peak_memory_gib"] <= 23.5
