"""`HeadBank`: many linear heads trained at once on one stream of features."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from probes.bank_group import HeadGroup
from probes.bank_loss import LOSSES
from probes.bank_optim import STACKED

HEAD_KINDS = ("bn_linear", "linear")


@dataclass(frozen=True)
class BankHead:
    """One head of a bank."""

    features: str
    """Name of the features that it sees."""
    lr: float
    """Peak learning rate, absolute: never rescaled by the batch."""
    weight_decay: float = 0.0
    """Weight decay of the weights; biases have none."""
    kind: str = "bn_linear"
    """"bn_linear" or "linear", as `probes.heads.build_head`."""

    @property
    def name(self) -> str:
        """A text that tells the heads of a bank apart."""
        return f"{self.features} {self.kind} lr={self.lr:g} wd={self.weight_decay:g}"


def build_grid(
    features: Iterable[str], lrs: Iterable[float], weight_decays: Iterable[float] = (0.0,), kind: str = "bn_linear"
) -> list[BankHead]:
    """Every combination of feature kinds, learning rates and weight decays, in that order of nesting."""
    return [BankHead(*values, kind) for values in itertools.product(features, lrs, weight_decays)]


class HeadBank(nn.Module):
    """Trains its heads side by side; each as if it were alone, up to the rounding of float32.

    Heads of one kind on one feature kind are rows of one matrix, so a step costs two matrix products for all of them
    however many there are. No autograd is involved. A head whose loss is no longer finite does not touch the others;
    `freeze_diverged` sets it to 0 and marks it.

    Args:
        heads: the heads, H of them; scores come back in their order.
        feature_dims: width D of every feature kind.
        num_classes: C.
        optimizer: "sgd", "lars" or "adamw", of all heads.
        momentum: momentum of LARS and SGD; beta1 of AdamW.
        loss: "cross_entropy" on class indices [B], or "bce" on any number of classes a sample, [B, C] of 0 and 1.
        class_weights: [C]; multiplies the terms of each class in the sum over the samples that is divided by their
            number.
        initial: by feature kind, weights [C, D] to start from (zero-shot weights, say); others are drawn.
        seed: of the drawn weights, which all heads of one kind on one feature kind share. They are those of
            `build_head` after `torch.manual_seed(seed)`.

    Raises:
        ValueError: heads that cannot be, or weights of another shape; all problems at once.
    """

    diverged: torch.Tensor
    class_weights: torch.Tensor | None
    order: torch.Tensor

    def __init__(
        self,
        heads: Sequence[BankHead],
        feature_dims: Mapping[str, int],
        num_classes: int,
        *,
        optimizer: str = "sgd",
        momentum: float = 0.9,
        loss: str = "cross_entropy",
        class_weights: torch.Tensor | None = None,
        initial: Mapping[str, torch.Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        initial = initial or {}
        _check(heads, feature_dims, num_classes, optimizer, loss, class_weights, initial)
        self.heads, self.feature_dims = list(heads), dict(feature_dims)
        self.num_classes, self.loss = num_classes, loss
        self.optimizer_name, self.momentum = optimizer, momentum
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.register_buffer("diverged", torch.zeros(len(heads), dtype=torch.bool))
        self.members: dict[tuple[str, str], list[int]] = {}
        for position, head in enumerate(heads):
            self.members.setdefault((head.features, head.kind), []).append(position)
        grouped = torch.tensor([position for positions in self.members.values() for position in positions])
        self.register_buffer("order", grouped.argsort(), persistent=False)  # of the heads among the groups
        self.groups = nn.ModuleList(
            HeadGroup(
                kind,
                [heads[position] for position in positions],
                feature_dims[features],
                num_classes,
                optimizer=optimizer,
                momentum=momentum,
                initial=initial.get(features),
                seed=seed,
            )
            for (features, kind), positions in self.members.items()
        )

    @torch.no_grad()
    def train_step(
        self, features: Mapping[str, torch.Tensor], targets: torch.Tensor, factor: float = 1.0
    ) -> torch.Tensor:
        """Update every head on one batch.

        Args:
            features: every feature kind [B, D], any floating type.
            targets: [B], or [B, C] for the loss "bce".
            factor: the schedule's value; multiplies every head's learning rate.

        Returns:
            The losses [H] before the update.
        """
        targets = targets.to(self.diverged.device)
        errors_of = partial(LOSSES[self.loss], targets=targets, class_weights=self.class_weights)
        losses = [group.train_step(features[name], errors_of, factor) for name, _, group in self._groups()]
        return torch.cat(losses)[self.order]

    @torch.no_grad()
    def logits(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits [H, C, B] of every head, in the order of `heads`."""
        rows = len(next(iter(features.values())))
        logits = torch.empty(len(self.heads), self.num_classes, rows, device=self.diverged.device)
        for name, positions, group in self._groups():
            logits[positions] = group.logits(features[name])
        return logits

    def freeze_diverged(self, losses: torch.Tensor) -> torch.Tensor:
        """Set heads whose loss is not finite to 0, for good; returns which are so by now, bool [H].

        Args:
            losses: [H], of a step or summed over some.
        """
        self.diverged |= ~torch.isfinite(losses)
        for _, positions, group in self._groups():
            group.freeze(self.diverged[positions])
        return self.diverged

    def build_single(self, head: int) -> nn.Sequential:
        """One head on its own, as `build_head` makes it: features [B, D] to logits [B, C], in eval mode."""
        for _, positions, group in self._groups():
            if head in positions:
                return group.build_single(positions.index(head))
        raise IndexError(f"head {head} of a bank of {len(self.heads)}")

    def get_extra_state(self) -> dict[str, Any]:
        """What the stored weights belong to."""
        described = [asdict(head) for head in self.heads]
        return {"heads": described, "optimizer": self.optimizer_name, "momentum": self.momentum, "loss": self.loss}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse the state of another bank.

        Raises:
            ValueError: heads, optimizer or loss differ.
        """
        own = self.get_extra_state()
        differing = [key for key in own if state[key] != own[key]]
        if differing:
            raise ValueError(
                f"the stored bank has other {', '.join(differing)} than this one; continue with what it was started "
                "with, or start a new run"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Continue from `state_dict()`, bit for bit; heads that had diverged stay frozen."""
        if "_extra_state" in state_dict:  # before a copy fails on shapes, with a message that names no head
            self.set_extra_state(state_dict["_extra_state"])
        outcome = super().load_state_dict(state_dict, strict, assign)
        self.freeze_diverged(torch.zeros(len(self.heads), device=self.diverged.device))
        return outcome

    def _groups(self) -> Iterable[tuple[str, list[int], HeadGroup]]:
        for ((features, _), positions), group in zip(self.members.items(), self.groups, strict=True):
            assert isinstance(group, HeadGroup)
            yield features, positions, group


def _check(
    heads: Sequence[BankHead],
    feature_dims: Mapping[str, int],
    num_classes: int,
    optimizer: str,
    loss: str,
    class_weights: torch.Tensor | None,
    initial: Mapping[str, torch.Tensor],
) -> None:
    problems = [] if heads else ["a bank of no heads; name at least one learning rate and one feature kind"]
    for head in heads:
        if head.features not in feature_dims:
            problems.append(f"{head.name}: no features of that name; there are {', '.join(feature_dims)}")
        if head.kind not in HEAD_KINDS:
            problems.append(f"{head.name}: unknown kind; expected {' or '.join(HEAD_KINDS)}")
        for key in ("lr", "weight_decay"):
            value = getattr(head, key)
            if not (math.isfinite(value) and value >= 0):
                problems.append(f"{head.name}: {key} is {value}; expected a finite number, at least 0")
    doubled = sorted({head.name for head in heads if heads.count(head) > 1})
    problems += [f"{name}: given more than once" for name in doubled]
    if optimizer not in STACKED:
        problems.append(f"unknown optimizer {optimizer!r}; expected one of {', '.join(STACKED)}")
    if loss not in LOSSES:
        problems.append(f"unknown loss {loss!r}; expected one of {', '.join(LOSSES)}")
    if class_weights is not None and class_weights.shape != (num_classes,):
        problems.append(f"class weights of shape {list(class_weights.shape)}; expected [{num_classes}]")
    for name, weights in initial.items():
        expected = (num_classes, feature_dims.get(name))
        if tuple(weights.shape) != expected:
            problems.append(f"initial weights of {name!r} are {list(weights.shape)}; expected {list(expected)}")
    if problems:
        raise ValueError("\n".join(problems))
