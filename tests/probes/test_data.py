"""Batches: decoding, unreadable images, seeded augmentation, sampling, and the data module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from sklearn.datasets import load_digits

from eva_clip.transforms import LinearProbeTransform, build_eval_transform
from probes.data import ImageDataModule, SplitDataset, available_cores, decode
from probes.sampling import EpochSampler
from probes.sections import DataSection, RecipeError
from probes.splits import prepare_splits

SIZE = 16
PER_CLASS = 10


@pytest.fixture
def digits(tmp_path) -> Path:
    """30 PNGs of the digits 0, 1 and 2 in class folders."""
    data = load_digits()
    for target in range(3):
        (tmp_path / str(target)).mkdir()
        for number, position in enumerate(np.flatnonzero(data.target == target)[:PER_CLASS]):
            pixels = (data.images[position] * 15.9).astype("uint8")
            Image.fromarray(pixels).save(tmp_path / str(target) / f"{number}.png")
    return tmp_path


def build(digits: Path, samples_per_epoch: int = 24, micro_batch: int = 8, **options) -> ImageDataModule:
    data = DataSection(train=str(digits), **{"workers": 0, **options})
    return ImageDataModule(
        prepare_splits(data),
        LinearProbeTransform(SIZE),
        build_eval_transform(SIZE),
        data=data,
        micro_batch=micro_batch,
        samples_per_epoch=samples_per_epoch,
        seed=0,
    )


def train_batches(module: ImageDataModule, epoch: int = 0) -> list[dict]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def break_image(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:60])
    return str(path)


# Decoding


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("RGB", (4, 8)).save(tmp_path / "x.jpg", exif=exif)
    assert decode((tmp_path / "x.jpg").read_bytes()).size == (4, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_stops_with_one_clean_message(digits, workers):
    path = break_image(digits / "1" / "3.png")
    module = build(digits, workers=workers)
    with pytest.raises(RecipeError) as caught:
        list(module.loader("train"))
    message = str(caught.value)
    assert message.startswith(f"unreadable image in train: {path} (")
    assert message.endswith("data.on_corrupt=skip")
    assert "Traceback" not in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_unreadable_images_of_all_kinds_are_named(digits, content):
    (digits / "0" / "0.png").write_bytes(content)
    with pytest.raises(RecipeError, match=r"0/0\.png"):
        build(digits).loader("train").dataset[0]


def test_decompression_bomb_is_unreadable(digits, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(RecipeError, match=r"0/0\.png \(DecompressionBombError"):
        build(digits).loader("train").dataset[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_left_out_counted_and_named(digits, workers):
    break_image(digits / "1" / "3.png")
    for number in range(PER_CLASS):
        break_image(digits / "2" / f"{number}.png")
    module = build(digits, workers=workers, on_corrupt="skip")
    batches = list(module.loader("train", batch_size=10))
    for batch in batches:
        module.note_skipped("train", batch)
    assert [len(batch["target"]) for batch in batches] == [10, 9, 0]
    assert [batch["skipped"] for batch in batches] == [[], [13], list(range(20, 30))]
    assert batches[1]["index"].tolist() == [i for i in range(10, 20) if i != 13]
    assert batches[1]["target"].tolist() == [1] * 9
    assert batches[2]["image"].shape[0] == 0
    assert module.skipped == {"train": {"1/3.png", *(f"2/{number}.png" for number in range(PER_CLASS))}}


def test_a_defect_of_a_transform_is_not_taken_for_an_unreadable_image(digits):
    def broken(image):
        raise OSError("a defect")

    split = build(digits).splits.train
    with pytest.raises(OSError, match="a defect"):
        SplitDataset(split, broken, 0, "skip")[0]


# Augmentation


def test_views_depend_on_seed_and_epoch_but_not_on_workers_or_ambient_randomness(digits):
    torch.manual_seed(1)
    alone = train_batches(build(digits))
    torch.manual_seed(2)
    with_workers = train_batches(build(digits, workers=2))
    assert alone[0]["image"].shape == (8, 3, SIZE, SIZE)
    assert alone[0]["image"].dtype == torch.float32
    assert [len(batch["index"]) for batch in alone] == [8, 8, 8]
    for first, second in zip(alone, with_workers, strict=True):
        assert torch.equal(first["index"], second["index"])
        assert torch.equal(first["image"], second["image"])
    dataset = build(digits).train_dataloader().dataset
    assert torch.equal(dataset[(0, 5)].image, dataset[(0, 5)].image)
    assert not torch.equal(dataset[(0, 5)].image, dataset[(1, 5)].image)
    reseeded = SplitDataset(dataset.split, dataset.transform, 1, "fail")
    assert not torch.equal(dataset[(0, 5)].image, reseeded[(0, 5)].image)


def test_loaders_leave_the_ambient_generator_alone(digits):
    module = build(digits)
    before = torch.get_rng_state()
    train_batches(module)
    list(module.loader("train"))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_follow_the_epoch_even_when_they_persist(digits):
    loader = build(digits, workers=2).train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append(list(loader))
    expected = train_batches(build(digits), epoch=1)
    assert loader.persistent_workers
    assert not torch.equal(epochs[0][0]["index"], epochs[1][0]["index"])
    for found, wanted in zip(epochs[1], expected, strict=True):
        assert torch.equal(found["image"], wanted["image"])


# Sampling


def test_epoch_sampler_permutes_cuts_and_deals():
    whole = EpochSampler(100, 96, seed=0)
    pairs = list(whole)
    indices = [index for _, index in pairs]
    assert len(whole) == len(set(indices)) == 96
    assert {epoch for epoch, _ in pairs} == {0}
    assert indices != sorted(indices)
    ranks = [list(EpochSampler(100, 96, 0, rank, 4)) for rank in range(4)]
    assert [pairs[rank::4] for rank in range(4)] == ranks
    whole.set_epoch(1)
    assert {epoch for epoch, _ in whole} == {1}
    assert [index for _, index in whole] != indices
    assert list(EpochSampler(100, 96, seed=1)) != pairs
    with pytest.raises(AssertionError):
        EpochSampler(10, 11, seed=0)


def test_evaluation_covers_every_sample_once_over_the_processes(digits, monkeypatch):
    module = build(digits, test=str(digits), holdout=0.3)
    assert module.evaluation_names == ["holdout", "test"]
    seen = {name: [] for name in module.evaluation_names}
    batches = {name: set() for name in module.evaluation_names}
    for rank in range(4):  # 9 and 30 samples: neither is a multiple of 4
        monkeypatch.setattr(module, "_rank_and_world_size", lambda rank=rank: (rank, 4))
        for name, loader in zip(module.evaluation_names, module.val_dataloader(), strict=True):
            seen[name] += [index for batch in loader for index in batch["index"].tolist()]
            batches[name].add(len(loader))
    assert all(len(numbers) == 1 for numbers in batches.values()), "sharded weights need all processes for each pass"
    assert sorted(seen["holdout"]) == list(range(9))
    assert sorted(seen["test"]) == list(range(30))


def test_loader_gives_the_evaluation_view_in_order(digits):
    module = build(digits, holdout=0.3)
    batches = list(module.loader("train", batch_size=20))
    assert [len(batch["index"]) for batch in batches] == [20, 1]
    split = module.splits.train
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(21))
    assert torch.cat([batch["target"] for batch in batches]).tolist() == split.targets.tolist()
    image = Image.open(digits / split.keys[20])
    assert torch.equal(batches[1]["image"][0], build_eval_transform(SIZE)(image))


def test_workers_are_no_more_than_cores_and_batches(digits):
    assert build(digits, workers=64, samples_per_epoch=30, micro_batch=1).train_dataloader().num_workers == min(
        64, available_cores(), 30
    )
    assert build(digits, workers=64).loader("train", batch_size=30).num_workers == 1
    assert build(digits, workers=0).train_dataloader().persistent_workers is False


# Under Lightning


class Recorder(LightningModule):
    """Records which samples Lightning hands out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[list[int]] = []
        self.scored: dict[int, list[int]] = {}

    def on_train_epoch_start(self) -> None:
        self.trained.append([])

    def training_step(self, batch):
        self.trained[-1] += batch["index"].tolist()
        return self.weight * batch["image"].mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.scored.setdefault(dataloader_idx, []).extend(batch["index"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer(tmp_path: Path) -> Trainer:
    return Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )


@pytest.mark.filterwarnings("ignore")
def test_lightning_sets_the_epoch_and_walks_all_loaders(digits, tmp_path_factory):
    module, model = build(digits, test=str(digits), holdout=0.3, samples_per_epoch=16), Recorder()
    quiet_trainer(tmp_path_factory.mktemp("run")).fit(model, datamodule=module)
    for epoch in range(2):
        sampler = EpochSampler(21, 16, seed=0)
        sampler.set_epoch(epoch)
        assert model.trained[epoch] == [index for _, index in sampler]
    assert model.scored == {0: [*range(9)] * 2, 1: [*range(30)] * 2}


@pytest.mark.filterwarnings("ignore")
def test_an_unreadable_image_ends_a_fit_with_the_clean_message(digits, tmp_path_factory):
    for number in range(PER_CLASS):
        break_image(digits / "0" / f"{number}.png")
    model = Recorder()
    with pytest.raises(RecipeError, match=r"^unreadable image in train: .*data\.on_corrupt=skip$"):
        quiet_trainer(tmp_path_factory.mktemp("run")).fit(model, datamodule=build(digits, workers=2))
