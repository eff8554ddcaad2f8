"""What the sections of a recipe are made of: fields with limits, checked when a section is built. Imports no torch."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from dataclasses import MISSING, field, fields
from typing import Any


class RecipeError(ValueError):
    """A mistake of the user's in a recipe, its overrides or its data; the message says what to do."""


class DataAbsent(RecipeError):
    """Images that a recipe names are not on this disk; everything else about it may be right."""


def setting(default: Any = MISSING, *, choices: Sequence[Any] = (), low: Any = None, high: Any = None) -> Any:
    """A dataclass field with a default, allowed values or an inclusive range."""
    limits = {"choices": tuple(choices), "low": low, "high": high}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=limits)
    return field(default=default, metadata=limits)


class Section:
    """Base of all sections: rejects values outside a field's choices or range."""

    def __post_init__(self) -> None:
        problems = []
        for item in fields(typing.cast(Any, self)):
            value, limits = getattr(self, item.name), item.metadata
            if value is None or not limits:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                problems.append(f"{item.name} is {value!r}; expected a finite number")
                continue
            if limits["choices"] and value not in limits["choices"]:
                expected = ", ".join(map(str, limits["choices"]))
                problems.append(f"{item.name} is {value!r}; expected one of {expected}")
            if limits["low"] is not None and value < limits["low"]:
                problems.append(f"{item.name} is {value!r}; expected at least {limits['low']}")
            if limits["high"] is not None and value > limits["high"]:
                problems.append(f"{item.name} is {value!r}; expected at most {limits['high']}")
        if problems:
            raise RecipeError("\n".join(problems))
