"""Exponential moving average of weights, kept in fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from finetune.sharding import copy_whole, gather, is_sharded


class WeightAverage:
    """`average = decay · average + (1 - decay) · weight` after every optimizer step, in fp32 on the weights' device.

    The published fp16 runs kept theirs in fp16, which rounds to steps of 6e-4 near 1; an update of 1e-4 of the
    difference is then lost. Buffers that are floating point are copied, not averaged. `updates` counts the steps, is
    saved with the average and never reset by a resume.

    Args:
        model: whose trainable parameters are averaged; frozen ones do not move and are not stored.
        decay: share of the average that is kept, in [0, 1).

    Raises:
        ValueError: `decay` is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay of the weight average is {decay}; expected at least 0 and below 1")
        self.decay = decay
        self.updates = 0
        self.average = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in trainable(model).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step of the average towards the model's present weights."""
        weights = trainable(model)
        assert weights.keys() == self.average.keys(), "the set of trainable parameters changed"
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, [weights[name].float() for name in self.average], 1 - self.decay)
        self.updates += 1

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Put the average into the model for the length of a `with` block; the raw weights return unchanged."""
        weights = trainable(model)
        put = copy_all if is_sharded(model) else exchange_all  # a shard's storage cannot be exchanged
        raw = {name: parameter.data for name, parameter in weights.items()}
        if put is copy_all:
            raw = {name: tensor.clone() for name, tensor in raw.items()}
        try:
            put(weights, self.average)
            yield
        finally:
            put(weights, raw)

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply what moves the model's tensors, such as a change of device, to the average."""
        self.average = {name: fn(tensor) for name, tensor in self.average.items()}

    def state_dict(self) -> dict[str, Any]:
        """Average, decay and update count, for a checkpoint."""
        return {"decay": self.decay, "updates": self.updates, "average": gather(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: the checkpoint averages other parameters.
        """
        if state["average"].keys() != self.average.keys():
            differing = sorted(state["average"].keys() ^ self.average.keys())
            raise ValueError(
                f"the checkpoint's weight average has other parameters than the model ({differing[:3]}…); resume with "
                "the recipe that the run was started with"
            )
        for name, tensor in state["average"].items():
            copy_whole(self.average[name], tensor)
        self.updates = int(state["updates"])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that take gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def copy_all(weights: Mapping[str, nn.Parameter], source: Mapping[str, torch.Tensor]) -> None:
    """Overwrite weights with tensors of the same names."""
    for name, parameter in weights.items():
        parameter.copy_(source[name])


def exchange_all(weights: Mapping[str, nn.Parameter], source: Mapping[str, torch.Tensor]) -> None:
    """Let weights stand on tensors of the same names, without a copy where the type is theirs."""
    for name, parameter in weights.items():
        parameter.data = source[name].to(parameter.dtype)
