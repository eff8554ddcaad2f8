"""Every training command, stopped or killed on its way, goes on from its last checkpoint and ends as if uninterrupted.

The epochs that a command trained are told by the rows that it handed to the run folder, also the repeated ones.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from probes.checkpoints import Pace, list_checkpoints
from probes.runs import RunFolder

REPO = Path(__file__).resolve().parents[2]
LINEAR = "recipes/custom/linear_folder.yaml"
FINETUNE = "recipes/quickstart/finetune.yaml"
PROBE = ["data.holdout=0.25", "trainer.global_batch=12", "trainer.micro_batch=6", "optimizer.lr=1.0"]
TUNED = ["data.holdout=0.25", "trainer.global_batch=8", "trainer.micro_batch=4", "ema.decay=0.9", "head.start=fresh"]
TUNED += ["optimizer.lr=3e-3", "optimizer.layer_decay=1.0"]
COMMANDS = {
    "cached": ("probes.linear", LINEAR, [*PROBE, "features.mode=cached"], 3),
    "online": ("probes.linear", LINEAR, [*PROBE, "features.mode=online"], 3),
    "bank": (
        "probes.linear",
        LINEAR,
        [*PROBE, "features.mode=cached", "trainer.micro_batch=12", "bank.lrs=[0.3,1.0]"],
        3,
    ),
    "finetune": ("finetune.__main__", FINETUNE, [*TUNED, "checkpoint.every_steps=1000"], 4),
}
"""Module, recipe, overrides, and optimizer steps of an epoch, of every command that trains."""
FILES = ["head.safetensors", "model.safetensors", "last_ema.safetensors", "predictions.csv", "bank.csv"]
DRIVER = """
import importlib, pathlib, sys
from probes.runs import RunFolder
write = RunFolder.append_log
def spy(run, row):
    with open(run.path.name + ".trained", "a") as stream:
        stream.write(f"{row['epoch']:.0f}\\n")
    write(run, row)
RunFolder.append_log = spy
sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
"""


class Stop(Exception):
    """Ends a run in this process."""


@pytest.fixture
def argv(png_digits, tiny_model):
    """`argv(command, epochs)`: the module and its arguments."""

    def build(name: str, epochs: int) -> tuple[str, list[str]]:
        module, recipe, overrides, _ = COMMANDS[name]
        data = ["data.format=folder", f"data.train={png_digits.train}", f"data.test={png_digits.test}"]
        data += ["data.workers=0", "schedule.warmup_epochs=1", f"schedule.epochs={epochs}"]
        return module, [str(REPO / recipe), *tiny_model.overrides, *data, *overrides]

    return build


def assert_same_end(whole: Path, other: Path) -> None:
    present = [name for name in FILES if (whole / name).exists()]
    assert "predictions.csv" in present
    for name in present:
        if name.endswith(".safetensors"):  # whose metadata may come in any order
            first, second = load_file(whole / name), load_file(other / name)
            assert first.keys() == second.keys()
            assert all(torch.equal(tensor, second[key]) for key, tensor in first.items()), name
        else:
            assert (other / name).read_bytes() == (whole / name).read_bytes(), name
    logs = [[json.loads(line) for line in (run / "log.txt").read_text().splitlines()] for run in (whole, other)]
    for rows in zip(*logs, strict=True):
        first, second = ({**row, "train_data_wait": 0} for row in rows)  # a time, not a result
        assert first == second
    scores = [json.loads((run / "result.json").read_text())["scores"] for run in (whole, other)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_stopped_command_goes_on_after_its_last_epoch(name, argv, tmp_path, monkeypatch):
    import importlib

    module, arguments = argv(name, 8)
    main = importlib.import_module(module).main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pace, "SHARE", 0)  # every epoch is saved
    assert main([*arguments, "run.dir=whole"]) == 0
    trained: list[float] = []
    write = RunFolder.append_log

    def spy(run, row):
        trained.append(row["epoch"])
        if len(trained) == 5:
            raise Stop
        write(run, row)

    monkeypatch.setattr(RunFolder, "append_log", spy)
    with pytest.raises(Stop):
        main([*arguments, "run.dir=stopped"])
    assert trained == [0, 1, 2, 3, 4], "and the last of them was not saved"
    assert main([*arguments, "run.dir=stopped", "run.on_existing=resume"]) == 0
    assert trained[5:] == [4, 5, 6, 7]
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_goes_on_after_its_last_checkpoint(name, argv, tmp_path):
    epochs, steps = 60 if name != "finetune" else 12, COMMANDS[name][3]
    module, arguments = argv(name, epochs)

    def start(folder: str) -> subprocess.Popen:
        command = [sys.executable, "-c", DRIVER, module, *arguments, f"run.dir={folder}", "run.on_existing=resume"]
        environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)

    whole, killed = start("whole"), start("killed")
    log, record = tmp_path / "killed" / "log.txt", tmp_path / "killed.trained"
    while killed.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= epochs // 3):
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(timeout=60) == -signal.SIGKILL, "it was over before it was killed"
    saved = int(list_checkpoints(tmp_path / "killed" / "checkpoints")[-1].stem[5:]) // steps
    assert saved >= 1
    before = record.read_text().split()
    assert start("killed").wait(timeout=200) == whole.wait(timeout=200) == 0
    after = record.read_text().split()[len(before) :]
    assert after == [str(epoch) for epoch in range(saved, epochs)], "no epoch before the checkpoint once more"
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


SLURM = {"JOB_ID": "4711", "JOB_NAME": "train", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1", "PROCID": "0"}
SLURM |= {"LOCALID": "0", "NODEID": "0", "NODELIST": "localhost"}


@pytest.mark.parametrize("name", ["cached", "online", "finetune"])
def test_a_slurm_job_takes_nothing_from_the_working_folder(name, argv, tmp_path, monkeypatch):
    """Lightning's own requeue leaves `hpc_ckpt_1.ckpt`, which any Trainer of that folder would continue."""
    import importlib

    module, arguments = argv(name, 3)
    if name == "cached":  # these are trained by Trainers without a run folder
        arguments += ["run.seeds=[0,1]", "baselines.random_encoder=true"]
    main = importlib.import_module(module).main
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "run.dir=outside"]) == 0
    assert main([*arguments, "run.dir=other", "schedule.epochs=2", "optimizer.lr=0.02"]) == 0
    shutil.copy(list_checkpoints(tmp_path / "other" / "checkpoints")[-1], tmp_path / "hpc_ckpt_1.ckpt")
    for key, value in SLURM.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    assert main([*arguments, "run.dir=inside"]) == 0
    assert_same_end(tmp_path / "outside", tmp_path / "inside")
    results = [json.loads((tmp_path / folder / "result.json").read_text()) for folder in ("outside", "inside")]
    assert results[0]["repeats"] == results[1]["repeats"]
    assert results[0]["baselines"] == results[1]["baselines"]
    assert not list(tmp_path.rglob("hpc_ckpt_*"))[1:]
