"""Read weight files safely: safetensors, or pickles restricted to tensors and four harmless types.

Nothing in a file is executed. What is not a weight file (an error page, a Git LFS pointer, a cut download, a pickle
that names code) is refused in words that name the file, what was found, what was expected, and what to do.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

WRAPPER_KEYS = ("model", "module", "state_dict")
"""Where released files keep their tensors, in the published loader's order; a bare dictionary is accepted too."""
EMA_KEY = "model_ema"
"""Where training checkpoints keep their averaged weights; read only when asked for."""

_SCALAR = np.float64(0).__reduce__()[0]  # numpy's private constructor of scalars, under its present name
# The linear-probe files carry an argparse.Namespace and one numpy float64 beside their tensors. Older files name the
# scalar's constructor numpy.core, newer ones numpy._core.
SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
]

_EXPECTED = "expected a .safetensors file, or a .pt/.pth/.bin file that holds tensors"
_AGAIN = "download it again and compare its size with the one its page states"


@dataclass(frozen=True)
class WeightFile:
    """The tensors of a file, unwrapped."""

    path: Path
    tensors: dict[str, torch.Tensor]
    """By the file's own names, without a leading "module."."""
    wrapper: str = ""
    """The key that held them ("" for a bare dictionary or safetensors)."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Texts of a safetensors header."""


def read_weight_file(path: str | Path, *, ema: bool = False) -> WeightFile:
    """Open a file and unwrap its tensors; they stay memory-mapped where the format allows.

    Args:
        path: the file; safetensors are known by their content.
        ema: take the averaged weights under "model_ema" instead of the live ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable, harmless weight file; or no weights where they were asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    _refuse_non_weights(path)
    if _is_safetensors(path):
        if ema:
            raise ValueError(f"{path} is safetensors and has no {EMA_KEY!r} section; leave ema out")
        return _read_safetensors(path)
    if path.suffix == ".safetensors":
        raise ValueError(
            f"{path} is named .safetensors but does not begin like one; {_AGAIN}, or rename it if it is a .pt file"
        )
    content = _read_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors; {_EXPECTED}")
    wrapper = _choose_wrapper(path, content, ema)
    section = content[wrapper] if wrapper else content
    return WeightFile(path, _only_tensors(path, section), wrapper)


def _refuse_non_weights(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(512)
    text = start.lstrip().lower()
    if size == 0:
        raise ValueError(f"{path} is empty; {_EXPECTED}; {_AGAIN}")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(
            f"{path} is a web page of {size:,} bytes, not weights: the download was answered with an error or a login "
            f"page; {_EXPECTED}; use the file's `resolve` address (not `blob`), or weights by name"
        )
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a Git LFS pointer of {size:,} bytes, not the weights it points to; {_EXPECTED}; "
            "run `git lfs pull` in its repository, or download the file itself"
        )


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as stream:
        start = stream.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000


def _read_safetensors(path: Path) -> WeightFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as stream:
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 (no mapping)
            metadata = dict(stream.metadata() or {})
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(
            f"{path} begins like safetensors but is cut short or damaged ({error}; "
            f"{path.stat().st_size:,} bytes); {_AGAIN}"
        ) from error
    return WeightFile(path, _only_tensors(path, tensors), metadata=metadata)


def _read_pickle(path: Path) -> Any:
    is_archive = zipfile.is_zipfile(path)
    with path.open("rb") as stream:
        start = stream.read(2)
    if start == b"PK" and not is_archive:
        raise ValueError(
            f"{path} is a torch archive cut short ({path.stat().st_size:,} bytes, no end record); {_EXPECTED}; {_AGAIN}"
        )
    if is_archive and _is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript program (OpenAI's original .pt files are): it holds code beside weights and is "
            "refused; use the same weights as open_clip's .safetensors, or weights='pretrained'"
        )
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None and "nsupported" not in str(error):
            raise ValueError(f"{path} is damaged or no weights file ({_line(error)}); {_EXPECTED}; {_AGAIN}") from error
        raise ValueError(
            f"{path} was refused and nothing in it was executed: its pickle asks for "
            f"{named.group(1) if named else 'more than tensors'}, and loading that may run code. Expected tensors, "
            "plain containers, argparse.Namespace and numpy float64 only. The safe way: ask its publisher for "
            ".safetensors; or, for a file of your own making, save its tensors alone with safetensors.torch.save_file"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or no weights file ({_line(error)}); {_EXPECTED}; {_AGAIN}") from error


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _choose_wrapper(path: Path, content: dict[Any, Any], ema: bool) -> str:
    keys = [str(key) for key in content]
    if ema:
        if isinstance(content.get(EMA_KEY), dict):
            return EMA_KEY
        raise ValueError(
            f"{path} has no averaged weights: expected a section {EMA_KEY!r}, found {_some(keys)}; leave ema out"
        )
    for key in WRAPPER_KEYS:
        if isinstance(content.get(key), dict):
            return key
    if isinstance(content.get(EMA_KEY), dict):
        raise ValueError(f"{path} holds averaged weights only (section {EMA_KEY!r}); ask for them with ema=True")
    return ""


def _only_tensors(path: Path, section: dict[Any, Any]) -> dict[str, torch.Tensor]:
    """Tensors of a section by name, without the "module." that data-parallel training leaves on every key."""
    tensors = {str(key): value for key, value in section.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors: found {_some(map(str, section))}; {_EXPECTED}")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def check_finite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse NaN and infinity. Raises ValueError naming every tensor that holds one."""
    bad = [
        key
        for key, value in tensors.items()
        if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise ValueError(
            f"{path} holds NaN or infinity in {len(bad)} of {len(tensors)} tensors: {_some(bad)}; expected finite "
            "weights; the training that wrote it diverged or the file is damaged, so take an earlier or another one"
        )


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def _some(names: Iterable[str], most: int = 8) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return (", ".join(listed[:most]) or "nothing") + more
