"""Train a bank of heads on stored features, and choose a head on the split that selects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from probes.bank import HeadBank
from probes.plan import steps_per_epoch
from probes.sampling import EpochSampler
from probes.schedule import warmup_cosine

EVALUATION_LOGITS = 2**24
"""Logits that an evaluation holds at once, all heads together: 64 MiB."""


@dataclass(frozen=True)
class FeatureSplit:
    """One split's features of every kind with their targets."""

    features: Mapping[str, torch.Tensor]
    """[N, D] of each kind, any floating type; batches become float32."""
    targets: torch.Tensor
    """Class indices [N], or [N, C] of 0 and 1."""
    name: str = ""
    """Of the split."""

    def rows(self, rows: torch.Tensor | slice) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Features of every kind and targets of some rows."""
        return {name: values[rows] for name, values in self.features.items()}, self.targets[rows]

    def __len__(self) -> int:
        return len(self.targets)


@torch.no_grad()
def evaluate_bank(bank: HeadBank, split: FeatureSplit) -> list[dict[str, float]]:
    """Scores of every head over a split, each sample counted once.

    Returns:
        A row a head: `loss`, the mean over samples; `acc1` in percent; and `balanced_acc1`, the mean over the classes
        present of the accuracy within each, in percent. For the loss "bce" instead of these two `exact_match`, the
        samples with all classes right, and `label_acc`, the right answers among all samples and classes. All are NaN of
        a head that diverged, or whose loss is not finite.
    """
    device, count = bank.diverged.device, len(bank.heads)
    block = max(1, EVALUATION_LOGITS // (count * bank.num_classes))
    losses = torch.zeros(count, dtype=torch.float64, device=device)
    right = torch.zeros(count, bank.num_classes, dtype=torch.float64, device=device)  # by target class, or by label
    exact = torch.zeros(count, dtype=torch.float64, device=device)
    for start in range(0, len(split), block):
        features, targets = split.rows(slice(start, start + block))
        logits, targets = bank.logits(features), targets.to(device)
        if bank.loss == "bce":
            wanted = targets.T.to(logits.dtype).expand_as(logits)
            terms = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
            hits = (logits > 0) == (wanted > 0.5)
            right += hits.sum(2)
            exact += hits.all(1).sum(1)
        else:
            terms = F.cross_entropy(logits, targets.expand(count, -1), reduction="none")
            right.index_add_(1, targets, (logits.argmax(1) == targets).double())
        losses += terms.double().sum(1)
    losses[bank.diverged | ~losses.isfinite()] = math.nan
    if bank.loss == "bce":
        scores = {"exact_match": exact / len(split), "label_acc": right.mean(1) / len(split)}
    else:
        sizes = torch.bincount(split.targets, minlength=bank.num_classes).to(device)
        recalls = right[:, sizes > 0] / sizes[sizes > 0]
        scores = {"acc1": right.sum(1) / len(split), "balanced_acc1": recalls.mean(1)}
    scores = {name: (100 * values).masked_fill(losses.isnan(), math.nan) for name, values in scores.items()}
    columns = {"loss": losses / len(split), **scores}
    return [{name: float(values[head]) for name, values in columns.items()} for head in range(count)]


class BankFit:
    """Trains a bank epoch by epoch; every head sees the same batches.

    After each epoch `history` grows by one row a head, and `selected` holds the head and the epoch that scored best on
    the selection split so far: highest `criterion`, then lowest loss, then smallest learning rate.

    Args:
        bank: the heads, on the device to train on.
        views: what they train on; epoch e takes number e modulo their count. All hold the same samples.
        selection: what chooses among them; never a test split.
        epochs: passes over the training samples.
        batch: samples of one step; the last partial batch of an epoch is dropped.
        warmup_epochs: epochs of linear warm-up, followed by a cosine to 0; each head's own rate is the peak.
        seed: of the order of the samples, that of `probes.linear` on stored features.
        criterion: a score of `evaluate_bank` that is better when higher; None is `acc1`, for "bce" `label_acc`.

    Raises:
        RecipeError: there are fewer training samples than one batch.
        ValueError: a criterion that there is not, or an empty selection split.
    """

    def __init__(
        self,
        bank: HeadBank,
        views: Sequence[FeatureSplit],
        selection: FeatureSplit,
        *,
        epochs: int,
        batch: int,
        warmup_epochs: float = 0.0,
        seed: int = 0,
        criterion: str | None = None,
    ) -> None:
        allowed = ("label_acc", "exact_match") if bank.loss == "bce" else ("acc1", "balanced_acc1")
        self.criterion = criterion or allowed[0]
        self._measured = ["train_loss", "selection_loss", *(f"selection_{name}" for name in allowed)]
        if self.criterion not in allowed:
            raise ValueError(f"criterion is {criterion!r}; expected {' or '.join(allowed)}")
        if not len(selection):
            raise ValueError("the selection split is empty; a bank needs samples to choose a head by")
        self.bank, self.views, self.selection = bank, list(views), selection
        self.batch, self.epochs, self.seed = batch, epochs, seed
        self.steps = steps_per_epoch(len(self.views[0]), batch)
        self.schedule = warmup_cosine(1.0, 0.0, epochs, self.steps, warmup_epochs)
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.selected: dict[str, Any] | None = None

    def run(self) -> None:
        """Train what remains of the epochs."""
        while self.epoch < self.epochs:
            self.run_epoch()

    def run_epoch(self) -> None:
        """Train one epoch, score every head on the selection split, and bring the choice up to date."""
        train = self.views[self.epoch % len(self.views)]
        sampler = EpochSampler(len(train), self.steps * self.batch, self.seed)
        sampler.set_epoch(self.epoch)
        order = torch.tensor([row for _, row in sampler]).view(self.steps, self.batch)
        total = torch.zeros(len(self.bank.heads), dtype=torch.float64, device=self.bank.diverged.device)
        first = self.epoch * self.steps
        for step, rows in enumerate(order):
            total += self.bank.train_step(*train.rows(rows), float(self.schedule[first + step]))
        scores = evaluate_bank(self.bank, self.selection)
        found = torch.tensor([row["loss"] for row in scores], dtype=torch.float64, device=total.device)
        diverged = self.bank.freeze_diverged(total + found).tolist()
        for number, row in enumerate(scores):
            self.history.append(
                {
                    "epoch": self.epoch,
                    "head": number,
                    "diverged": diverged[number],
                    "train_loss": float(total[number]) / self.steps,
                    **{f"selection_{key}": value for key, value in row.items()},
                }
            )
            if diverged[number]:
                self.history[-1] |= dict.fromkeys(self._measured, math.nan)
        self._select()
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to continue bit for bit; plain data, between two epochs."""
        return {
            "bank": {key: _copy(value) for key, value in self.bank.state_dict().items()},
            "epoch": self.epoch,
            "plan": [self.epochs, self.batch, self.seed, self.steps],
            "history": torch.tensor(
                [[row[key] for key in self._measured] for row in self.history], dtype=torch.float64
            ),
            "selected": None if self.selected is None else dict(self.selected),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: the state belongs to other heads, epochs, batches, seed or number of samples.
        """
        plan = [self.epochs, self.batch, self.seed, self.steps]
        if state["plan"] != plan:
            raise ValueError(
                f"the stored fit has epochs, batch, seed, steps an epoch = {state['plan']}, this one {plan}; continue "
                "with what it was started with, or start a new run"
            )
        self.bank.load_state_dict(state["bank"])
        self.epoch, self.selected = state["epoch"], state["selected"]
        self.history = [
            {
                "epoch": position // len(self.bank.heads),
                "head": position % len(self.bank.heads),
                "diverged": math.isnan(values[0]),
                **dict(zip(self._measured, values, strict=True)),
            }
            for position, values in enumerate(state["history"].tolist())
        ]

    @property
    def alive(self) -> list[int]:
        """Numbers of the heads that have not diverged."""
        return [number for number, lost in enumerate(self.bank.diverged.tolist()) if not lost]

    def best_of_epoch(self, epoch: int) -> dict[str, Any] | None:
        """The row of `history` that scored best on the selection split in an epoch; None if every head diverged."""
        rows = self.history[epoch * len(self.bank.heads) : (epoch + 1) * len(self.bank.heads)]
        return max((row for row in rows if not row["diverged"]), key=self.merit, default=None)

    def merit(self, row: dict[str, Any]) -> tuple[float, float, float]:
        """What a row of `history` is chosen by: highest criterion, then lowest loss, then smallest learning rate."""
        lr = self.bank.heads[row["head"]].lr
        return row[f"selection_{self.criterion}"], -row["selection_loss"], -lr

    def build_selected(self) -> nn.Sequential:
        """The selected head with its weights of the selected epoch, in eval mode, on the CPU."""
        assert self.selected is not None, "every head diverged in the first epoch, or none was trained"
        single = self.bank.build_single(self.selected["head"])
        single.load_state_dict(self.selected["weights"])
        return single

    def _select(self) -> None:
        best = self.best_of_epoch(self.epoch)
        if best is not None and (self.selected is None or self.merit(best) > self.merit(self.selected["row"])):
            weights = self.bank.build_single(best["head"]).state_dict()
            self.selected = {"head": best["head"], "epoch": best["epoch"], "row": dict(best), "weights": weights}


def _copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
