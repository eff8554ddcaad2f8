"""Sets of torchvision and clip_benchmark from files of their own layout, written here."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

from probes import linear, zeroshot
from probes.multi_label import average_precisions
from probes.prompts import load_library, resolve_prompts, wordnet_positions
from probes.sections import DataAbsent, DataSection, RecipeError
from probes.splits import open_evaluation_split
from probes.zeroshot_sections import PromptsSection

REPO = Path(__file__).resolve().parents[2]
WNIDS = ("n01498041", "n02012849", "n03126707", "n07749582")
NAMES = ["stingray", "crane bird", "construction crane", "lemon"]


def write_mnist(root: Path) -> np.ndarray:
    """scikit-learn's digits in MNIST's own files, 200 to train and 50 to test; the test labels."""
    digits = load_digits()
    folder = root / "MNIST" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images = np.kron((digits.images * 15.9).astype(np.uint8), np.ones((1, 4, 4), dtype=np.uint8))[:, 2:30, 2:30]
    for name, rows in (("train", slice(0, 200)), ("t10k", slice(200, 250))):
        pixels, labels = images[rows], digits.target[rows].astype(np.uint8)
        header = np.array([0x803, *pixels.shape], dtype=">i4").tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = np.array([0x801, len(labels)], dtype=">i4").tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return digits.target[200:250]


def write_pictures(folder: Path, labels: tuple[str, ...]) -> Path:
    """One real picture a label."""
    with tarfile.open(REPO / "recipes/quickstart/pictures/twemoji_test.tar.gz") as shard:
        members = [member for member in shard if member.name.endswith(".webp")][: len(labels)]
        for label, member in zip(labels, members, strict=True):
            (folder / label).mkdir(parents=True)
            Image.open(shard.extractfile(member)).convert("RGB").save(folder / label / "1.jpg")
    return folder


def texts(data: DataSection, library: str) -> list[str]:
    return resolve_prompts(PromptsSection(library=library), open_evaluation_split(data)).names


def test_a_torchvision_set_lists_its_own_labels(tmp_path):
    expected = write_mnist(tmp_path)
    found = open_evaluation_split(DataSection(format="torchvision", test="MNIST", root=str(tmp_path)))
    assert found.test.targets.tolist() == expected.tolist()
    assert found.classes[7] == "7 - seven"
    again = pickle.loads(pickle.dumps(found.test.source))
    assert again.image(3).size == (28, 28)
    train = open_evaluation_split(DataSection(format="torchvision", test="MNIST:train", root=str(tmp_path)))
    assert len(train.test) == 200
    assert train.test.fingerprint() != found.test.fingerprint() == again.fingerprint(found.test.indices)


def test_a_linear_probe_trains_on_a_torchvision_set(tmp_path, tiny_model):
    write_mnist(tmp_path)
    argv = [str(REPO / "recipes/quickstart/linear.yaml"), *tiny_model.overrides, f"data.root={tmp_path}"]
    argv += ["data.format=torchvision", "data.train=MNIST", "data.test=MNIST", f"run.dir={tmp_path / 'run'}"]
    argv += ["schedule.epochs=2", "schedule.warmup_epochs=1", "baselines.random_encoder=false"]
    argv += ["baselines.raw_pixels=false", "baselines.zero_shot=false", f"features.cache={tmp_path / 'cache'}"]
    assert linear.main(argv) == 0
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert result["split_sizes"] == {"train": 200, "test": 50}
    assert not [note for note in result["notes"] if "same images" in note]


@pytest.mark.parametrize(("format", "name"), [("torchvision", "CIFAR10"), ("clip_benchmark", "cifar100")])
def test_absent_sets_are_told_from_misspelt_ones(tmp_path, format, name):
    pytest.importorskip("clip_benchmark.datasets.builder")
    with pytest.raises(DataAbsent, match=r"nothing at .*data\.download=true"):
        open_evaluation_split(DataSection(format=format, test=name, root=str(tmp_path)))
    with pytest.raises(RecipeError, match=f"did you mean {name}") as caught:
        open_evaluation_split(DataSection(format=format, test=name[:3] + "x" + name[4:], root=str(tmp_path)))
    assert not isinstance(caught.value, DataAbsent)
    (tmp_path / "CIFAR10").mkdir()
    with pytest.raises(DataAbsent, match="torchvision finds no CIFAR10"):
        open_evaluation_split(DataSection(format="torchvision", test="CIFAR10", root=str(tmp_path)))
    with pytest.raises(DataAbsent):
        open_evaluation_split(DataSection(test=str(tmp_path / "nothing")))


def test_names_follow_wordnet_ids_and_numbers_not_positions(tmp_path):
    folder = write_pictures(tmp_path / "a", WNIDS)
    assert texts(DataSection(test=str(folder)), "open_clip/imagenet") == NAMES
    assert texts(DataSection(test=str(folder)), "clip_benchmark/imagenet-a") == NAMES
    folder = write_pictures(tmp_path / "v2", ("6", "134", "951", "517"))
    assert texts(DataSection(test=str(folder)), "open_clip/imagenet") == ["stingray", "crane bird", *NAMES[2:]]
    folder = write_pictures(tmp_path / "wrong", ("n01498041", "n99999999"))
    with pytest.raises(RecipeError, match=r"has 1000 names and the data 2 classes, of which 1 .*n99999999"):
        texts(DataSection(test=str(folder)), "open_clip/imagenet")
    with pytest.raises(RecipeError, match="did you mean clip_benchmark/cifar10"):
        load_library("clip_benchmark/cifar1O")


def test_the_order_of_wordnet_ids_is_that_of_clip_benchmark():
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    assert list(wordnet_positions()) == builder.all_imagenet_wordnet_ids
    own, other = load_library("open_clip/imagenet"), load_library("clip_benchmark/imagenet1k")
    assert own.names == other.names
    assert (len(own.templates), own.templates[0]) == (80, "a bad photo of a {}.")
    assert sorted(own.templates) == sorted(other.templates)


def test_objectnet_keeps_the_classes_that_overlap(tmp_path):
    pytest.importorskip("clip_benchmark.datasets.builder")
    root = tmp_path / "objectnet"
    write_pictures(root / "objectnet-1.0/images", ("banana_folder", "air_freshener", "lemon_folder"))
    folders = {"banana_folder": "Banana", "air_freshener": "Air freshener", "lemon_folder": "Lemon"}
    (root / "folder_to_objectnet_label.json").write_text(json.dumps(folders))
    (root / "objectnet_to_imagenet_1k.json").write_text(json.dumps({"Banana": "banana", "Lemon": "lemon"}))
    (root / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps({"954": 0, "951": 1}))
    (root / "imagenet_to_label_2012_v2").write_text("banana\nlemon\n")
    data = DataSection(format="clip_benchmark", test="objectnet", root=str(tmp_path))
    found = open_evaluation_split(data)
    assert (found.classes, found.test.targets.tolist()) == (["banana", "lemon"], [0, 1])
    assert texts(data, "clip_benchmark/objectnet") == ["banana", "lemon"]


def write_voc(root: Path) -> None:
    pytest.importorskip("clip_benchmark.datasets.builder")
    base = root / "VOCdevkit/VOC2007"
    for part in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (base / part).mkdir(parents=True)
    write_pictures(base / "pictures", ("a", "b", "c"))
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>40</ymax></bndbox>"
    for name, shown in (("a", ["cat", "dog"]), ("b", ["dog"]), ("c", ["person"])):
        (base / "pictures" / name / "1.jpg").rename(base / "JPEGImages" / f"{name}.jpg")
        objects = "".join(f"<object><name>{item}</name>{box}</object>" for item in shown)
        (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    (base / "ImageSets/Main/aeroplane_test.txt").write_text("a -1\nb -1\nc -1\n")


def test_voc2007_with_several_labels_an_image(tmp_path, capsys):
    write_voc(tmp_path / "voc2007_multilabel")
    argv = [str(REPO / "recipes/quickstart/zeroshot.yaml"), "data.format=clip_benchmark", f"data.root={tmp_path}"]
    argv += ["data.test=voc2007_multilabel", "prompts.library=clip_benchmark/voc2007_multilabel"]
    argv += [f"run.dir={tmp_path / 'run'}"]
    assert zeroshot.main(argv) == 2
    assert "use scoring.kind=multi_label" in capsys.readouterr().err
    assert zeroshot.main([*argv, "scoring.kind=multi_label"]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert 0 < result["measured"]["mean_average_precision"] <= 100
    assert result["notes"] == ["17 class(es) have no image and no part in the mean."]
    rows = (tmp_path / "run/average_precision.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[1] for row in rows if row.startswith(("cat,", "dog,", "person,"))] == ["1", "2", "1"]


def test_voc2007_crops_one_object_a_sample(tmp_path):
    write_voc(tmp_path / "voc2007")
    found = open_evaluation_split(DataSection(format="clip_benchmark", test="voc2007", root=str(tmp_path)))
    assert [found.classes[target] for target in found.test.targets] == ["cat", "dog", "dog", "person"]
    assert found.test.source.image(0).size == (39, 39)


def test_average_precision_is_clip_benchmarks():
    metrics = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    import torch

    generator = np.random.default_rng(0)
    scores = generator.normal(20, 3, (50, 4)).astype(np.float32)
    shown = generator.random((50, 4)) < 0.3
    other = metrics.average_precision_per_class(torch.from_numpy(scores), torch.from_numpy(shown))
    assert average_precisions(scores, shown) == pytest.approx(100 * other.numpy(), rel=1e-5)
    assert average_precision_score(shown[:, 0], scores[:, 0]) == pytest.approx(float(other[0]), rel=1e-5)
