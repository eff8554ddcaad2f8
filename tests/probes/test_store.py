"""The store's files and keys: read by another library, damaged bit by bit, and told apart by every field."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open

from eva_clip.specs import get_model_spec
from probes.sections import DataSection
from probes.splits import prepare_splits
from probes.store import KeyMismatch, create_entry, open_entry
from probes.store_claims import Claims
from probes.store_key import KEY_FILE, describe_nearest, differing_fields, entry_name, feature_key, sample_list
from probes.store_shard import DamagedShard, map_shard, read_shard, verify_shard, write_shard

SAMPLES = {"count": 7, "fingerprint": "a" * 64, "order": "b" * 64}


def write_noise(path, dtype=torch.float32, rows=3, width=5):
    features = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    index = torch.arange(rows) * 2 + 10
    write_shard(path, features, index, 10, 10 + 2 * rows)
    return features, index


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_shard_is_a_safetensors_file(tmp_path, dtype, rows):
    path = tmp_path / "cls" / "00000.safetensors"
    features, index = write_noise(path, dtype, rows)
    with safe_open(path, framework="pt") as stored:
        assert torch.equal(stored.get_tensor("features"), features)
        assert torch.equal(stored.get_tensor("index"), index)
    shard = read_shard(path)
    assert (shard.start, shard.stop, shard.rows, shard.width) == (10, 10 + 2 * rows, rows, 5)
    verify_shard(shard)
    mapped, positions = map_shard(shard)
    assert mapped.dtype == dtype
    assert torch.equal(mapped, features)
    assert torch.equal(positions, index)
    assert [path.name for path in path.parent.iterdir()] == ["00000.safetensors"]


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    path = tmp_path / "entry" / "cls" / "00000.safetensors"
    write_noise(path, torch.bfloat16)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(DamagedShard, match=r"00000.safetensors is damaged .*gc .* --damaged --apply"):
                verify_shard(read_shard(path))
    for length in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedShard):
            read_shard(path)
    path.write_bytes(whole)
    verify_shard(read_shard(path))


def test_writing_to_a_mapped_shard_leaves_the_file_alone(tmp_path):
    path = tmp_path / "00000.safetensors"
    features, _ = write_noise(path)
    map_shard(read_shard(path))[0].zero_()
    assert torch.equal(map_shard(read_shard(path))[0], features)


def tiny_key(tiny_model, **changes):
    spec = get_model_spec(tiny_model.name)
    spec = spec.at_image_size(changes.pop("image_size", 32))
    given = {"weights_sha256": "w" * 64, "precision": "fp32", "samples": SAMPLES, **changes}
    return feature_key(given.pop("weights_sha256"), spec, given.pop("precision"), given.pop("samples"), **given)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"weights_sha256": "v" * 64}, "weights"),
        ({"image_size": 64}, "image_size: stored 32, asked 64"),
        ({"precision": "bf16"}, "precision: stored fp32, asked bf16"),
        ({"samples": {**SAMPLES, "fingerprint": "c" * 64}}, "samples.fingerprint: stored aaaaaaaaaaaa, asked cccc"),
        ({"samples": {**SAMPLES, "order": "c" * 64}}, "samples.order"),
        ({"view_seed": 0}, "transform"),
    ],
    ids=["weights", "resolution", "precision", "samples", "order", "view"],
)
def test_a_change_makes_another_key_and_is_named(tiny_model, changes, field):
    plain, other = tiny_key(tiny_model), tiny_key(tiny_model, **changes)
    assert entry_name(plain) != entry_name(other)
    assert any(line.startswith(field) for line in differing_fields(plain, other))
    assert entry_name(plain) == entry_name(tiny_key(tiny_model))


def test_another_tower_of_the_same_weights_is_another_key(tiny_model):
    from dataclasses import replace

    spec = get_model_spec(tiny_model.name)
    other = replace(spec, quick_gelu=True)
    keys = [feature_key("w", each, "fp32", SAMPLES) for each in (spec, other)]
    assert differing_fields(*keys) == ["definition.tower.quick_gelu: stored False, asked True"]


def test_augmentation_seeds_are_told_apart(tiny_model):
    keys = [tiny_key(tiny_model, view_seed=seed) for seed in (0, 1)]
    assert differing_fields(*keys) == ["seed: stored 0, asked 1"]


def test_the_sample_list_knows_files_and_their_order(write_digits, tmp_path):
    digits = write_digits(tmp_path, 2)

    def samples():
        return sample_list(prepare_splits(DataSection(format="csv", train=str(digits.csv))).train)

    first = samples()
    assert samples() == first
    lines = digits.csv.read_text(encoding="utf-8").splitlines()
    digits.csv.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]) + "\n", encoding="utf-8")
    swapped = samples()
    assert swapped["fingerprint"] == first["fingerprint"]
    assert swapped["order"] != first["order"]
    image = digits.csv.parent / lines[1].split(",")[0]
    image.write_bytes(image.read_bytes() + b"\0")
    assert samples()["fingerprint"] != first["fingerprint"]


def test_an_entry_under_the_name_of_another_key_is_refused_with_the_field(tiny_model, tmp_path):
    key = tiny_key(tiny_model)
    entry = create_entry(tmp_path, key, {"split": "train"})
    assert open_entry(tmp_path, key) == entry
    path = entry.folder / KEY_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    content["key"]["precision"] = "bf16"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(KeyMismatch, match=r"(?s)another key.*precision: stored bf16, asked fp32"):
        open_entry(tmp_path, key)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(KeyMismatch, match=r"key.json is damaged"):
        open_entry(tmp_path, key)


def test_the_nearest_entry_explains_what_differs(tiny_model, tmp_path):
    key = tiny_key(tiny_model)
    create_entry(tmp_path, tiny_key(tiny_model, precision="bf16", image_size=64), {"split": "train"})
    create_entry(tmp_path, tiny_key(tiny_model, weights_sha256="1" * 64), {"split": "train"})
    create_entry(tmp_path, tiny_key(tiny_model, precision="fp16"), {"split": "test"})
    said = describe_nearest(tmp_path, key, "train")
    assert "weights: stored 111111111111, asked www" in said
    assert "precision" not in said
    assert describe_nearest(tmp_path, key, "holdout") is None


def test_a_claim_excludes_other_processes_and_dies_with_its_holder(tmp_path):
    read_end, write_end = os.pipe()
    with Claims(tmp_path) as claims:
        assert claims.take(3)
        child = os.fork()
        if child == 0:
            with Claims(tmp_path) as others:
                os.write(write_end, bytes([others.take(3), others.take(4)]))
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read_end, 2) == bytes([False, True])
        assert claims.take(4), "the child is gone, and its claim with it"
