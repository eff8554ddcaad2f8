"""Counted activations against whole towers, a block by hand, and the allocator of real steps."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from eva_clip.classifier import Classifier
from eva_clip.models import DTYPES
from eva_clip.specs import add_model_config
from finetune.activations import StepCounter, build_meta
from finetune.build import build_untrained
from finetune.contrastive_step import ContrastiveStep
from finetune.fake_step import GpuKernels, Ledger, gpu_autocast, pass_back
from finetune.sections import FinetuneRecipe
from finetune.targets import classification_losses
from probes.recipe import load_recipe

REPO = Path(__file__).resolve().parents[2]
WHAT = ["all", "last_blocks", "norm", "bias", "lora"]
FAMILIES = ["eva01", "eva02", "eva02_post_norm", "clip"]
PLAIN = "regularisation.skip_dropped=false"
CONTRASTIVE = [
    "head.pool=cls",
    "head.start=zero_shot",
    "head.objective=contrastive",
    "regularisation.label_smoothing=0",
]


VISION = {"image_size": 64, "layers": 6, "width": 128, "head_width": 32, "mlp_ratio": 3.0, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}


@pytest.fixture
def small(tmp_path):
    """`small(family, *overrides)`: a recipe of a tower of that family, six blocks deep."""

    def build(family: str, *overrides: str) -> FinetuneRecipe:
        if "tune.what=lora" in overrides:
            pytest.importorskip("peft")
        config = tmp_path / f"planned-{family}.json"
        shape = {"embed_dim": 16, "vision_cfg": VISION | {"family": family}, "text_cfg": TEXT}
        config.write_text(json.dumps(shape), encoding="utf-8")
        name = add_model_config(config)
        common = ["data.train=nowhere", f"model.name={name}", f"model.config={config}", "tune.blocks=3", PLAIN]
        common += ["tune.lora_targets=[proj,fc1,fc2]"]
        return recipe("custom/finetune_folder", *common, *overrides)

    return build


def recipe(name: str, *overrides: str) -> FinetuneRecipe:
    return load_recipe(REPO / "recipes" / f"{name}.yaml", overrides, FinetuneRecipe)


def saved_bytes(recipe: FinetuneRecipe, classes: int, micro_batch: int, *, checkpointing: bool = False) -> int:
    """What autograd still holds after a forward pass of the whole tower, every block of it; storages count once."""
    model, found = build_meta(recipe, classes), {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cuda:0").train()
        if checkpointing:
            model.tower.set_grad_checkpointing(True)
        own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                found[StorageWeakRef(storage)] = storage.nbytes()
            return tensor

        size = model.spec.vision.image_size
        images = torch.empty(micro_batch, 3, size, size, device="cuda:0")
        target = torch.zeros(micro_batch, dtype=torch.int64, device="cuda:0")
        half = DTYPES[recipe.trainer.precision] if recipe.trainer.precision != "fp32" else None
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, gpu_autocast(half), GpuKernels(classes):
            if recipe.head.objective == "contrastive":
                loss = ContrastiveStep(model, model.texts).score(images, target, len(images), 0, 1, 0, 1).total
            else:
                loss = classification_losses(model(images), target, recipe.regularisation.label_smoothing).sum()
        assert loss.requires_grad
        return sum(size for storage, size in found.items() if not storage.expired())


def check_whole(asked: FinetuneRecipe, classes: int) -> None:
    counter = StepCounter(asked, classes)
    images = 3 * 3 * counter.model.spec.vision.image_size**2 * 4
    for checkpointing in (False, True):
        counted = counter.count(3, checkpointing=checkpointing)
        saved = saved_bytes(asked, classes, 3, checkpointing=checkpointing)
        assert counted.kept + counted.copies - images == pytest.approx(saved, rel=1e-4)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_blocks_of_a_kind_tell_what_the_whole_tower_keeps(small, family, what):
    for precision in ("fp32", "bf16" if what != "all" else "fp16"):
        check_whole(small(family, f"tune.what={what}", f"trainer.precision={precision}"), 10)


@pytest.mark.parametrize(
    ("name", "what", "precision"),
    [
        ("finetune_224", "all", "fp16"),
        ("finetune_336", "bias", "bf16"),
        ("finetune_eva02_b16", "all", "bf16"),
        ("finetune_eva02_l14_336", "last_blocks", "fp32"),
    ],
)
def test_full_sizes_too(name, what, precision):
    check_whole(recipe(f"imagenet1k/{name}", f"tune.what={what}", f"trainer.precision={precision}", PLAIN), 1000)


def test_a_block_by_hand():
    """Bytes of a g/14 block in bf16, per token of width D: the two norms' inputs 4 + 4, what they hand on 2 + 2,
    queries, keys and values 6, attention's output 2, the MLP's two hidden layers 2 · 4.3637 each; norms' statistics and
    the normaliser of 16 heads are fp32."""
    asked = recipe("imagenet1k/finetune_224", "trainer.precision=bf16", PLAIN)
    counted, width, tokens = StepCounter(asked, 1000).count(8, checkpointing=False), 1408, 8 * 257
    hidden = int(width * 4.3637)
    block = tokens * (20 * width + 4 * hidden + 2 * 2 * 4 + 16 * 4)
    assert counted.kept == pytest.approx(40 * block, rel=0.01)
    matrices = 40 * (4 * width**2 + 2 * width * hidden)
    assert counted.copies == pytest.approx(2 * matrices, rel=0.01)
    assert counted.copies / 2**30 == pytest.approx(1.9, abs=0.05)
    recomputed = StepCounter(asked, 1000).count(8, checkpointing=True)
    assert recomputed.kept == pytest.approx(40 * tokens * 4 * width, rel=0.02)
    assert recomputed.total > recomputed.kept + block  # one block at a time is whole again


def allocated(model: Classifier, images: torch.Tensor, *, checkpointing: bool) -> int:
    """Highest memory of torch's allocator in a step of a real model, beyond its own; gradients go as they come."""
    model.tower.set_grad_checkpointing(checkpointing)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    target = torch.zeros(len(images), dtype=torch.int64)
    classification_losses(model(images), target, 0.0).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        classification_losses(model(images), target, 0.0).sum().backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    steps = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert sum(steps) == 0
    return max(itertools.accumulate(steps))


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_peak_is_the_allocators(small, family, what):
    asked = small(family, f"tune.what={what}", "trainer.precision=fp32", "regularisation.drop_path=0")
    torch.manual_seed(0)
    model, counter = build_untrained(asked, 10, None).train(), StepCounter(asked, 10)
    images = torch.randn(16, 3, 64, 64)
    for checkpointing in (False, True):
        counted = counter.count(16, checkpointing=checkpointing).total - images.nbytes
        if family == "eva02":  # a processor's kernel lays attention's output as rotated queries lie: it is copied once
            blocks = 1 if checkpointing else {"last_blocks": 3}.get(what, 6)
            counted += blocks * 16 * 65 * 128 * 4
        assert counted == pytest.approx(allocated(model, images, checkpointing=checkpointing), rel=0.02)


def test_dropped_paths_keep_less_and_never_more_than_planned(small):
    """On 60 draws of a real tower: none above the plan, and the plan within five standard deviations of the mean."""
    asked = small("eva01", "trainer.precision=fp32", "regularisation.drop_path=0.4", "regularisation.skip_dropped=true")
    torch.manual_seed(0)
    model, images = build_untrained(asked, 10, None).train(), torch.randn(16, 3, 64, 64)
    found = []
    for _ in range(60):
        ledger = Ledger(model.parameters(), model.buffers())
        with ledger:
            loss = classification_losses(model(images), torch.zeros(16, dtype=torch.int64), 0.0).sum()
        found.append(ledger.alive + images.nbytes)
        del loss
    planned = StepCounter(asked, 10).count(16, checkpointing=False).kept
    every = StepCounter(small("eva01", "trainer.precision=fp32"), 10).count(16, checkpointing=False).kept
    mean, deviation = statistics.mean(found), statistics.stdev(found)
    assert max(found) <= planned < every
    assert planned == pytest.approx(mean + 5 * deviation, rel=0.06)


def test_both_towers_of_a_contrastive_objective_are_counted(small):
    asked = small("eva01", "trainer.precision=bf16", *CONTRASTIVE)
    counter = StepCounter(asked, 10)
    counted, images = counter.count(8, checkpointing=False), 8 * 3 * 64**2 * 4
    assert counted.kept + counted.copies - images == pytest.approx(saved_bytes(asked, 10, 8), rel=0.05)
    alone = StepCounter(small("eva01", "trainer.precision=bf16"), 10).count(8, checkpointing=False)
    assert counted.kept > alone.kept
    assert counter.parameters.trainable > StepCounter(small("eva01"), 10).parameters.trainable


def test_the_graph_is_passed_through_as_autograd_does():
    """Real tensors, so that autograd's own engine can run: the same highest point."""
    model = nn.Sequential(nn.Linear(40, 80), nn.LayerNorm(80), nn.GELU(), nn.Linear(80, 3))
    images, peaks = torch.randn(200, 40), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    for way in (pass_back, lambda loss: loss.pop().backward()):
        ledger = Ledger(model.parameters(), [images])
        with ledger:
            way([F.cross_entropy(model(images), torch.zeros(200, dtype=torch.int64))])
        assert ledger.alive == 0
        peaks.append(ledger.peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=1e-3)


def test_a_process_that_has_planned_can_train_and_be_forked():
    """Without a GPU, autograd must not take the plan's fake ones for devices: no fork survives its threads for them."""
    program = """
import os, torch
from finetune.activations import StepCounter
from finetune.sections import FinetuneRecipe
from probes.recipe import load_recipe
overrides = ["data.train=nowhere", "model.name=EVA02-CLIP-B-16", "trainer.precision=bf16"]
recipe = load_recipe("recipes/custom/finetune_folder.yaml", overrides, FinetuneRecipe)
StepCounter(recipe, 10).count(1, checkpointing=False)
def train():
    torch.zeros((), requires_grad=True).backward()
train()
child = os.fork()
if child == 0:
    try:
        train()
        os._exit(0)
    finally:
        os._exit(1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", program]
    outcome = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
