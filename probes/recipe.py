"""Load recipes: YAML plus `key=value` overrides to plain dataclasses, with all mistakes named at once. No torch.

`load_recipe` checks keys and types of the whole file itself and then builds the sections, whose `__post_init__` checks
values, so that everything wrong is reported together. Past it nobody sees an OmegaConf object. OmegaConf reads, merges
and interpolates; its structured merge is not used, because it stops at the first mistake and turns a quoted '7' into 7.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from probes.sections import Recipe, RecipeError

__all__ = ["Recipe", "RecipeError", "dump_recipe", "load_recipe"]

R = TypeVar("R")


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    schema: type[R] = Recipe,  # type: ignore[assignment]
    *,
    other_sections: bool = False,
) -> R:
    """Read a recipe file, apply `key=value` overrides, and check all of it.

    Args:
        path: YAML file; OmegaConf interpolations are resolved.
        overrides: dotted assignments such as `optimizer.lr=0.5`; values are YAML.
        schema: dataclass whose fields are sections.
        other_sections: leave sections that the schema has not unread instead of refusing them.

    Raises:
        RecipeError: the file is missing or no YAML mapping, or anything in it is wrong; every mistake is one line.
    """
    content = _read_yaml(Path(path), overrides)
    problems: list[str] = []
    sections: dict[str, Any] = {}
    hints = typing.get_type_hints(schema)
    for name in content:
        if name not in hints and not other_sections:
            problems.append(f"unknown section {name!r}{_did_you_mean(str(name), schema)}")
    for name, section in hints.items():
        value = content.get(name)
        if value is not None and not isinstance(value, dict):
            problems.append(f"{name} is {value!r}; expected a section with {', '.join(_names(section))}")
            continue
        checked = _check_section(name, value or {}, section, schema, problems)
        try:
            sections[name] = section(**checked)
        except RecipeError as error:
            problems += [f"{name}.{line}" for line in str(error).splitlines()]
    if problems:
        raise RecipeError("\n".join([f"{path} has {len(problems)} mistake(s):", *(f"  - {p}" for p in problems)]))
    return schema(**sections)


def load_run_recipe(path: Path, schema: type[R]) -> R:
    """The recipe that a run folder holds.

    One without `data.holdout_seed`, from before it, drew its hold-out from `run.seed`, and so it is read.

    Raises:
        RecipeError: see `load_recipe`.
    """
    content = _read_yaml(path, [])
    run, data = content.get("run") or {}, content.get("data") or {}
    before = "holdout" in data and "holdout_seed" not in data and not run.get("seeds")
    return load_recipe(path, [f"data.holdout_seed={run.get('seed', 0)}"] if before else [], schema)


def recipe_sections(path: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """Names of the sections that a recipe file and its overrides have. Raises RecipeError as `load_recipe` does."""
    return [str(name) for name in _read_yaml(Path(path), overrides)]


def dump_recipe(recipe: Any) -> str:
    """The resolved recipe as YAML, every key of every section written out."""
    from omegaconf import OmegaConf

    return str(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(recipe))))


def _read_yaml(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in Path("recipes").rglob("*.yaml")], n=1)
        raise RecipeError(f"no recipe at {path}" + (f"; did you mean {near[0]}?" if near else ""))
    malformed = [text for text in overrides if "=" not in text or text.startswith("=")]
    if malformed:
        raise RecipeError(f"override {malformed[0]!r} is not of the form key=value, such as optimizer.lr=0.5")
    try:
        config = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        content = OmegaConf.to_container(config, resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, TypeError) as error:
        raise RecipeError(f"{path} (or an override) cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds a {type(content).__name__}; expected sections such as `model:` and `data:`")
    return typing.cast(dict[str, Any], content)


def _check_section(
    name: str, values: dict[Any, Any], section: type, schema: type, problems: list[str]
) -> dict[str, Any]:
    """The values of a section that have a known key and the right type; the rest become problems."""
    hints = typing.get_type_hints(section)
    checked = {}
    for key, value in values.items():
        if key not in hints:
            problems.append(f"unknown key {name}.{key}{_did_you_mean(str(key), schema, name)}")
        elif not _fits(value, hints[key]):
            problems.append(f"{name}.{key} is {value!r} ({type(value).__name__}); expected {_type_name(hints[key])}")
        else:
            checked[key] = float(value) if _is_float(hints[key]) and value is not None else value
    return checked


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _is_float(hint: Any) -> bool:
    return float in _alternatives(hint)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value has a declared type, without the conversions that would hide a mistake ('7' for 7)."""
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is list:
            (item,) = typing.get_args(kind)
            if isinstance(value, list) and all(_fits(entry, item) for entry in value):
                return True
        elif typing.get_origin(kind) is dict:
            _, item = typing.get_args(kind)
            if isinstance(value, dict) and all(isinstance(k, str) and _fits(v, item) for k, v in value.items()):
                return True
        elif kind is bool or isinstance(value, bool):
            if kind is bool and isinstance(value, bool):
                return True
        elif (kind is float and isinstance(value, int)) or isinstance(value, kind):
            return True
    return False


def _type_name(hint: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return " or ".join(names.get(kind, str(kind)) for kind in _alternatives(hint))


def _names(section: type) -> list[str]:
    return [item.name for item in fields(section)]


def _did_you_mean(key: str, schema: type, section: str = "") -> str:
    """A hint at the nearest key: of the same section first, then of any section by its last part."""
    sections = typing.get_type_hints(schema)
    siblings = _names(sections[section]) if section else list(sections)
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        return f"; did you mean {section + '.' if section else ''}{near[0]}?"
    elsewhere = {item: f"{name}.{item}" for name, part in sections.items() for item in _names(part)}
    near = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {elsewhere[near[0]]}?"
    return f"; known: {', '.join(siblings)}"
