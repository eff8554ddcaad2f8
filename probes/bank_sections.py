"""The section of a recipe that trains many heads at once, and what the rest of the recipe must be for it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eva_clip.feature_kinds import pool_kinds
from probes.section_base import RecipeError, Section, setting

if TYPE_CHECKING:
    from probes.sections import Recipe


@dataclass
class BankSection(Section):
    """Heads trained side by side on one stream of stored features, one for each combination of the three lists.

    The hold-out or `val` chooses one of them and its epoch; `optimizer.lr` is not used.
    """

    lrs: list[float] = setting([])
    """Peak learning rates, absolute: never rescaled by the batch. Empty trains the one head of the other sections."""
    weight_decays: list[float] = setting([])
    """Weight decays; empty takes `optimizer.weight_decay`."""
    kinds: list[str] = setting([])
    """Features, named like `features.pool`, all stored in one extraction; empty takes `features.pool`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if not self.lrs and (self.weight_decays or self.kinds):
            problems.append("lrs is empty and the bank has weight_decays or kinds; name the learning rates as well")
        if any(not 0 < lr < float("inf") for lr in self.lrs):
            problems.append(f"lrs is {self.lrs}; expected finite numbers above 0")
        if any(not 0 <= decay < float("inf") for decay in self.weight_decays):
            problems.append(f"weight_decays is {self.weight_decays}; expected finite numbers from 0 on")
        for name in ("lrs", "weight_decays", "kinds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                problems.append(f"{name} is {values}; name each value once")
        for kind in self.kinds:
            try:
                pool_kinds(kind)
            except ValueError as error:
                problems.append(f"kinds: {error}")
        if problems:
            raise RecipeError("\n".join(problems))


def check_bank(recipe: Recipe) -> list[str]:
    """What in a recipe with a bank contradicts it, one sentence each; nothing for a recipe without."""
    bank, trainer = recipe.bank, recipe.trainer
    if not bank.lrs:
        return []
    problems: list[str] = []
    if recipe.features.mode != "cached":
        problems.append("bank trains on stored features; set features.mode=cached")
    if recipe.features.projected and bank.kinds not in ([], ["cls"]):
        problems.append(
            f"bank.kinds is {bank.kinds} with features.projected; only the class token has a projection, so leave "
            "bank.kinds empty or set features.projected=false"
        )
    if recipe.schedule.final_lr:
        problems.append(f"schedule.final_lr is {recipe.schedule.final_lr}; the rates of a bank end at 0")
    if trainer.devices > 1:
        problems.append(f"trainer.devices is {trainer.devices}; a bank trains in one process, set trainer.devices=1")
    if recipe.head.kind == "bn_linear" and trainer.accumulate > 1:
        problems.append(
            f"trainer.micro_batch is {trainer.micro_batch}; a bank takes BatchNorm's statistics over the whole batch, "
            f"set trainer.micro_batch={trainer.global_batch}"
        )
    return problems
