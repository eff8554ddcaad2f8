"""A run that is stopped inside an epoch goes on at the same image, also where the planner picks another micro-batch."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune import plan
from finetune.__main__ import main
from finetune.module import FinetuneModule
from probes.sections import RecipeError

REPO = Path(__file__).resolve().parents[2]
EPOCHS, STEPS, BATCH, IMAGES = 2, 6, 8, 48


@pytest.fixture
def train(png_digits, tiny_model, tmp_path, monkeypatch):
    """`train(folder, micro_batch, stop=step)`: positions of the images of every epoch that the run saw.

    The planner picks `micro_batch`; a device that holds fewer images than `largest` refuses a micro-batch of them.
    """
    monkeypatch.chdir(tmp_path)
    argv = [str(REPO / "recipes" / "quickstart" / "finetune.yaml"), *tiny_model.overrides, "data.format=folder"]
    argv += [f"data.train={png_digits.train}", f"data.test={png_digits.test}", "data.workers=0", "head.start=fresh"]
    argv += [f"trainer.global_batch={BATCH}", "trainer.micro_batch=null", f"schedule.epochs={EPOCHS}"]
    argv += ["schedule.warmup_epochs=0", "optimizer.lr=3e-4", "ema.decay=0.9", "run.on_existing=resume"]
    training_step = FinetuneModule.training_step

    def run(folder: str, micro_batch: int, stop: int | None = None, largest: int = BATCH) -> dict[int, list[int]]:
        seen: dict[int, list[int]] = {}

        def choose(recipe, *args):
            if (recipe.trainer.micro_batch or 0) > largest:
                raise RecipeError("it does not fit")
            return recipe.trainer.micro_batch or micro_batch, False

        def step(module, batch, batch_idx):
            seen.setdefault(module.current_epoch, []).extend(batch["index"].tolist())
            if module.global_step == stop:
                os.kill(os.getpid(), signal.SIGTERM)  # the step is finished and saved
            return training_step(module, batch, batch_idx)

        monkeypatch.setattr(plan, "choose_micro_batch", choose)
        monkeypatch.setattr(FinetuneModule, "training_step", step)
        if stop is None:
            assert main([*argv, f"run.dir={folder}"]) == 0
        else:
            with pytest.raises(SystemExit) as stopped:
                main([*argv, f"run.dir={folder}"])
            assert stopped.value.code == 143
        return seen

    return run


def assert_same_run(one: Path, other: Path, tolerance: float) -> None:
    rows = [[json.loads(line) for line in (run / "log.txt").read_text().splitlines()] for run in (one, other)]
    assert len(rows[0]) == EPOCHS
    for first, second in zip(*rows, strict=True):
        for key in ("train_loss", "train_class_acc", "train_lr", "train_grad_norm", "ema_test_loss"):
            assert second[key] == pytest.approx(first[key], rel=tolerance), key
    for kind in ("raw", "ema"):
        first, second = (load_file(run / f"last_{kind}.safetensors") for run in (one, other))
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=tolerance, atol=tolerance)
    results = [json.loads((run / "result.json").read_text())["facts"]["average"] for run in (one, other)]
    assert results == [f"decay 0.9, {EPOCHS * STEPS} updates"] * 2


@pytest.mark.parametrize("stop", [3, 5, STEPS + 1])  # inside an epoch, in its last step, inside the second
@pytest.mark.parametrize(("first", "then"), [(8, 2), (2, 8)])
def test_every_image_is_seen_once_with_another_micro_batch(train, first, then, stop):
    whole = train("whole", first)
    before = train("run", first, stop=stop)
    assert json.loads(Path("run/settled.json").read_text()) == {"micro_batch": first, "checkpointing": False}
    Path("run/settled.json").write_text(json.dumps({"micro_batch": 16, "checkpointing": False}))  # a larger device's
    after = train("run", then)
    assert sum(map(len, before.values())) == (stop + 1) * BATCH
    for epoch in range(EPOCHS):
        seen = before.get(epoch, []) + after.get(epoch, [])
        assert sorted(seen) == sorted(whole[epoch]) == list(range(IMAGES))
    assert_same_run(Path("whole"), Path("run"), 1e-4)


def test_a_run_goes_on_with_the_micro_batch_that_it_was_started_with(train, capsys):
    train("whole", 8)
    train("run", 8, stop=2)
    train("run", 2)
    assert_same_run(Path("whole"), Path("run"), 0.0)
    train("smaller", 8, stop=2)
    train("smaller", 2, largest=4)
    assert (
        "started with micro-batches of 8, which this device does not hold: it goes on with 2" in capsys.readouterr().out
    )
