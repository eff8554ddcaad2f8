"""After training the reported split is scored where it was trained: on the devices, each image on one of them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from probes.data import SplitDataset
from probes.trainer import run_training

REPO = Path(__file__).resolve().parents[2]
COMMANDS = {"finetune.__main__": "quickstart/finetune.yaml", "probes.linear": "custom/linear_folder.yaml"}
DRIVER = """
import importlib, os, sys
import probes.data
from probes.data import SplitDataset
read = SplitDataset.__getitem__
def spy(dataset, item):
    if probes.processes.world().size > 1 and not isinstance(item, tuple):
        with open(f"scored.{os.environ.get('LOCAL_RANK', '0')}", "a") as stream:
            stream.write(f"{item}\\n")
    return read(dataset, item)
SplitDataset.__getitem__ = spy
sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
"""
"""Runs a command, and notes which images each process decodes for scores while it has joined the others."""


@pytest.fixture
def argv(png_digits, tiny_model):
    def build(command: str) -> list[str]:
        arguments = [str(REPO / "recipes" / COMMANDS[command]), *tiny_model.overrides, "data.format=folder"]
        arguments += [f"data.train={png_digits.train}", f"data.test={png_digits.test}", "data.holdout=0.25"]
        arguments += ["data.workers=0", "trainer.global_batch=6", "trainer.micro_batch=3", "schedule.epochs=2"]
        arguments += ["schedule.warmup_epochs=1", "run.dir=run"]
        own = {
            "finetune.__main__": ["head.start=fresh", "optimizer.lr=3e-3"],
            "probes.linear": [
                "features.mode=online",
                "baselines.zero_shot=true",
                "trainer.precision=fp32",
                "head.kind=linear",
            ],
        }
        return [*arguments, *own[command]]

    return build


@pytest.mark.parametrize("command", COMMANDS)
def test_the_module_is_back_on_its_device_when_it_is_scored(command, argv, tmp_path, monkeypatch):
    """On a machine without a GPU all devices are one, so the moves themselves are looked at."""
    import importlib

    events: list[str] = []
    move, leave, read = torch.nn.Module.to, pl.LightningModule.cpu, SplitDataset.__getitem__

    def moving(module, *where, **more):
        if isinstance(module, pl.LightningModule):
            events.append(f"to {module.trainer.strategy.root_device if where else ''}: {where[0]}")
        return move(module, *where, **more)

    def leaving(module):
        events.append("cpu")
        return leave(module)

    def reading(dataset, item):
        if dataset.split.name == "test":
            events.append("scored")
        return read(dataset, item)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Module, "to", moving)
    monkeypatch.setattr(pl.LightningModule, "cpu", leaving)
    monkeypatch.setattr(SplitDataset, "__getitem__", reading)
    assert importlib.import_module(command).main(argv(command)) == 0
    assert "cpu" in events, "Lightning's end of training"
    after = events[len(events) - events[::-1].index("cpu") :]
    assert after[0] == "to cpu: cpu", "to the strategy's device"
    assert after.count("scored") >= 20
    assert not [event for event in after[1 : after.index("scored")] if event != "scored"]


def test_training_leaves_the_module_on_the_strategys_device():
    """A strategy that says its device is another one than main memory."""

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

    class Strategy:
        root_device = torch.device("meta")

    class Trainer:
        strategy = Strategy()
        interrupted = False

        def fit(self, module, **options):
            assert options == {"ckpt_path": None, "weights_only": True}
            module.cpu()

    module = Module()
    run_training(Trainer(), module, None)
    assert module.weight.device.type == "meta"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "strategy"), [("finetune.__main__", "ddp"), ("finetune.__main__", "fsdp2"), ("probes.linear", "ddp")]
)
def test_two_processes_score_each_image_once_as_one_does(command, strategy, argv, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    outcomes, processes = {}, {}
    (tmp_path / "driver.py").write_text(DRIVER)
    for devices in (1, 2):
        (tmp_path / str(devices)).mkdir()
        more = ["trainer.devices=2", f"trainer.strategy={strategy}"] if devices == 2 else []
        more += ["baselines.raw_pixels=true"] if command == "probes.linear" else []
        processes[devices] = subprocess.Popen(
            [sys.executable, "../driver.py", command, *argv(command), *more],
            cwd=tmp_path / str(devices),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    for devices, process in processes.items():
        _, error = process.communicate(timeout=400)
        assert process.returncode == 0, error[-3000:]
        with (tmp_path / str(devices) / "run" / "predictions.csv").open() as stream:
            outcomes[devices] = list(csv.DictReader(stream))
    assert [row["key"] for row in outcomes[1]] == [row["key"] for row in outcomes[2]]
    for one, two in zip(outcomes[1], outcomes[2], strict=True):
        assert (one["target"], one["predicted"]) == (two["target"], two["predicted"])
        assert float(two["confidence"]) == pytest.approx(float(one["confidence"]), abs=2e-3)
    shares = [(tmp_path / "2" / f"scored.{rank}").read_text().split() for rank in (0, 1)]
    passes = 2 if command == "probes.linear" else 1  # the probe's own, and the zero-shot baseline's
    assert sorted(map(int, shares[0] + shares[1])) == sorted([*range(20)] * passes)
    assert all(shares)
    if command == "probes.linear":
        results = [json.loads((tmp_path / folder / "run" / "result.json").read_text()) for folder in ("1", "2")]
        assert len(results[0]["baselines"]) == 2
        assert results[0]["baselines"] == results[1]["baselines"]
