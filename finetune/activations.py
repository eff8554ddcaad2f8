"""What a training step keeps on a GPU for its backward pass: counted on fake tensors, not estimated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import DropPath
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from eva_clip.models import DTYPES, EvaCLIP
from finetune.build import build_untrained
from finetune.contrastive import ClassTexts, texts_of
from finetune.contrastive_step import ContrastiveStep
from finetune.fake_step import GPU, GpuKernels, Ledger, gpu_autocast, pass_back
from finetune.memory import count_parameters
from finetune.targets import classification_losses

if TYPE_CHECKING:
    from eva_clip.classifier import Classifier
    from finetune.sections import FinetuneRecipe

RARE = 5.0
"""Standard deviations above the mean of how many samples keep their paths: passed once in 3 million micro-batches."""
ENDS = 2
"""Equal blocks in a row that are counted one by one, of as many as there are: the lowest trained one has another input
than those above it."""


@dataclass(frozen=True)
class Activations:
    """Bytes on one device in the course of a micro-batch."""

    kept: int
    """From the forward to the backward pass, the images included, without copies of weights."""
    copies: int
    """Of weights in half precision, which autograd keeps with them."""
    passing: int
    """More than these two at the highest point of the backward pass; gradients of parameters are not counted once they
    are whole."""

    @property
    def total(self) -> int:
        """At the highest point."""
        return self.kept + self.copies + self.passing


class _Wrapper(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.held: torch.Tensor | None = None


class _Holding(_Wrapper):
    """A block that keeps its input and what it needs, as while it is recomputed."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.held = x
        return self.block(x, *args, **kwargs)


class _Recomputed(_Wrapper):
    """A block that keeps its input alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # The state of the random generator, which this would otherwise fetch, is a real GPU's.
        return checkpoint(self.block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@dataclass(frozen=True)
class _Run:
    """Equal blocks in a row."""

    first: int
    rates: tuple[float, ...]
    """Of dropping a path, of every block."""

    @property
    def counted(self) -> int:
        """Blocks of it in the reduced tower."""
        return min(len(self.rates), ENDS)


class StepCounter:
    """Counts micro-batches of a recipe's training; the model is built once, of fake tensors.

    Blocks are equal but for what is trained of them, so a tower with two of each kind tells what all of them keep.
    Attention is a GPU's fused one. With `trainer.compile` this is the eager step's, which keeps more.
    """

    def __init__(self, recipe: FinetuneRecipe, num_classes: int) -> None:
        self.recipe, self.num_classes = recipe, num_classes
        # autograd counts devices at its first backward pass and starts a thread for each; without a GPU it would count
        # fake ones, and a process with such threads cannot be forked.
        torch.autograd.backward(torch.zeros((), requires_grad=True))
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        # How many samples keep their paths is chance, and cannot be told from fake tensors: see `_drop_paths`.
        every_path = replace(recipe, regularisation=replace(recipe.regularisation, skip_dropped=False))
        model = build_meta(every_path, num_classes)
        self.parameters = count_parameters(model)
        self.runs = find_runs(model)
        blocks = list(model.tower.blocks)
        reduced = [block for run in self.runs for block in blocks[run.first : run.first + run.counted]]
        model.tower.blocks = _alike(model.tower.blocks, reduced)
        with self._mode:
            self.model = model.to_empty(device=GPU).train()
        for part in self.model.modules():
            if isinstance(part, nn.BatchNorm1d):
                part.eval()  # in training it refuses a single image

    def count(self, micro_batch: int, *, checkpointing: bool) -> Activations:
        """Bytes of one micro-batch; `checkpointing`: blocks are recomputed in the backward pass."""
        whole = self._measure(micro_batch, backward=True)
        if not checkpointing:
            blocks = self._blocks(micro_batch, whole)
            kept, copies = self._extend(whole, blocks)
            return Activations(kept - self._drop_paths(micro_batch, blocks), copies, whole.passing)
        with self._wrapped(_Recomputed):
            kept_inputs = self._measure(micro_batch)
            inputs = self._blocks(micro_batch, kept_inputs)
        with self._wrapped(_Holding):
            blocks = self._blocks(micro_batch, self._measure(micro_batch))
        kept, copies = self._extend(kept_inputs, inputs)
        again = max(block.total - given.total for block, given in zip(blocks, inputs, strict=True))
        return Activations(kept, copies, again + whole.passing)

    def _extend(self, counted: Activations, blocks: list[Activations]) -> tuple[int, int]:
        """Kept values and copies of the whole tower from those of the reduced one and of one block of every run."""
        more = [(len(run.rates) - run.counted, block) for run, block in zip(self.runs, blocks, strict=True)]
        kept = counted.kept + sum(number * block.kept for number, block in more)
        return kept, counted.copies + sum(number * block.copies for number, block in more)

    def _blocks(self, micro_batch: int, whole: Activations) -> list[Activations]:
        """What the last block of every run keeps: the difference that it makes."""
        found, blocks, last = [], self.model.tower.blocks, -1
        for run in self.runs:
            last += run.counted
            self.model.tower.blocks = _alike(blocks, [block for number, block in enumerate(blocks) if number != last])
            without = self._measure(micro_batch)
            found.append(Activations(whole.kept - without.kept, whole.copies - without.copies, 0))
        self.model.tower.blocks = blocks
        return found

    def _drop_paths(self, micro_batch: int, blocks: list[Activations]) -> int:
        """Bytes that dropped paths leave out in all but the rarest of micro-batches.

        A block keeps as many bytes as samples pass its two branches.
        """
        if not self.recipe.regularisation.skip_dropped:
            return 0
        sizes = [(block.kept, rate) for run, block in zip(self.runs, blocks, strict=True) for rate in run.rates]
        mean = sum(size * rate for size, rate in sizes)
        variance = sum(size**2 * rate * (1 - rate) / (2 * micro_batch) for size, rate in sizes)
        return max(0, int(mean - RARE * math.sqrt(variance)))

    @contextmanager
    def _wrapped(self, wrapper: type[_Wrapper]) -> Iterator[None]:
        blocks = self.model.tower.blocks
        self.model.tower.blocks = _alike(blocks, [wrapper(block) for block in blocks])
        try:
            yield
        finally:
            self.model.tower.blocks = blocks

    def _measure(self, micro_batch: int, *, backward: bool = False) -> Activations:
        precision, size = self.recipe.trainer.precision, self.model.spec.vision.image_size
        dtype = DTYPES[precision] if precision != "fp32" else None
        ledger = Ledger(self.model.parameters(), self.model.buffers())
        with self._mode, ledger, GpuKernels(self.num_classes):
            images = torch.empty(micro_batch, 3, size, size, device=GPU)
            with gpu_autocast(dtype):
                loss = [self._loss(images)]
            kept, copies = ledger.values, ledger.copies
            if backward:
                pass_back(loss)
        del loss, images
        return Activations(kept, copies, ledger.peak - kept - copies)

    def _loss(self, images: torch.Tensor) -> torch.Tensor:
        """As `FinetuneModule` computes it."""
        recipe, texts = self.recipe, texts_of(self.model)
        target = torch.zeros(len(images), dtype=torch.int64, device=GPU)
        if texts is not None:
            return ContrastiveStep(self.model, texts).score(images, target, len(images), 0, 1, 0, 1).total
        multi_label = recipe.data.labels == "multi"
        if multi_label or recipe.augment.mixup or recipe.augment.cutmix:
            target = torch.empty(len(images), self.num_classes, device=GPU)
        smoothing = recipe.regularisation.label_smoothing
        return classification_losses(self.model(images), target, smoothing, multi_label=multi_label).sum()


def build_meta(recipe: FinetuneRecipe, num_classes: int) -> Classifier:
    """The classifier of a recipe without storage, with its text side where the objective trains one."""
    with torch.device("meta"):
        model = build_untrained(recipe, num_classes, None)
        if recipe.head.objective == "contrastive":
            texts = ClassTexts(EvaCLIP(model.spec), [""] * num_classes, 1.0)
            model.add_module("texts", texts.requires_grad_(True))
            model.head.requires_grad_(False)
    return model


def find_runs(model: Classifier) -> list[_Run]:
    """Blocks of a tower in groups of neighbours that differ in nothing but the rate of dropped paths."""
    blocks = list(model.tower.blocks)
    runs = []
    for _, group in groupby(range(len(blocks)), key=lambda number: _describe(blocks[number])):
        numbers = list(group)
        runs.append(_Run(numbers[0], tuple(_drop_rate(blocks[number]) for number in numbers)))
    return runs


def _alike(container: nn.Module, blocks: list[nn.Module]) -> Any:
    """Blocks in a container of the same kind: EVA's are a list, CLIP's a sequence that is called."""
    return nn.Sequential(*blocks) if isinstance(container, nn.Sequential) else nn.ModuleList(blocks)


def _describe(block: nn.Module) -> tuple[object, ...]:
    parameters = ((name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters())
    return (tuple(parameters), tuple((name, type(module)) for name, module in block.named_modules()))


def _drop_rate(block: nn.Module) -> float:
    return max((float(part.drop_prob or 0.0) for part in block.modules() if isinstance(part, DropPath)), default=0.0)
