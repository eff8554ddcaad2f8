"""`LinearProbe` under a real Trainer: frozen encoder, accumulation, schedule, selection, checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from eva_clip.encoder import VisionEncoder, build_encoder
from probes.heads import build_head
from probes.module import LinearProbe
from probes.schedule import warmup_cosine
from probes.sections import OptimizerSection

WIDTH, CLASSES, ROWS = 6, 3, 24


class Rows(Dataset):
    """Gaussian clusters as features, or noise images."""

    def __init__(self, images: bool = False, rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.target = torch.arange(rows) % CLASSES
        centres = torch.randn(CLASSES, WIDTH, generator=generator)
        noise = torch.randn(rows, WIDTH, generator=generator)
        self.name = "image" if images else "features"
        self.data = torch.randn(rows, 3, 32, 32, generator=generator) if images else centres[self.target] + 0.5 * noise

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {self.name: self.data[index], "target": self.target[index], "index": torch.tensor(index)}


def build_probe(
    steps: int, epochs: int, kind: str = "linear", names: tuple[str, ...] = ("test",), **options
) -> LinearProbe:
    torch.manual_seed(0)
    encoder = options.get("encoder")
    width = encoder.feature_dim if encoder is not None else WIDTH
    section = options.pop("optimizer", OptimizerSection(name="sgd", lr=0.5))
    return LinearProbe(
        build_head(kind, width, CLASSES),
        optimizer=section,
        schedule=warmup_cosine(section.lr, 0.0, epochs, steps, 1),
        num_classes=CLASSES,
        evaluation_names=names,
        **options,
    )


def fit(probe: LinearProbe, rows: Dataset, batch: int, epochs: int, accumulate: int = 1, **options) -> pl.Trainer:
    folder = options.pop("folder", None)
    callbacks = options.pop("callbacks", [])
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, save_last=True, save_top_k=0, save_on_train_epoch_end=True))
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    evaluation = [DataLoader(Rows(rows.name == "image", 10), batch_size=4) for _ in probe.evaluation_names]
    trainer.fit(probe, DataLoader(rows, batch_size=batch), evaluation, weights_only=True, **options)
    return trainer


@pytest.fixture
def encoder(tiny_model) -> VisionEncoder:
    return build_encoder(tiny_model.name, str(tiny_model.weights))[0]


def test_the_encoder_is_the_same_after_a_fit(encoder):
    images = Rows(images=True).data[:4]
    before, digest = encoder(images), encoder.weights_sha256()
    modes = []

    class NoteMode(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_index):
            modes.append((module.head.training, any(part.training for part in module.encoder.modules())))

    probe = build_probe(3, 2, "bn_linear", encoder=encoder)
    start = probe.head[1].weight.detach().clone()
    fit(probe, Rows(images=True), 8, 2, callbacks=[NoteMode()])
    assert torch.equal(encoder(images), before)
    assert encoder.weights_sha256() == digest
    assert modes == [(True, False)] * 6
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not torch.equal(probe.head[1].weight, start)


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_accumulation_makes_the_update_of_one_large_batch(name):
    section = OptimizerSection(name=name, lr=0.5)
    whole, parts = (build_probe(2, 3, optimizer=section) for _ in range(2))
    start = whole.head[0].weight.detach().clone()
    fit(whole, Rows(), batch=12, epochs=3)
    fit(parts, Rows(), batch=3, epochs=3, accumulate=4)
    torch.testing.assert_close(parts.head[0].weight, whole.head[0].weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(parts.head[0].bias, whole.head[0].bias, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(whole.head[0].weight, start, atol=1e-5)
    assert [row["train_lr"] for row in parts.history] == [row["train_lr"] for row in whole.history]


def test_every_step_runs_at_the_schedules_rate():
    rates = []

    class NoteRates(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append([group["lr"] for group in optimizer.param_groups])

    probe = build_probe(3, 4)
    fit(probe, Rows(), batch=4, epochs=4, accumulate=2, callbacks=[NoteRates()])
    np.testing.assert_allclose([rate for rate, _ in rates], probe.schedule, rtol=1e-12, atol=1e-15)
    assert all(first == second for first, second in rates)
    means = probe.schedule.reshape(4, 3).mean(axis=1)
    np.testing.assert_allclose([row["train_lr"] for row in probe.history], means, rtol=1e-12)
    np.testing.assert_allclose([row["train_min_lr"] for row in probe.history], means, rtol=1e-12)


def test_the_first_step_at_rate_zero_changes_nothing():
    probe = build_probe(1, 1)  # one step of warm-up: its rate is 0
    start = probe.head[0].weight.detach().clone()
    fit(probe, Rows(), batch=ROWS, epochs=1)
    assert torch.equal(probe.head[0].weight, start)


def test_history_holds_what_was_measured():
    probe = build_probe(3, 2, names=("holdout", "test"))
    fit(probe, Rows(), batch=8, epochs=2)
    last = probe.history[-1]
    rows = Rows(rows=10)
    with torch.no_grad():
        logits = probe.head(rows.data)
    assert last["test_acc1"] == pytest.approx(100 * (logits.argmax(1) == rows.target).float().mean().item())
    assert last["test_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, rows.target).item())
    assert last["holdout_acc1"] == last["test_acc1"]
    assert 0 <= last["train_class_acc"] <= 1
    assert last["train_grad_norm"] > 0
    assert last["train_loss_scale"] == 1
    assert [row["epoch"] for row in probe.history] == [0, 1]
    assert last["n_parameters"] == WIDTH * CLASSES + CLASSES


def test_gradient_norm_is_that_of_the_whole_batch():
    probe = build_probe(1, 1)
    start = build_probe(1, 1)
    rows = Rows()
    torch.nn.functional.cross_entropy(start.head(rows.data), rows.target).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in start.head.parameters()]).norm().item()
    fit(probe, rows, batch=6, epochs=1, accumulate=4)
    assert probe.history[0]["train_grad_norm"] == pytest.approx(expected, rel=1e-5)


def test_the_selected_head_is_the_best_epochs_and_ties_go_to_the_earlier():
    probe = build_probe(3, 5, names=("holdout", "test"))
    heads = []

    class NoteHeads(Callback):
        def on_validation_start(self, trainer, module):
            heads.append({key: value.clone() for key, value in module.head.state_dict().items()})

    fit(probe, Rows(), batch=8, epochs=5, callbacks=[NoteHeads()])
    scores = [row["holdout_acc1"] for row in probe.history]
    best = scores.index(max(scores))
    assert probe.selected["epoch"] == best
    probe.load_reported_head()
    for key, value in probe.head.state_dict().items():
        assert torch.equal(value, heads[best][key])


def test_test_never_selects():
    probe = build_probe(3, 2, names=("test",))
    fit(probe, Rows(), batch=8, epochs=2)
    last = probe.head[0].weight.detach().clone()
    probe.load_reported_head()
    assert probe.selected is None
    assert torch.equal(probe.head[0].weight, last)


def checkpoint_of(encoder: VisionEncoder, folder: Path) -> Path:
    probe = build_probe(3, 1, "bn_linear", encoder=encoder, encoder_sha256=encoder.weights_sha256())
    fit(probe, Rows(images=True), 8, 1, folder=folder)
    return folder / "last.ckpt"


def test_a_checkpoint_holds_the_head_and_the_encoders_hash(encoder, tmp_path):
    checkpoint = torch.load(checkpoint_of(encoder, tmp_path), weights_only=True)
    assert set(checkpoint["state_dict"]) == {
        "head.0.running_mean",
        "head.0.running_var",
        "head.0.num_batches_tracked",
        "head.1.weight",
        "head.1.bias",
    }
    assert checkpoint["encoder_sha256"] == encoder.weights_sha256()
    assert [row["epoch"] for row in checkpoint["history"]] == [0]


def test_a_checkpoint_of_another_encoder_is_refused(encoder, tiny_model, tmp_path):
    path = checkpoint_of(encoder, tmp_path)
    torch.manual_seed(1)
    other = build_encoder(tiny_model.name, "random")[0]
    probe = build_probe(3, 2, "bn_linear", encoder=other, encoder_sha256=other.weights_sha256())
    with pytest.raises(ValueError, match=encoder.weights_sha256()[:12]):
        fit(probe, Rows(images=True), 8, 2, ckpt_path=str(path))


@pytest.mark.parametrize("kind", ["linear", "bn_linear"])
def test_a_resumed_fit_is_the_uninterrupted_one(kind, tmp_path):
    whole = build_probe(3, 4, kind, names=("holdout", "test"))
    fit(whole, Rows(), batch=8, epochs=4)
    fit(build_probe(3, 4, kind, names=("holdout", "test")), Rows(), batch=8, epochs=2, folder=tmp_path)
    rest = build_probe(3, 4, kind, names=("holdout", "test"))
    fit(rest, Rows(), batch=8, epochs=4, ckpt_path=str(tmp_path / "last.ckpt"))
    assert rest.history == whole.history
    for key, value in whole.head.state_dict().items():
        assert torch.equal(rest.head.state_dict()[key], value)
    assert rest.selected["epoch"] == whole.selected["epoch"]


def test_features_enter_the_head_in_float32():
    probe = build_probe(3, 1)
    assert probe({"features": torch.randn(2, WIDTH).bfloat16()}).dtype == torch.float32


def test_a_loss_that_is_not_finite_stops_with_a_remedy():
    rows = Rows()
    rows.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"training loss is nan in epoch 0; lower optimizer\.lr"):
        fit(build_probe(3, 1), rows, batch=8, epochs=1)
