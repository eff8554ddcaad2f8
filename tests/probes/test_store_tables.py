"""Tables of features: the encoder's own outputs, from one pass, resumed, and refused when something is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import probes.encoder_identity
from eva_clip.encoder import FeatureDefinition, build_encoder
from eva_clip.transforms import LinearProbeTransform, build_eval_transform
from probes.data import SplitDataset, collate
from probes.extraction import load_tables
from probes.fit import FeatureRows
from probes.sections import DataSection, FeaturesSection, ModelSection, Recipe, RecipeError, RunSection, TrainerSection
from probes.splits import prepare_splits
from probes.store import read_entry
from probes.store_shard import DamagedShard

ROWS = 16
"""Of a shard: the 48 training digits are three shards."""


@pytest.fixture
def recipe(png_digits, tiny_model, tmp_path) -> Recipe:
    return Recipe(
        run=RunSection(seed=3),
        model=ModelSection(tiny_model.name, str(tiny_model.weights), config=str(tiny_model.config)),
        features=FeaturesSection(mode="cached", cache=str(tmp_path / "store")),
        data=DataSection(train=str(png_digits.train), test=str(png_digits.test), workers=0),
        trainer=TrainerSection(global_batch=8, micro_batch=8, precision="fp32"),
    )


def changed(recipe: Recipe, section: str, **values) -> Recipe:
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})


def tables(recipe: Recipe, **options):
    return load_tables(recipe, prepare_splits(recipe.data), shard_rows=ROWS, **options)


def entry_of(recipe: Recipe, split: str = "train"):
    entries = map(read_entry, (path.parent for path in Path(recipe.features.cache).glob("*/key.json")))
    return next(entry for entry in entries if entry.about["split"] == split)


def images_of(recipe: Recipe, view: int | None = None) -> torch.Tensor:
    split = prepare_splits(recipe.data).train
    transform = build_eval_transform(32) if view is None else LinearProbeTransform(32)
    dataset = SplitDataset(split, transform, recipe.run.seed, "fail")
    return collate([dataset[i if view is None else (view, i)] for i in range(len(split))])["image"]


@pytest.fixture
def no_encoder(monkeypatch):
    """From here on no encoder can be built."""

    def forbid():
        monkeypatch.setattr(probes.encoder_identity, "build_encoder", None)

    return forbid


def test_one_pass_stores_all_kinds_and_any_recipe_reads_its_own(recipe, tiny_model, no_encoder):
    all_kinds = changed(recipe, "features", kinds=["gap", "projected", "cls_last2"])
    assert tables(all_kinds)["train"].features.shape == (48, 32)
    no_encoder()
    for pool, projected, l2norm in (
        ("cls", False, False),
        ("cls", True, True),
        ("cls+gap", False, True),
        ("cls_last2+gap", False, False),
    ):
        found = tables(changed(recipe, "features", pool=pool, projected=projected, l2norm=l2norm))["train"]
        definition = FeatureDefinition(pool, projected, l2norm)
        encoder, _ = build_encoder(tiny_model.name, str(tiny_model.weights), definition=definition)
        torch.testing.assert_close(found.features, encoder(images_of(recipe)))
        assert found.encoder.feature_dim == found.features.shape[1] == encoder.feature_dim
        assert found.encoder.sha256 == encoder.weights_sha256()
        assert found.encoder.image_size == 32


def test_class_tokens_of_the_last_blocks_are_those_of_a_shorter_tower(tiny_model):
    """Independent of timm's intermediate outputs: cut the tower, and read its class token."""
    encoder, _ = build_encoder(tiny_model.name, str(tiny_model.weights), definition=FeatureDefinition("cls_last2"))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = encoder(images)
    whole, _ = build_encoder(tiny_model.name, str(tiny_model.weights))
    last = whole(images)
    del whole.tower.blocks[-1]
    torch.testing.assert_close(found, torch.cat([whole(images), last], dim=1))
    with pytest.raises(ValueError, match=r"'cls_last3' needs 3 blocks; .* has 2"):
        build_encoder(tiny_model.name, "random", definition=FeatureDefinition("cls_last3"))


def test_rows_know_their_samples(recipe):
    found = tables(recipe)["test"]
    split = prepare_splits(recipe.data).test
    assert found.keys == split.keys
    assert found.targets.tolist() == split.targets.tolist()
    assert found.index.tolist() == list(range(20))
    assert found.skipped == []


def test_splits_of_one_source_are_rows_of_one_extraction(recipe, no_encoder):
    whole = tables(recipe)["train"]
    no_encoder()
    for seed, share in ((3, 0.25), (4, 0.25), (4, 0.5)):
        other = changed(recipe, "data", holdout=share, holdout_seed=seed)
        splits, found = prepare_splits(other.data), tables(other)
        for split in (splits.train, splits.selection):
            table = found[split.name]
            assert torch.equal(table.features, whole.features[split.indices])
            assert table.keys == split.keys
            assert table.targets.tolist() == split.targets.tolist()
            assert table.index.tolist() == list(range(len(split)))


def test_a_kind_that_is_missing_is_one_further_pass(recipe, capsys):
    tables(recipe)
    first = {path: path.stat().st_mtime_ns for path in entry_of(recipe).folder.rglob("*.safetensors")}
    tables(changed(recipe, "features", pool="cls+gap"))
    assert entry_of(recipe).arrays() == ["cls", "gap"]
    assert {path: path.stat().st_mtime_ns for path in first} == first, "what was there is left alone"
    capsys.readouterr()
    tables(changed(recipe, "features", pool="gap"))
    assert capsys.readouterr().out.count("from the cache") == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_missing_shards_are_extracted_and_come_out_bit_equal(recipe, precision):
    recipe = changed(recipe, "trainer", precision=precision)
    whole = tables(recipe)["train"].features.clone()
    assert str(whole.dtype) == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[precision]
    entry = entry_of(recipe)
    kept = entry.path("cls", 0).stat().st_mtime_ns
    entry.path("cls", 1).unlink()
    (entry.folder / "cls" / ".00002.1-ab.partial").write_bytes(b"cut short")
    assert torch.equal(tables(recipe)["train"].features, whole)
    assert entry.path("cls", 0).stat().st_mtime_ns == kept


def test_views_are_those_of_the_epochs_of_online_training(recipe, tiny_model, no_encoder):
    found = tables(recipe, views=2)
    encoder, _ = build_encoder(tiny_model.name, str(tiny_model.weights))
    for view in (0, 1):
        torch.testing.assert_close(found["train"].view(view), encoder(images_of(recipe, view)))
    assert found["test"].num_views == 1
    rows = FeatureRows(found["train"])
    assert torch.equal(rows[5, [2, 7]]["features"], found["train"].view(1)[[2, 7]])
    assert torch.equal(rows[4, [2, 7]]["features"], found["train"].view(0)[[2, 7]])
    no_encoder()
    tables(recipe, views=2)


def test_a_flipped_bit_stops_the_first_use(recipe):
    tables(recipe)
    path = entry_of(recipe).path("cls", 1)
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)
    opened = tables(recipe)["train"]
    with pytest.raises(DamagedShard, match=r"00001.safetensors is damaged .*checksum"):
        _ = opened.features


def test_features_that_are_not_finite_name_their_samples_and_are_not_stored(recipe, tiny_model):
    encoder, _ = build_encoder(tiny_model.name, str(tiny_model.weights))
    with torch.no_grad():
        encoder.tower.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"16 feature\(s\) of train \(kind cls\) .*: one/00.png; .*fp32"):
        tables(recipe, encoder=encoder)
    assert not list(entry_of(recipe).folder.rglob("*.safetensors"))


def test_unreadable_images_are_left_out_by_name_or_refused(recipe, write_digits, tmp_path):
    digits = write_digits(tmp_path, 4)
    (digits.train / "three" / "05.png").write_bytes(b"no image")
    recipe = changed(recipe, "data", train=str(digits.train), on_corrupt="skip")
    found = tables(recipe)["train"]
    assert found.skipped == ["three/05.png"]
    assert len(found) == len(found.features) == len(found.targets) == 47
    assert "three/05.png" not in found.keys
    assert found.keys == [prepare_splits(recipe.data).train.keys[i] for i in found.index.tolist()]
    with pytest.raises(RecipeError, match=r"could not be read when .*three/05.png.*on_corrupt=skip"):
        tables(changed(recipe, "data", on_corrupt="fail"))


def test_a_changed_file_is_another_entry_and_the_difference_is_said(recipe, write_digits, tmp_path, capsys):
    digits = write_digits(tmp_path, 4)
    recipe = changed(recipe, "data", train=str(digits.train))
    tables(recipe)
    path = digits.train / "one" / "00.png"
    path.write_bytes(path.read_bytes() + b"\0")
    capsys.readouterr()
    tables(recipe)
    assert "features of train: not stored yet; the nearest stored entry" in (out := capsys.readouterr().out)
    assert "samples.fingerprint: stored" in out
    assert "features of test: 20 from the cache" in out


def test_an_edited_weights_file_is_not_taken_for_the_remembered_one(recipe, tiny_model, tmp_path):
    import os

    from safetensors.torch import load_file, save_file

    path = tmp_path / "weights.safetensors"
    tensors = load_file(tiny_model.weights)
    save_file(tensors, path)
    recipe = changed(recipe, "model", weights=str(path))
    first, before = tables(recipe)["test"], path.stat()
    tensors["visual.blocks.1.mlp.fc2.weight"][0, 0] += 1e-3
    path.write_bytes(b"")  # the same file, of the same size and time
    save_file(tensors, tmp_path / "other.safetensors")
    path.write_bytes((tmp_path / "other.safetensors").read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = tables(recipe)["test"]
    assert second.encoder.sha256 != first.encoder.sha256
    assert not torch.equal(first.features, second.features)


def test_random_weights_follow_the_seed(recipe):
    random = changed(recipe, "model", weights="random")
    one, same = (tables(random)["test"] for _ in range(2))
    other = tables(changed(random, "run", seed=4))["test"]
    assert one.encoder.sha256 == same.encoder.sha256 != other.encoder.sha256
    assert F.cosine_similarity(one.features, other.features).min() < 0.9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pool": "mean"}, "pool: unknown pool 'mean'; expected one of cls, gap"),
        ({"pool": "gap", "projected": True}, "only pool 'cls' has a projection"),
        ({"kinds": ["cls", "last4"]}, "kinds: unknown feature kind.* 'last4'; expected cls, gap, projected"),
        ({"kinds": ["cls", "cls"]}, "repeated"),
        ({"views": 2, "mode": "online"}, "only mode 'cached' stores views"),
    ],
)
def test_impossible_features_are_refused_in_the_recipe(values, message):
    with pytest.raises(RecipeError, match=message):
        FeaturesSection(**values)
