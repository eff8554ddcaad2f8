"""Read a model specification from a JSON file in the published format; every mistake is named at once."""

from __future__ import annotations

import difflib
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from eva_clip.spec_types import ModelSpec, TextConfig, VisionConfig

# Kernel choices of the later EVA-CLIP repository's configurations; they change speed, never the result.
_SPEED_ONLY_KEYS = {"xattn", "fusedLN"}
_REQUIRED = ("embed_dim", "vision_cfg", "text_cfg")
_OPTIONAL = ("quick_gelu",)
_KINDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}


def read_model_config(path: Path) -> ModelSpec:
    """The specification in a JSON file, named after the file's stem.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON; a key is missing or unknown; a value has the wrong type; the shapes contradict.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); a model configuration is a JSON object") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a {type(document).__name__}; a model configuration is a JSON object")
    problems = [f"missing key {key!r}" for key in _REQUIRED if key not in document]
    problems += [f"unknown key {key!r}" for key in document if key not in _REQUIRED + _OPTIONAL]
    for key, kind in (("embed_dim", "int"), ("quick_gelu", "bool")):
        if key in document and not _is(document[key], kind):
            problems.append(f"{key} is {document[key]!r}; expected {_KINDS[kind]}")
    vision = _parse_section(document.get("vision_cfg"), VisionConfig, "vision_cfg", problems)
    text = _parse_section(document.get("text_cfg"), TextConfig, "text_cfg", problems)
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    return ModelSpec(
        path.stem,
        document["embed_dim"],
        VisionConfig(**vision),
        TextConfig(**text),
        quick_gelu=document.get("quick_gelu", False),
    )


def _parse_section(section: Any, schema: type, name: str, problems: list[str]) -> dict[str, Any]:
    if section is None:
        return {}
    if not isinstance(section, dict):
        problems.append(f"{name} is a {type(section).__name__}; expected an object")
        return {}
    known = {field.name: field for field in fields(schema)}
    values = {key: value for key, value in section.items() if key not in _SPEED_ONLY_KEYS}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {name}.{near[0]}?)" if near else ""
            problems.append(f"unknown key {name}.{key}{hint}")
        elif not _is(value, str(known[key].type)):
            problems.append(f"{name}.{key} is {value!r}; expected {_KINDS[str(known[key].type)]}")
    problems += [
        f"missing key {name}.{key}" for key, field in known.items() if field.default is MISSING and key not in values
    ]
    return values


def _is(value: Any, kind: str) -> bool:
    """Whether a JSON value is of a kind; a bool is no number here, and a whole number is a fine float."""
    if kind in ("str", "bool"):
        return isinstance(value, str if kind == "str" else bool)
    return not isinstance(value, bool) and isinstance(value, (int, float) if kind == "float" else int)
