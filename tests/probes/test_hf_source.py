"""Sets of Hugging Face's `datasets`: written here by the library itself, read back offline."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from probes import linear
from probes.sections import DataAbsent, DataSection, RecipeError
from probes.splits import Splits, prepare_splits

datasets = pytest.importorskip("datasets")
REPO = Path(__file__).resolve().parents[2]
NAMES = ["zero", "one", "two"]


def picture(position: int) -> Image.Image:
    return Image.fromarray((load_digits().images[position] * 15.9).astype(np.uint8)).resize((32, 32))


def build_set(positions: np.ndarray, **more: list) -> object:
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    columns = {"image": [picture(i) for i in positions], "label": load_digits().target[positions].tolist(), **more}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds) if not more else None)


@pytest.fixture(scope="module")
def positions() -> np.ndarray:
    """The first 40 digits that are 0, 1 or 2."""
    return np.flatnonzero(load_digits().target < 3)[:40]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, positions) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "digits"
    splits = {"train": build_set(positions[:28]), "validation": build_set(positions[28:34])}
    datasets.DatasetDict({**splits, "test": build_set(positions[34:])}).save_to_disk(str(folder))
    return folder


def prepare(tmp_path: Path, multi: bool = False, **options: object) -> Splits:
    data = DataSection(format="hf", root=str(tmp_path), **options)  # type: ignore[arg-type]
    return prepare_splits(data, multi_label=multi)


def test_a_set_saved_to_disk(saved, tmp_path, positions):
    splits = prepare(tmp_path, train=str(saved), val=str(saved), test=f"{saved}:test")
    assert splits.classes == sorted(NAMES)
    assert {name: len(split) for name, split in splits.named.items()} == {"train": 28, "val": 6, "test": 6}
    assert [NAMES.index(splits.classes[t]) for t in splits.train.targets] == load_digits().target[
        positions[:28]
    ].tolist()
    source = pickle.loads(pickle.dumps(splits.train.source))
    assert np.array_equal(np.asarray(source.image(5)), np.asarray(picture(positions[5])))
    assert Image.open(io.BytesIO(source.read(5))).format == "PNG"
    assert source.keys[:2] == ["00", "01"]
    assert source.fingerprint() == splits.train.source.fingerprint()
    again = prepare(tmp_path, train=str(saved), val=str(saved))
    assert again.train.fingerprint() == splits.train.fingerprint() != again.named["val"].fingerprint()
    assert not [note for note in splits.notes if "same images" in note]


def test_parquet_files(tmp_path, positions):
    folder = tmp_path / "parquet"
    folder.mkdir()
    for name, part in (("train", positions[:20]), ("test", positions[20:30])):
        build_set(part).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    splits = prepare(tmp_path, train=str(folder), test=str(folder))
    assert {name: len(split) for name, split in splits.named.items()} == {"train": 20, "test": 10}
    assert np.array_equal(np.asarray(splits.train.source.image(3)), np.asarray(picture(positions[3])))
    one = prepare(tmp_path, train=str(folder / "train-00000-of-00001.parquet"))
    assert one.train.targets.tolist() == splits.train.targets.tolist()


def test_lists_of_labels(tmp_path, positions):
    kinds = {"image": datasets.Image(), "tags": datasets.Sequence(datasets.ClassLabel(names=NAMES))}
    tags = [[0, 2], [1], [], [2, 1]]
    columns = {"image": [picture(i) for i in positions[:4]], "tags": tags}
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).save_to_disk(str(tmp_path / "tags"))
    splits = prepare(tmp_path, train=str(tmp_path / "tags"), labels="multi", multi=True)
    assert splits.train.multi_hot is not None
    shown = [{splits.classes[i] for i in np.flatnonzero(row)} for row in splits.train.multi_hot]
    assert shown == [{NAMES[i] for i in row} for row in tags]
    with pytest.raises(RecipeError, match=r"data\.labels is 'single'"):
        prepare(tmp_path, train=str(tmp_path / "tags"))


def test_mistakes_name_what_there_is(saved, tmp_path, positions):
    with pytest.raises(DataAbsent, match=r"data\.train: nothing at .*data\.download=true"):
        prepare(tmp_path, train=str(tmp_path / "nothing"))
    with pytest.raises(RecipeError, match=r"has no split dev; it has train, validation, test"):
        prepare(tmp_path, train=str(saved), test=f"{saved}:dev")
    with pytest.raises(RecipeError, match=r"no column 'colour' \(data\.label_column\); it has image \(Image\), label"):
        prepare(tmp_path, train=str(saved), label_column="colour")
    plain = datasets.Dataset.from_dict({"image": [1, 2], "kind": ["a", "b"]})
    plain.save_to_disk(str(tmp_path / "plain"))
    with pytest.raises(
        RecipeError, match=r"0 columns that could be the image; set data\.image_column; it has image \(Value"
    ):
        prepare(tmp_path, train=str(tmp_path / "plain"), label_column="kind")


def test_a_linear_probe_trains_on_it(saved, tmp_path, tiny_model):
    argv = [str(REPO / "recipes/custom/linear_folder.yaml"), *tiny_model.overrides, "data.format=hf", "data.holdout=0"]
    argv += [f"data.train={saved}", f"data.test={saved}", f"data.root={tmp_path}", f"run.dir={tmp_path / 'run'}"]
    argv += ["schedule.epochs=2", "schedule.warmup_epochs=1", "trainer.global_batch=14", "trainer.micro_batch=14"]
    assert linear.main([*argv, f"features.cache={tmp_path / 'cache'}", "data.workers=0"]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert result["split_sizes"] == {"train": 28, "test": 6}
