"""Data-parallel training: gradients are there once, and processes agree on the micro-batch."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from finetune.fake_step import Ledger
from finetune.fit import SameBatch
from finetune.sections import TrainerSection
from finetune.sharding import build_strategy, clear_gradients
from probes.sections import RecipeError

SIDE = 256


@pytest.fixture
def group(tmp_path):
    """One process as a group."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def train(options: dict[str, object]) -> float:
    """Highest memory of gradients and buckets, in bytes of weights, after the first step of three micro-batches."""
    torch.manual_seed(0)
    plain = nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False) for _ in range(16)])
    images, peak = torch.randn(2, SIDE), 0
    weights = sum(parameter.nbytes for parameter in plain.parameters())
    alone = torch.autograd.grad(plain(images).square().sum(), list(plain.parameters()))
    ledger = Ledger(plain.parameters(), [images])
    with ledger:
        wrapped = DistributedDataParallel(plain, **options)
        for _ in range(3):
            ledger.peak = 0
            for number in range(3):
                with wrapped.no_sync() if number < 2 else contextlib.nullcontext():
                    wrapped(images).square().sum().backward()
            peak = ledger.peak
            for parameter, gradient in zip(plain.parameters(), alone, strict=True):
                torch.testing.assert_close(parameter.grad, 3 * gradient)
            clear_gradients(wrapped)
    return peak / weights


def test_gradients_lie_in_the_buckets_that_are_sent(group):
    options = build_strategy(TrainerSection(strategy="ddp", devices=2))._ddp_kwargs
    assert train(options) == pytest.approx(1, abs=0.15)
    assert train({}) == pytest.approx(2, abs=0.15)


def test_gradients_of_one_process_go():
    plain = nn.Linear(3, 3)
    plain(torch.ones(1, 3)).sum().backward()
    clear_gradients(plain)
    assert all(parameter.grad is None for parameter in plain.parameters())


def test_processes_that_planned_different_micro_batches_end_together():
    """The strategy's gathered values stand in for a second process with less free memory."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"), all_gather=lambda own: torch.stack([own, own // 2]))
    trainer = SimpleNamespace(strategy=strategy)
    with pytest.raises(RecipeError, match=r"micro-batches of \[8, 16\].* set trainer.micro_batch=8"):
        SameBatch(16).on_fit_start(trainer, None)
    strategy.all_gather = lambda own: torch.stack([own, own])
    SameBatch(16).on_fit_start(trainer, None)
