"""LARS against the published rule written out by hand, and the groups of the other optimizers."""

from __future__ import annotations

import pytest
import torch
from timm.optim import Lars as TimmLars
from torch import nn

from probes.optim import build_lars, build_optimizer
from probes.sections import OptimizerSection

TRUST, MOMENTUM, STEPS = 0.001, 0.9, 5


def build_params(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in [(4, 3), (4,), (2, 3, 2), (1, 1)]]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(param.shape, generator=generator) for param in build_params()]


def published_rule(
    params: list[torch.Tensor], steps: list[list[torch.Tensor]], rates: list[float], decay: float
) -> list[torch.Tensor]:
    """d = g + wd·p; d *= trust·|p|/|d|; mu = m·mu + d; p -= lr·mu. Vectors: d = g."""
    params = [param.detach().clone().double() for param in params]
    buffers = [torch.zeros_like(param) for param in params]
    for grads, rate in zip(steps, rates, strict=True):
        for param, grad, buffer in zip(params, grads, buffers, strict=True):
            update = grad.double()
            if param.ndim > 1:
                update = update + decay * param
                size, slope = param.norm(), update.norm()
                update = update * (TRUST * size / slope if size > 0 and slope > 0 else 1.0)
            buffer.mul_(MOMENTUM).add_(update)
            param.sub_(rate * buffer)
    return params


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], rates: list[float]) -> None:
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_is_the_published_rule(decay):
    params, rates = build_params(), [0.0, 0.5, 1.0, 1.0, 0.3]
    expected = published_rule(params, [gradients(step) for step in range(STEPS)], rates, decay)
    run(build_lars(params, lr=1.0, weight_decay=decay), params, rates)
    for param, wanted in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach().double(), wanted, rtol=2e-5, atol=1e-6)


def test_weight_decay_is_inside_the_norm_as_published_and_not_beside_it_as_in_timm():
    params, timms = build_params(), build_params()
    run(build_lars(params, lr=1.0, weight_decay=5.0), params, [1.0])
    run(TimmLars(timms, lr=1.0, momentum=MOMENTUM, weight_decay=5.0, trust_coeff=TRUST), timms, [1.0])
    assert (params[0] - timms[0]).abs().max() > 1e-5


def test_without_decay_lars_is_timms_bit_for_bit():
    params, timms, rates = build_params(), build_params(), [0.0, 0.5, 1.0, 1.0, 0.3]
    groups = [
        {"params": [p for p in timms if p.ndim > 1], "always_adapt": True},
        {"params": [p for p in timms if p.ndim <= 1], "always_adapt": False},
    ]
    run(build_lars(params, lr=1.0), params, rates)
    run(TimmLars(groups, lr=1.0, momentum=MOMENTUM, trust_coeff=TRUST), timms, rates)
    for param, wanted in zip(params, timms, strict=True):
        assert torch.equal(param, wanted)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_zero_matrix_takes_its_gradient_unscaled(decay):
    param = nn.Parameter(torch.zeros(2, 2))
    param.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    build_lars([param], lr=0.5, weight_decay=decay).step()
    torch.testing.assert_close(param.detach(), -0.5 * torch.tensor([[1.0, 2.0], [3.0, 4.0]]), rtol=0, atol=0)


def test_a_zero_gradient_leaves_a_matrix_alone_and_decay_still_shrinks_it():
    still, shrinking = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    still.grad, shrinking.grad = torch.zeros(2, 2), torch.zeros(2, 2)
    build_lars([still], lr=1.0).step()
    build_lars([shrinking], lr=1.0, weight_decay=0.1).step()
    assert torch.equal(still.detach(), torch.ones(2, 2))
    # d = 0.1·p, so trust·|p|/|d| = 0.01 and the step is 0.001·p
    torch.testing.assert_close(shrinking.detach(), torch.full((2, 2), 0.999))


def test_frozen_parameters_and_absent_gradients_are_left_alone():
    frozen, idle = nn.Parameter(torch.ones(2, 2), requires_grad=False), nn.Parameter(torch.ones(2, 2))
    optimizer = build_lars([frozen, idle], lr=1.0, weight_decay=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1
    optimizer.step()
    assert torch.equal(idle.detach(), torch.ones(2, 2))


def test_closure_is_called_with_gradients():
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = build_lars([param], lr=1.0)

    def closure() -> float:
        loss = (param**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    torch.testing.assert_close(param.detach(), torch.full((2, 2), 0.999))


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_other_optimizers_decay_matrices_only(name, kind):
    params = build_params()
    section = OptimizerSection(name=name, lr=0.25, weight_decay=0.1, momentum=0.8)
    optimizer = build_optimizer(params, section)
    assert isinstance(optimizer, kind)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in params] == [0.1, 0.0, 0.1, 0.1]
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    group = optimizer.param_groups[0]
    assert (group["momentum"] if name == "sgd" else group["betas"][0]) == 0.8


def test_recipe_lars_uses_the_recipes_figures():
    section = OptimizerSection(name="lars", lr=0.5, weight_decay=0.1, momentum=0.7)
    ours, direct = build_params(), build_params()
    run(build_optimizer(ours, section), ours, [0.5, 0.5])
    run(build_lars(direct, 0.5, momentum=0.7, weight_decay=0.1), direct, [0.5, 0.5])
    assert all(torch.equal(a, b) for a, b in zip(ours, direct, strict=True))
