"""Feature tables of a recipe: read from the store, and extracted first as far as they are not there.

A source is extracted whole, and splits are rows of it: no other hold-out, seed or choice of shots extracts again.
`load_tables` is what every method on frozen features calls. Any number of processes may call it at once, of one
launcher or of several: they share out the missing shards among them, and a killed one costs the shard it was at.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eva_clip.encoder import FeatureDefinition, VisionEncoder
from eva_clip.feature_kinds import kind_width
from eva_clip.transforms import LinearProbeTransform, build_eval_transform
from probes.data import SplitDataset
from probes.encoder_identity import EncoderSource
from probes.precision import precision_section
from probes.sections import RecipeError
from probes.source_contract import some
from probes.splits import Split
from probes.store import SHARD_ROWS, StoreEntry, create_entry, open_entry
from probes.store_fill import fill_entry
from probes.store_key import describe_nearest, feature_key, sample_list
from probes.store_table import EncoderFacts, FeatureTable

if TYPE_CHECKING:
    from probes.source_contract import ImageSource
    from probes.splits import Evaluation, Splits


def load_tables(
    recipe: Any,
    splits: Splits | Evaluation,
    encoder: VisionEncoder | None = None,
    *,
    weights: str = "",
    views: int = 0,
    shard_rows: int = SHARD_ROWS,
) -> dict[str, FeatureTable]:
    """The features of every split, by its name. Builds the encoder only where something is missing.

    Args:
        recipe: any recipe with the sections `run`, `model`, `features`, `data`, and `trainer` or `compute` for the
            precision, which is settled (`settle_precision`).
        splits: its data.
        encoder: one that is built already; None builds the recipe's when it is needed.
        weights: replaces the recipe's encoder weights.
        views: 0 for the evaluation view of every split; k for k augmented views of "train" (`FeatureTable.view`), which
            are those of epochs 0 to k-1 of a training on fresh views.
        shard_rows: positions of a shard in new entries.

    Raises:
        RecipeError: an image is unreadable, or was when the features were stored, and `data.on_corrupt` is "fail".
        ValueError: features are not finite, an entry is damaged or of another key, or the encoder has no such features.
        OSError: the disk is full.
    """
    reader = TableReader(recipe, encoder, weights, shard_rows)
    return {name: reader.table(split, views if name == "train" else 0) for name, split in splits.named.items()}


class TableReader:
    """Tables of one encoder. See `load_tables`."""

    def __init__(
        self, recipe: Any, encoder: VisionEncoder | None = None, weights: str = "", shard_rows: int = SHARD_ROWS
    ) -> None:
        features = recipe.features
        self.recipe, self.shard_rows = recipe, shard_rows
        self._whole: dict[tuple[int, int], tuple[ImageSource, FeatureTable]] = {}
        self.cache = Path(features.cache)
        self.definition = FeatureDefinition(features.pool, features.projected, features.l2norm)
        self.kinds = list(dict.fromkeys([*self.definition.kinds, *features.kinds]))
        """What one pass takes: what the recipe trains on, and what it wants to be stored beside."""
        model = dataclasses.replace(recipe.model, weights=weights or recipe.model.weights)
        self.source = EncoderSource(
            model,
            getattr(recipe, precision_section(recipe)).precision,
            self.definition,
            cache=self.cache,
            seed=recipe.run.seed,
            keep_projection="projected" in self.kinds,
            encoder=encoder,
        )
        for kind in self.kinds:
            kind_width(kind, self.source.spec)  # refuses more blocks than there are

    def table(self, split: Split, views: int = 0) -> FeatureTable:
        """The features of one split: rows of its source's."""
        name = (id(split.source), views)
        if name not in self._whole:
            self._whole[name] = split.source, self._whole_table(split, views)  # the source is kept for its id
        table = self._whole[name][1].take(split)
        if len(table) == 0:
            raise RecipeError(f"no image of {split.name} could be read")
        return table

    def _whole_table(self, split: Split, views: int) -> FeatureTable:
        """The features of all of a split's source, extracted as far as they are missing."""
        count = len(split.source)
        whole = Split(split.name, split.source, np.arange(count, dtype=np.int64), np.zeros(count, dtype=np.int64))
        entry = self._entry(whole, views)
        extracted = 0
        numbers: list[int | None] = list(range(views)) if views else [None]
        for view in numbers:
            wanted = {self._array(kind, view): kind for kind in self.kinds}
            missing = entry.missing(wanted)
            extracted += len(missing)
            if missing:
                self._extract(entry, wanted, whole, view)
        table = FeatureTable(
            split.name,
            entry,
            [[self._array(kind, view) for kind in self.definition.kinds] for view in numbers],
            source_keys=split.source.keys,
            encoder=self.facts,
            l2norm=self.definition.l2norm,
        )
        self._check_skipped(table, entry)
        if not extracted:
            print(f"features of {split.name}: {len(table)} from the cache")
        return table

    @property
    def facts(self) -> EncoderFacts:
        """What a result says of the encoder."""
        source, spec = self.source, self.source.spec
        width = self.definition.feature_dim(spec)
        return EncoderFacts(source.sha256, source.loaded, width, spec.vision.image_size)

    def _entry(self, split: Split, views: int) -> StoreEntry:
        seed = self.recipe.run.seed if views else None
        source, samples = self.source, sample_list(split)
        key = feature_key(source.body_sha256, source.spec, source.precision, samples, view_seed=seed)
        found = open_entry(self.cache, key)
        if found is None:
            nearest = describe_nearest(self.cache, key, split.name)
            if nearest and self.source.model.weights != "random":  # those differ by intention
                print(f"features of {split.name}: not stored yet; {nearest}", flush=True)
            model = self.source.model
            about = {"split": split.name, "model": model.name, "weights": model.weights, "paths": split.source.paths}
            found = create_entry(self.cache, key, about, self.shard_rows)
        return found

    def _array(self, kind: str, view: int | None) -> str:
        """Name of the array of a kind, and of a view; a projection is named by its hash, which the key leaves out."""
        name = f"projected-{self.source.whole_sha256[:16]}" if kind == "projected" else kind
        return name if view is None else f"{name}.view{view}"

    def _extract(self, entry: StoreEntry, wanted: dict[str, str], split: Split, view: int | None) -> None:
        spec, data = self.source.spec, self.recipe.data
        size, mean, std = spec.vision.image_size, spec.image_mean, spec.image_std
        build = build_eval_transform if view is None else LinearProbeTransform
        dataset = SplitDataset(split, build(size, mean, std), self.recipe.run.seed, data.on_corrupt)
        fill_entry(
            entry,
            wanted,
            encoder=self.source.build().to(extraction_device()),
            dataset=dataset,
            view=view,
            workers=data.workers,
        )

    def _check_skipped(self, table: FeatureTable, entry: StoreEntry) -> None:
        if table.skipped and self.recipe.data.on_corrupt == "fail":
            raise RecipeError(
                f"{len(table.skipped)} image(s) of {table.name} could not be read when their features were stored in "
                f"{entry.folder}: {some(table.skipped)}; replace or remove them, or leave unreadable images out with "
                "data.on_corrupt=skip"
            )


def extraction_device() -> torch.device:
    """This process's own GPU where there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
