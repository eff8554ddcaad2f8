"""Load weight files strictly, with a report of what became of every tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from eva_clip.identify import fitting_specs, position_grid, shape_of_spec, shape_of_tensors
from eva_clip.layouts import rename_tensors
from eva_clip.pos_embed import resize_pos_embed
from eva_clip.spec_types import ModelSpec
from eva_clip.specs import all_model_specs, get_model_spec
from eva_clip.weight_files import check_finite, read_weight_file


@dataclass
class LoadReport:
    """What became of every tensor of a file and of a model, under our names (`unexpected` under the file's)."""

    source: str
    layout: str = ""
    loaded: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    """The file's name to ours, where they differ by more than the tower's prefix."""
    resized: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Position rows before and after."""
    missing: list[str] = field(default_factory=list)
    """Tensors of the model that the file has not and may lack (a new head): they keep their initial values."""
    unexpected: list[str] = field(default_factory=list)
    """Tensors of the file that the model has no place for and may go unused (the text tower, another head)."""

    def summary(self) -> str:
        """One line for a person."""
        resized = ", ".join(f"{key} {old}->{new} rows" for key, (old, new) in self.resized.items())
        return (
            f"{len(self.loaded)} tensors from {Path(self.source).name}, {len(self.renamed)} renamed, "
            f"{resized or 'none resized'}, {len(self.missing)} missing, {len(self.unexpected)} unexpected"
        )


@dataclass
class Checkpoint:
    """A weight file, read and understood."""

    path: Path
    layout: str
    """Name of its layout."""
    kind: str
    """"clip" (both towers), "vision" (an encoder alone) or "classifier" (an encoder with a class head)."""
    pool: str
    """"cls" or "gap": what the layout says about pooling."""
    wrapper: str
    """The key that held the tensors ("" for none)."""
    tensors: dict[str, torch.Tensor]
    """Under our names: `visual.*`, `text.*`, `logit_scale`, `classifier.*`."""
    file_names: dict[str, str]
    """Our name to the file's."""
    ignored: list[str]
    """Keys that are no weights or are computed (rotary tables, masks)."""
    spec: ModelSpec | None = None
    """The model whose shapes fit, at the file's resolution; None when no known model does."""
    report: LoadReport | None = None
    """Against that model (`load_checkpoint` fills it)."""

    @property
    def num_classes(self) -> int | None:
        """Classes of its head; None when it is no classifier."""
        names = ("classifier.1.weight", "classifier.weight")
        return next((self.tensors[name].shape[0] for name in names if name in self.tensors), None)


def open_checkpoint(path: str | Path, *, model_name: str | None = None, ema: bool = False) -> Checkpoint:
    """Read a file, detect its layout and put its tensors under our names; nothing is compared with a model yet.

    Args:
        path: the file.
        model_name: preferred among models of the same shape (g-14 and g-14-plus share their vision tower).
        ema: take the averaged weights of a training checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a harmless weight file, no known layout, or NaN inside.
    """
    file = read_weight_file(path, ema=ema)
    projections = [(spec.embed_dim, spec.vision.width) for spec in all_model_specs()]
    try:
        found = rename_tensors(file.tensors, projections, file.metadata.get("kind", ""))
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    check_finite(file.path, {found.file_names[key]: tensor for key, tensor in found.tensors.items()})
    _drop_zero_projection_bias(found.tensors, found.ignored)
    near = get_model_spec(model_name) if model_name else None
    fitting = fitting_specs(found.tensors, near)
    spec = fitting[0] if fitting else None
    grid = position_grid(found.tensors)
    if spec and grid:
        spec = spec.at_image_size(grid * spec.vision.patch_size)
    return Checkpoint(
        file.path,
        found.layout,
        found.kind,
        found.pool,
        file.wrapper,
        found.tensors,
        found.file_names,
        found.ignored,
        spec,
    )


def load_checkpoint(path: str | Path, *, model_name: str | None = None, ema: bool = False) -> Checkpoint:
    """Read a weight file of any known layout and check it, strictly, against the model that its shapes fit.

    Args:
        path: a .safetensors file, or a .pt/.pth file of tensors (and the published files' harmless extras).
        model_name: the model it should be; None to find it by its shapes.
        ema: take the averaged weights of a training checkpoint instead of the live ones.

    Returns:
        The tensors under our names, what kind of file it is, how it pools, and the report.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `open_checkpoint`; another model's shapes; or tensors missing, unexpected or of another shape.
    """
    checkpoint = open_checkpoint(path, model_name=model_name, ema=ema)
    spec = get_model_spec(model_name) if model_name else checkpoint.spec
    if spec is None:
        raise ValueError(
            f"{checkpoint.path} fits no known model: found {_describe(checkpoint)}; register its shape with "
            "eva_clip.add_model_config"
        )
    grid = position_grid(checkpoint.tensors)
    spec = spec.at_image_size(grid * spec.vision.patch_size) if grid else spec
    from eva_clip.expected import expected_tensors

    checkpoint.report, _ = match(checkpoint, expected_tensors(spec, checkpoint), spec)
    checkpoint.spec = spec
    return checkpoint


def match(
    checkpoint: Checkpoint,
    target: Mapping[str, torch.Tensor],
    spec: ModelSpec,
    *,
    may_miss: tuple[str, ...] = (),
    may_spare: tuple[str, ...] = (),
    pos_embed: str = "eva",
) -> tuple[LoadReport, dict[str, torch.Tensor]]:
    """Compare a file with what a model needs, and resize its position embeddings.

    Args:
        checkpoint: the file.
        target: the model's tensors under our names.
        spec: the model, for messages and its position grid.
        may_miss: beginnings of names that the file may lack.
        may_spare: beginnings of names that the model may have no place for.
        pos_embed: "eva" or "timm" (`resize_pos_embed`).

    Returns:
        The report, and the tensors to copy, by our names.

    Raises:
        ValueError: another model's shapes, or tensors missing, unexpected or of another shape; all are named.
    """
    _refuse_other_model(checkpoint, spec)
    tensors = dict(checkpoint.tensors)
    report = LoadReport(str(checkpoint.path), checkpoint.layout)
    key = "visual.pos_embed"
    if key in tensors and key in target and tensors[key].shape[1:2] != target[key].shape[1:2]:
        rows = tensors[key].shape[1]
        tensors[key] = resize_pos_embed(tensors[key], spec.vision.grid_size, mode=pos_embed)
        report.resized[key] = (rows, tensors[key].shape[1])
    missing, spare = sorted(target.keys() - tensors.keys()), sorted(tensors.keys() - target.keys())
    report.missing = missing
    report.unexpected = [checkpoint.file_names[name] for name in spare]
    report.loaded = sorted(target.keys() & tensors.keys())
    report.renamed = {
        theirs: ours
        for ours, theirs in checkpoint.file_names.items()
        if ours in target and theirs not in _same_names(ours)
    }
    wrong = [
        f"{checkpoint.file_names[name]} is {list(tensors[name].shape)}, expected {list(target[name].shape)}"
        for name in report.loaded
        if tensors[name].shape != target[name].shape
    ]
    lacking = [name for name in missing if not name.startswith(may_miss or ("\0",))]
    surplus = [checkpoint.file_names[name] for name in spare if not name.startswith(may_spare or ("\0",))]
    if lacking or surplus or wrong:
        raise ValueError(
            f"{checkpoint.path} ({checkpoint.layout}) does not fit {spec.name}: "
            f"{len(lacking)} of {len(target)} tensors missing ({_some(lacking)}); "
            f"{len(surplus)} unexpected ({_some(surplus)}); {len(wrong)} of another shape ({_some(wrong)}). "
            "Take a complete file of this model, or name the model that this file is of"
        )
    return report, {name: tensors[name] for name in report.loaded}


def copy_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into a module by name; on the meta device nothing is copied."""
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        return
    shapes_only = [name for name, tensor in tensors.items() if tensor.is_meta]
    if shapes_only:
        raise ValueError(f"the file holds shapes without values (meta tensors): {_some(shapes_only)}")
    module.load_state_dict(tensors, strict=False)


def _refuse_other_model(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    found, asked = shape_of_tensors(checkpoint.tensors), shape_of_spec(spec)
    differences = found.differences(asked)
    if not differences:
        return
    fitting = [other.name for other in fitting_specs(checkpoint.tensors)]
    remedy = f"its shapes are those of {' or '.join(fitting)}: name that model" if fitting else "no known model fits it"
    raise ValueError(f"{checkpoint.path} is not {spec.name}: found {'; '.join(differences)}; {remedy}")


def _drop_zero_projection_bias(tensors: dict[str, torch.Tensor], ignored: list[str]) -> None:
    """timm gives CLIP's projection a bias and fills it with zeros; the published model has none."""
    bias = tensors.get("visual.head.bias")
    if "visual.norm_pre.weight" in tensors and bias is not None and (bias.is_meta or not bool(bias.any())):
        del tensors["visual.head.bias"]
        ignored.append("head.bias")


def _same_names(ours: str) -> tuple[str, str]:
    """Our name, and the same without the tower it is in, as files of one tower write it."""
    return ours, ours.removeprefix("visual.").replace("classifier.", "head.")


def _describe(checkpoint: Checkpoint) -> str:
    shape = shape_of_tensors(checkpoint.tensors)
    return ", ".join(f"{name} {value}" for name, value in vars(shape).items() if value is not None)


def _some(names: Iterable[str], most: int = 8) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return (", ".join(listed[:most]) or "none") + more
