"""Cached features: the same as extracted ones, under a name that everything in them changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from eva_clip.encoder import FeatureDefinition, VisionEncoder, build_encoder
from probes.features import FeatureSet, feature_key, load_or_extract
from probes.sections import DataSection
from probes.splits import prepare_splits

ROWS = 7


class CountingBatches:
    """Seven noise images in batches of four; says how often it was read."""

    def __init__(self) -> None:
        images = torch.randn(ROWS, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        rows = [{"image": image, "index": torch.tensor(2 * i)} for i, image in enumerate(images)]
        self.images, self.loader, self.passes = images, DataLoader(rows, batch_size=4), 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        self.passes += 1
        return iter(self.loader)


@pytest.fixture
def encode(tiny_model):
    def build(**options) -> VisionEncoder:
        return build_encoder(tiny_model.name, **{"weights": str(tiny_model.weights), **options})[0]

    return build


def extract(encoder: VisionEncoder, batches: CountingBatches, folder: Path, samples: str = "samples") -> FeatureSet:
    key = feature_key(encoder, samples)
    return load_or_extract(encoder, batches, key=key, folder=folder, name="train", device=torch.device("cpu"))


def test_a_hit_equals_the_extraction_and_runs_nothing(encode, tmp_path, capsys):
    encoder, batches = encode(definition=FeatureDefinition("gap")), CountingBatches()
    first = extract(encoder, batches, tmp_path)
    second = extract(encoder, batches, tmp_path)
    assert batches.passes == 1
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.index, second.index)
    assert second.index.tolist() == [0, 2, 4, 6, 8, 10, 12]
    torch.testing.assert_close(first.features, encoder(batches.images))
    assert f"{ROWS} from the cache" in capsys.readouterr().out


def test_features_keep_the_encoders_dtype(encode, tmp_path):
    encoder = encode(precision="bf16")
    assert extract(encoder, CountingBatches(), tmp_path).features.dtype == torch.bfloat16
    assert extract(encoder, CountingBatches(), tmp_path).features.dtype == torch.bfloat16


def test_only_whole_files_stay_in_the_cache(encode, tmp_path):
    extract(encode(), CountingBatches(), tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".safetensors"
    assert len(file.stem) == 64


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("definition", {"definition": FeatureDefinition("gap")}),
        ("definition", {"definition": FeatureDefinition("cls", l2norm=True)}),
        ("image_size", {"image_size": 64}),
        ("precision", {"precision": "bf16"}),
    ],
    ids=["pool", "l2norm", "image_size", "precision"],
)
def test_every_option_changes_the_key(encode, field, options):
    plain, other = feature_key(encode(), "samples"), feature_key(encode(**options), "samples")
    assert plain[field] != other[field]


def test_projection_changes_the_key(encode):
    plain = feature_key(encode(), "s")
    projected = feature_key(encode(definition=FeatureDefinition("cls", projected=True)), "s")
    assert plain["definition"] != projected["definition"]


def test_resizing_mode_changes_the_key(encode):
    eva, timm = (feature_key(encode(image_size=64, pos_embed=mode), "s") for mode in ("eva", "timm"))
    assert eva != timm


def test_one_changed_weight_changes_the_key(encode, tiny_model, tmp_path):
    tensors = load_file(tiny_model.weights)
    tensors["visual.blocks.1.mlp.fc2.weight"][0, 0] += 1e-3
    save_file(tensors, tmp_path / "other.safetensors")
    assert feature_key(encode(), "s") == feature_key(encode(), "s")
    assert feature_key(encode(), "s") != feature_key(encode(weights=str(tmp_path / "other.safetensors")), "s")


def test_normalisation_is_in_the_key(encode):
    key = feature_key(encode(), "s")
    np.testing.assert_allclose(key["mean"], [0.48145466, 0.4578275, 0.40821073])
    np.testing.assert_allclose(key["std"], [0.26862954, 0.26130258, 0.27577711])
    assert "crop" in key["transform"]


def test_the_file_list_changes_the_key(encode, write_digits, tmp_path):
    digits, encoder = write_digits(tmp_path, 2), encode()

    def key() -> dict:
        return feature_key(encoder, prepare_splits(DataSection(train=str(digits.train)), 0).train.fingerprint())

    whole = key()
    assert key() == whole
    removed = digits.train / "one" / "03.png"
    content = removed.read_bytes()
    removed.unlink()
    assert key() != whole
    removed.with_name("renamed.png").write_bytes(content)
    assert key() != whole


def test_another_key_is_another_extraction(encode, tmp_path):
    batches = CountingBatches()
    extract(encode(), batches, tmp_path, "one list")
    extract(encode(), batches, tmp_path, "another list")
    assert batches.passes == 2


def test_a_file_under_the_name_of_another_key_is_not_believed(encode, tmp_path):
    batches, encoder = CountingBatches(), encode()
    extract(encoder, batches, tmp_path)
    (file,) = tmp_path.iterdir()
    save_file({"features": torch.zeros(1, 1), "index": torch.zeros(1)}, file, metadata={"key": "{}"})
    assert len(extract(encoder, batches, tmp_path)) == ROWS


def test_features_that_are_not_finite_are_refused_and_not_cached(encode, tmp_path):
    batches, encoder = CountingBatches(), encode()
    batches.images[5] = torch.nan
    with pytest.raises(ValueError, match=r"1 features of train .* the first at sample 10; .*fp32"):
        extract(encoder, batches, tmp_path)
    assert not any(tmp_path.iterdir())


def test_nothing_readable_is_an_error(encode, tmp_path):
    class Nothing(CountingBatches):
        def __iter__(self):
            yield {"image": torch.empty(0, 3, 0, 0), "index": torch.empty(0, dtype=torch.int64)}

    with pytest.raises(ValueError, match="no image of train could be read"):
        extract(encode(), Nothing(), tmp_path)
