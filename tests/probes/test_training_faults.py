"""Training on stored features: killed again and again, and on two processes; the head is the undisturbed one's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parents[2]
RECIPE = REPO / "recipes" / "custom" / "linear_folder.yaml"
EPOCHS = 60
DRIVER = """
import os, pathlib, random, signal, sys, time
import torch
torch.set_num_threads(1)
from probes.linear import main
argv = sys.argv[1:]
main([*argv, "run.dir=warm", "schedule.epochs=1"])  # all imports and first calls before a child is forked

def count_epochs():
    log = pathlib.Path("killed/log.txt")
    return log.read_bytes().count(b"\\n") if log.exists() else 0

def train(folder, epochs=None, pause=0.0):
    child = os.fork()
    if child == 0:
        os._exit(main([*argv, f"run.dir={folder}", "run.on_existing=resume"]))
    if epochs is not None:
        goal = count_epochs() + epochs
        while count_epochs() < goal and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.002)
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)  # a zombie, if it was done, until it is waited for
    return os.waitpid(child, 0)[1]

moments = random.Random(0)
statuses = [train("killed", moments.randint(0, 3), moments.random() * 0.06) for _ in range(20)]
print("kills", statuses.count(signal.SIGKILL), "whole", train("whole"), "killed", train("killed"), flush=True)
"""
"""Each kill strikes up to 60 ms after none to three further epochs are in the log."""


@pytest.fixture
def argv(png_digits, tiny_model):
    data = [f"data.train={png_digits.train}", f"data.test={png_digits.test}", "data.workers=0", "data.holdout=0.25"]
    small = ["trainer.global_batch=12", "trainer.micro_batch=6", "schedule.warmup_epochs=1", "optimizer.lr=1.0"]
    return [str(RECIPE), *tiny_model.overrides, *data, *small, "features.mode=cached"]


def read_rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_twenty_kills_leave_the_uninterrupted_head(argv, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, *argv, f"schedule.epochs={EPOCHS}"]
    outcome = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert "kills 20 whole 0 killed 0" in outcome.stdout, outcome.stdout[-2000:] + outcome.stderr[-2000:]
    whole, killed = (load_file(tmp_path / folder / "head.safetensors") for folder in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())
    assert read_rows(tmp_path / "whole") == read_rows(tmp_path / "killed")
    assert len(read_rows(tmp_path / "killed")) == EPOCHS


@pytest.mark.slow
def test_two_processes_draw_the_curve_of_one(argv, tmp_path):
    """Batches of BatchNorm are the same groups on any number of processes."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    rows, predictions = {}, {}
    for devices in (1, 2):
        folder = tmp_path / f"devices{devices}"
        more = ["schedule.epochs=8", f"trainer.devices={devices}", f"run.dir={folder}"]
        more += ["trainer.strategy=ddp"] if devices > 1 else []
        command = [sys.executable, "-m", "probes.linear", *argv, *more]
        outcome = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert outcome.returncode == 0, outcome.stderr[-3000:]
        rows[devices] = read_rows(folder)
        predictions[devices] = [
            line.rsplit(",", 1)[0] for line in (folder / "predictions.csv").read_text().splitlines()
        ]
    assert predictions[1] == predictions[2]
    for one, two in zip(rows[1], rows[2], strict=True):
        assert one.keys() == two.keys()
        assert two == pytest.approx(one, rel=1e-5, abs=1e-6)
