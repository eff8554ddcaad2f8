"""A bank of 52 heads beside the same heads trained one after another by torch, and beside bare matrix products.

    python -m benchmarks.bank [ROUNDS]

The loop is what one writes without the bank: `nn.Linear`, `torch.optim`, one head after the other, on the same batches
and from the same weights. The largest relative difference of the heads' final losses is printed; above 1e-4 it ends the
script. Rounds take turns, and a ratio is of two times of one round. The peak is the fastest of three products in the
same round: the step's two shapes, and 4096 cubed. Features are synthetic: times do not depend on what they mean.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from probes.bank import BankHead, HeadBank, build_grid

LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
HEADS = build_grid(["features"], LRS, (0.0, 1e-5, 1e-4, 1e-3), "linear")
Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Trained:
    """What the last round left, for the comparison."""

    bank: HeadBank
    alone: list[nn.Linear]


def draw_batches(width: int, classes: int, batch: int, steps: int) -> Batches:
    """Batches of Gaussian features [batch, width] around a centre for each class, with their classes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)
    batches = []
    for _ in range(steps):
        targets = torch.randint(classes, (batch,), generator=generator)
        batches.append((centres[targets] + 3 * torch.randn(batch, width, generator=generator), targets))
    return batches


def in_turn(actions: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Wall times by action, after a round that is thrown away."""
    times: list[list[float]] = [[] for _ in actions]
    for number in range(rounds + 1):
        for column, action in zip(times, actions, strict=True):
            start = time.perf_counter()
            action()
            if number:
                column.append(time.perf_counter() - start)
    return times


def summary(values: list[float], scale: float = 1.0) -> str:
    """Median and spread."""
    low, middle, high = (scale * value for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def train_bank(width: int, classes: int, optimizer: str, batches: Batches) -> HeadBank:
    """All heads at once."""
    bank = HeadBank(HEADS, {"features": width}, classes, optimizer=optimizer)
    for features, targets in batches:
        bank.train_step({"features": features}, targets)
    return bank


def train_alone(head: BankHead, width: int, classes: int, optimizer: str, batches: Batches) -> nn.Linear:
    """One head by the plain loop."""
    torch.manual_seed(0)
    linear = nn.Linear(width, classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    groups = [{"params": [linear.weight], "weight_decay": head.weight_decay}, {"params": [linear.bias]}]
    if optimizer == "sgd":
        stepper: torch.optim.Optimizer = torch.optim.SGD(groups, lr=head.lr, momentum=0.9)
    else:
        stepper = torch.optim.AdamW(groups, lr=head.lr, weight_decay=0.0)
    for features, targets in batches:
        loss = F.cross_entropy(linear(features), targets)
        stepper.zero_grad()
        loss.backward()
        stepper.step()
    return linear


@torch.no_grad()
def loss_difference(done: Trained, batches: Batches) -> float:
    """Largest relative difference of the heads' losses on the last batch."""
    features, targets = batches[-1]
    worst = 0.0
    for number, single in enumerate(done.alone):
        logits = (done.bank.build_single(number)(features), single(features))
        ours, theirs = (float(F.cross_entropy(values.double(), targets)) for values in logits)
        worst = max(worst, abs(ours - theirs) / theirs)
    return worst


def beside_the_loop(rounds: int) -> None:
    """10 classes x 192 features: all heads at once, and one after another."""
    classes, width, steps = 10, 192, 30
    print(f"### {len(HEADS)} heads, {classes} classes x {width} features, beside the loop over the heads\n")
    print("| optimizer | batch | bank, ms a step | loop, ms a step | ratio | losses differ by |")
    print("|---|---|---|---|---|---|")
    for optimizer, batch in (("sgd", 128), ("sgd", 256), ("sgd", 1024), ("adamw", 256)):
        batches, done = draw_batches(width, classes, batch, steps), Trained()

        def ours(optimizer: str = optimizer, batches: Batches = batches, done: Trained = done) -> None:
            done.bank = train_bank(width, classes, optimizer, batches)

        def theirs(optimizer: str = optimizer, batches: Batches = batches, done: Trained = done) -> None:
            done.alone = [train_alone(head, width, classes, optimizer, batches) for head in HEADS]

        times = in_turn([ours, theirs], rounds)
        ratios = [slow / fast for fast, slow in zip(*times, strict=True)]
        difference = loss_difference(done, batches)
        print(
            f"| {optimizer} | {batch} | {summary(times[0], 1000 / steps)} | {summary(times[1], 1000 / steps)} | "
            f"{summary(ratios)} | {difference:.1e} |",
            flush=True,
        )
        if not difference < 1e-4:
            raise SystemExit("the heads of the bank are not those of the loop")


def beside_products(rounds: int) -> None:
    """100 classes x 1408 features: share of the measured peak of matrix products."""
    classes, width, steps = 100, 1408, 2
    rows = len(HEADS) * classes
    print(f"\n### {len(HEADS)} heads, {classes} classes x {width} features, beside the peak of matrix products\n")
    print("| optimizer | batch | peak, GFLOP/s | bank, GFLOP/s | share of the peak |\n|---|---|---|---|---|")
    square = torch.randn(4096, 4096)
    for optimizer, batch in (("sgd", 256), ("sgd", 1024), ("adamw", 1024)):
        bank = HeadBank(HEADS, {"features": width}, classes, optimizer=optimizer)
        batches = draw_batches(width, classes, batch, steps)
        weight, errors, inputs = torch.randn(rows, width), torch.randn(rows, batch), batches[0][0]

        def train(bank: HeadBank = bank, batches: Batches = batches) -> None:
            for features, targets in batches:
                bank.train_step({"features": features}, targets)

        def forward(weight: torch.Tensor = weight, inputs: torch.Tensor = inputs) -> torch.Tensor:
            return weight @ inputs.T

        def backward(errors: torch.Tensor = errors, inputs: torch.Tensor = inputs) -> torch.Tensor:
            return errors @ inputs

        times = in_turn([train, forward, backward, lambda: square @ square], rounds)
        product = 2 * rows * width * batch / 1e9
        work = [2 * product * steps, product, product, 2 * 4096**3 / 1e9]
        rates = [[amount / value for value in column] for amount, column in zip(work, times, strict=True)]
        peaks = [max(values) for values in zip(*rates[1:], strict=True)]
        shares = [rate / peak for rate, peak in zip(rates[0], peaks, strict=True)]
        print(f"| {optimizer} | {batch} | {summary(peaks)} | {summary(rates[0])} | {summary(shares)} |", flush=True)


def main() -> None:
    """Print Markdown tables: medians (min-max)."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, {rounds} rounds\n")
    beside_the_loop(rounds)
    beside_products(rounds)


if __name__ == "__main__":
    main()
