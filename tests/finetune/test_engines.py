"""Two processes train as one does: DDP and FSDP2 on the CPU, resumed, and when one of them dies."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parents[2]
ENGINES = ["ddp", "fsdp2"]


@pytest.fixture(scope="module")
def start(png_digits, tiny_model, tmp_path_factory):
    """Starts a fine-tune as a process, in a folder under one for this file."""
    base = tmp_path_factory.mktemp("engines")

    def run(folder: str, *more: str) -> tuple[subprocess.Popen, Path]:
        argv = [str(REPO / "recipes" / "quickstart" / "finetune.yaml"), *tiny_model.overrides, "data.format=folder"]
        argv += [f"data.train={png_digits.train}", f"data.test={png_digits.test}", "data.workers=0"]
        argv += ["trainer.global_batch=8", "trainer.micro_batch=4", "schedule.epochs=4", "schedule.warmup_epochs=1"]
        argv += ["head.start=fresh", "optimizer.lr=3e-4", "regularisation.label_smoothing=0.1"]
        argv += ["regularisation.drop_path=0.0", "ema.decay=0.9", f"run.dir={folder}", "checkpoint.every_steps=2"]
        argv += ["run.on_existing=resume", *more]
        environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "finetune", *argv]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=base, env=environment, stdout=pipe, stderr=pipe, text=True), base / folder

    return run


@pytest.fixture(scope="module")
def one(start):
    """The run of one process."""
    process, folder = start("one")
    finish(process)
    return folder


def finish(process: subprocess.Popen) -> None:
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error[-3000:]


def read_rows(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "train_data_wait"} for row in rows]


def wait_for_checkpoint(process: subprocess.Popen, folder: Path, step: int = 0) -> None:
    """Until there is a checkpoint of this optimizer step or a later one, or the process has ended."""
    while process.poll() is None and newest_step(folder) < step:
        time.sleep(0.01)


def newest_step(folder: Path) -> int:
    return max((int(path.stem[5:]) for path in folder.glob("checkpoints/step-*.ckpt")), default=-1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_are_one_also_when_stopped(start, one, engine):
    two = [engine, f"trainer.strategy={engine}", "trainer.devices=2", "trainer.micro_batch=2"]  # each adds up two
    process, folder = start(*two)
    wait_for_checkpoint(process, folder)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    assert process.returncode == 143
    assert not (folder / "result.json").exists(), "it was stopped"
    finish(start(*two)[0])
    for row, other in zip(read_rows(one), read_rows(folder), strict=True):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-6)
    for kind in ("raw", "ema"):
        first, second = load_file(one / f"last_{kind}.safetensors"), load_file(folder / f"last_{kind}.safetensors")
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            torch.testing.assert_close(
                second[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: name + text
            )
    lines = [(run / "predictions.csv").read_text().splitlines() for run in (one, folder)]
    assert len(lines[0]) == len(lines[1]) == 1 + 20, "every image once"


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "devices"), [("ddp", 2), ("fsdp2", 1), ("fsdp2", 2)])
def test_a_resumed_average_goes_on(start, engine, devices):
    """Stopped late, so that an average begun anew at the resume would be another one, then resumed."""
    options = [
        f"trainer.strategy={engine}",
        f"trainer.devices={devices}",
        "optimizer.lr=3e-3",
        "optimizer.layer_decay=1",
    ]
    whole, folder = start(f"whole-{engine}{devices}", *options)
    finish(whole)
    process, stopped = start(f"stopped-{engine}{devices}", *options)
    wait_for_checkpoint(process, stopped, step=14)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    assert process.returncode == 143
    finish(start(stopped.name, *options)[0])
    results = [json.loads((run / "result.json").read_text()) for run in (folder, stopped)]
    assert [result["facts"]["average"] for result in results] == ["decay 0.9, 24 updates"] * 2
    averages, raw = (
        [load_file(run / f"last_{kind}.safetensors") for run in (folder, stopped)] for kind in ("ema", "raw")
    )
    apart = max(float((averages[0][name] - raw[0][name]).abs().max()) for name in raw[0])
    assert apart > 1e-3, "the average shows"
    for first, second in (averages, raw):
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_processes_are_one_with_several_labels(start, png_digits):
    """Digits with their name and their parity; one has mean average precision where the others have accuracy."""
    with png_digits.csv.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    table = png_digits.csv.with_name("several_labels.csv")
    parity = {"zero": "even", "two": "even", "one": "odd", "three": "odd"}
    lines = [f"{row['path']},{row['label']}|{parity[row['label']]},{row['split']}" for row in rows]
    table.write_text("\n".join(["path,label,split", *lines]) + "\n", encoding="utf-8")
    data = ["data.format=csv", f"data.train={table}", "data.test=null", "data.labels=multi"]
    data += ["regularisation.class_weights=auto"]
    folders = []
    for folder, more in (("several1", []), ("several2", ["trainer.devices=2", "trainer.strategy=ddp"])):
        process, path = start(folder, *data, *more)
        finish(process)
        folders.append(path)
    for row, other in zip(*map(read_rows, folders), strict=True):
        assert {"train_mean_ap", "ema_test_mean_ap"} <= row.keys()
        assert other == pytest.approx(row, rel=1e-4, abs=1e-6)
    first, second = (json.loads((folder / "result.json").read_text()) for folder in folders)
    assert second["measured"] == pytest.approx(first["measured"], rel=1e-4)
    assert first["scores"][0]["samples"] == second["scores"][0]["samples"] == 20, "every image once"


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first", "second"])
def test_when_one_of_two_dies_the_other_ends(start, victim):
    process, folder = start(
        victim, "trainer.strategy=ddp", "trainer.devices=2", "trainer.timeout_s=20", "schedule.epochs=5000"
    )
    wait_for_checkpoint(process, folder)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    second = next(int(pid) for pid in children if b"finetune" in Path(f"/proc/{pid}/cmdline").read_bytes())
    killed, other = (process.pid, second) if victim == "first" else (second, process.pid)
    os.kill(killed, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    deadline = time.monotonic() + 60
    while is_running(other):
        assert time.monotonic() < deadline, "the other process still waits"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "\nState:\tZ" not in status.read_text()
    except OSError:
        return False
