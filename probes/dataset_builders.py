"""Open a set of clip_benchmark or torchvision by its name. Their imports are in the functions."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from probes.dataset_source import DatasetSource
from probes.sections import DataAbsent, RecipeError

LIBRARY_FORMATS = ("clip_benchmark", "torchvision")
"""Values of `data.format` that name a set of a library instead of a path."""

CLIP_BENCHMARK_SETS = (
    *("caltech101", "cars", "cifar10", "cifar100", "country211", "dtd", "eurosat", "fer2013", "fgvc_aircraft"),
    *("flowers", "food101", "gtsrb", "imagenet-a", "imagenet-o", "imagenet-r", "imagenet1k", "imagenet1k-unverified"),
    *("imagenet_sketch", "imagenetv2", "mnist", "objectnet", "pcam", "pets", "renderedsst2", "stl10", "sun397"),
    *("voc2007", "voc2007_multilabel"),
)
"""Classification sets of `clip_benchmark.datasets.builder`; it has no list of its own."""


def open_dataset(format: str, path: str, split: str, root: str, download: bool) -> DatasetSource:
    """A set of a library as a source.

    Args:
        format: "clip_benchmark" or "torchvision".
        path: the set's name there, and after a colon the split where it is not called `split`: "ImageNet:val".
        split: "train", "val" or "test".
        root: the set's files lie in the sub-folder of its name.
        download: let the library fetch what is absent.

    Raises:
        DataAbsent: the files are not there.
        RecipeError: the library is not installed, or has no such set or split.
    """
    name, _, chosen = path.partition(":")
    folder = Path(root) / name
    build = _build_clip_benchmark if format == "clip_benchmark" else _build_torchvision
    try:
        dataset, has_splits = build(name, chosen or split, folder, download)
    except RecipeError:
        raise
    except ImportError as error:
        raise RecipeError(
            f"{format} {name} needs a library that is not installed ({error}); run pip install "
            "'eva-clip-transfer[zeroshot]', or the library that is named"
        ) from error
    # Both libraries raise what comes: ValueError and AssertionError for names, RuntimeError for absent files, exits.
    except (Exception, SystemExit) as error:
        if isinstance(error, FileNotFoundError) or re.search("not found|not present|download", str(error), re.I):
            raise DataAbsent(f"{format} finds no {name} at {folder} ({error}); {_remedy(format)}") from error
        raise RecipeError(
            f"{format} cannot open {name} with split {chosen or split!r} ({error}); a split of another name is given "
            f"after a colon, such as {name}:val"
        ) from error
    shown = f"{name}:{chosen or split}" if has_splits else name
    package = {"clip_benchmark": "clip-benchmark"}.get(format, format)
    return DatasetSource(dataset, name=shown, library=f"{format} {version(package)}", root=folder)


def _build_clip_benchmark(name: str, split: str, folder: Path, download: bool) -> tuple[Any, bool]:
    if name.startswith("wds/"):
        raise RecipeError(f"{name} is a stream of shards; download them and name them with data.format=tar")
    if name not in CLIP_BENCHMARK_SETS and not name.startswith(("tfds/", "vtab/")):
        raise RecipeError(f"clip_benchmark has no set {name!r}{_near(name, CLIP_BENCHMARK_SETS)}")
    from clip_benchmark.datasets import builder

    if not download and not folder.is_dir():
        raise DataAbsent(f"nothing at {folder}; expected the files of {name}; {_remedy('clip_benchmark')}")
    if download:
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _downloads(builder, allowed=download):
        dataset = builder.build_dataset(
            dataset_name=name, root=str(folder), split=split, download=download, task="zeroshot_classification"
        )
    return dataset, name not in ("sun397", "caltech101", "eurosat")  # these ignore the split that they are asked for


def _build_torchvision(name: str, split: str, folder: Path, download: bool) -> tuple[Any, bool]:
    from torchvision import datasets

    if name not in datasets.__all__:
        raise RecipeError(f"torchvision has no set {name!r}{_near(name, datasets.__all__)}")
    build = getattr(datasets, name)
    parameters = inspect.signature(build).parameters
    arguments: dict[str, Any] = {}
    if "root" in parameters:
        if not download and not folder.is_dir():
            raise DataAbsent(f"nothing at {folder}; expected the files of {name}; {_remedy('torchvision')}")
        arguments["root"] = str(folder)
    if "download" in parameters:
        arguments["download"] = download
    elif download:
        raise RecipeError(f"torchvision cannot download {name}; put its files into {folder}, data.download=false")
    if "split" in parameters:
        arguments["split"] = split
    elif "train" in parameters:
        if split not in ("train", "test"):
            raise RecipeError(f"torchvision's {name} has the splits train and test, and no {split!r}")
        arguments["train"] = split == "train"
    return build(**arguments), "split" in parameters or "train" in parameters


@contextmanager
def _downloads(builder: Any, *, allowed: bool) -> Iterator[None]:
    """Keep clip_benchmark from fetching sets by itself, which it does for some whatever `download` says."""
    if allowed:
        yield
        return
    held = builder.call, builder.imagenetv2.requests
    builder.call, builder.imagenetv2.requests = _refuse, _NoRequests()
    try:
        yield
    finally:
        builder.call, builder.imagenetv2.requests = held


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise FileNotFoundError("it is incomplete, and data.download is false")


class _NoRequests:
    get = staticmethod(_refuse)


def _remedy(format: str) -> str:
    return f"put them there, or set data.download=true where {format} can download the set"


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name.lower(), [item.lower() for item in known], n=1, cutoff=0.5)
    found = [item for item in known if near and item.lower() == near[0]]
    return f"; did you mean {found[0]}?" if found else f"; it has {', '.join(sorted(known))}"
