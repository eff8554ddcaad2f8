"""Fine-tunes that are killed, stopped, damaged or out of disk go on as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from probes.checkpoints import list_checkpoints, newest_readable

REPO = Path(__file__).resolve().parents[2]
RECIPE = REPO / "recipes" / "quickstart" / "finetune.yaml"
EPOCHS, STEPS = 25, 6
PREPARE = """
import os, pathlib, random, signal, sys, time
import torch
torch.set_num_threads(1)
from finetune.__main__ import main
argv = sys.argv[1:]
assert main([*argv, "run.dir=warm", "schedule.epochs=1"]) == 0  # imports and first calls, before a child is forked

def newest(folder):
    return max((int(path.stem[5:]) for path in pathlib.Path(folder).glob("checkpoints/step-*.ckpt")), default=-1)

def start(folder, *more):
    child = os.fork()
    if child == 0:
        try:
            code = main([*argv, f"run.dir={folder}", "run.on_existing=resume", *more])
        except SystemExit as stop:
            code = stop.code
        os._exit(code)
    return child

def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)

def wait_for(child, folder, step):
    while newest(folder) < step and not ended(child):
        time.sleep(0.002)

def finish(child):
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
"""


@pytest.fixture
def run(png_digits, tiny_model, tmp_path):
    """Runs a program that goes on after `PREPARE`; returns what it printed."""
    argv = [str(RECIPE), *tiny_model.overrides, "data.format=folder", f"data.train={png_digits.train}"]
    argv += [f"data.test={png_digits.test}", "data.holdout=0.0", "data.workers=0", "trainer.global_batch=8"]
    argv += [
        "trainer.micro_batch=4",
        f"schedule.epochs={EPOCHS}",
        "schedule.warmup_epochs=1",
        "checkpoint.every_steps=1",
    ]
    argv += ["regularisation.drop_path=0.3", "augment.policy=rand-m5", "augment.mixup=0.2", "ema.decay=0.9"]

    def call(program: str, *more: str, code: int = 0) -> str:
        environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PREPARE + program, *argv, *more]
        outcome = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
        assert outcome.returncode == code, outcome.stdout[-2000:] + outcome.stderr[-3000:]
        return outcome.stdout + outcome.stderr

    return call


def assert_same_run(one: Path, other: Path) -> None:
    for kind in ("raw", "ema"):
        first, second = load_file(one / f"last_{kind}.safetensors"), load_file(other / f"last_{kind}.safetensors")
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()), kind
    logs = [[json.loads(line) for line in (folder / "log.txt").read_text().splitlines()] for folder in (one, other)]
    assert all(0 <= row.pop("train_data_wait") < 1 for log in logs for row in log), "a time, not a result"
    assert logs[0] == logs[1]
    assert [row["epoch"] for row in logs[0]] == list(range(EPOCHS))


@pytest.mark.slow
def test_twenty_kills_leave_the_uninterrupted_run(run, tmp_path):
    """Kills strike during steps, checkpoints, evaluation and start; weights, average and log are equal bit for bit."""
    out = run("""
moments, statuses = random.Random(0), []
for _ in range(20):
    child = start("killed")
    wait_for(child, "killed", newest("killed") + moments.randint(0, 3))
    time.sleep(moments.random() * 0.12)
    os.kill(child, signal.SIGKILL)
    statuses.append(finish(child))
print("kills", statuses.count(-9), "whole", finish(start("whole")), "killed", finish(start("killed")))
""")
    assert "kills 20 whole 0 killed 0" in out
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_stopped_damaged_and_out_of_disk(run, tmp_path):
    out = run("""
import resource
whole = finish(start("whole"))
child = start("run", "checkpoint.every_steps=1000", "checkpoint.keep=2")  # epochs' ends only
wait_for(child, "run", 6)
time.sleep(0.05)
os.kill(child, signal.SIGTERM)
stopped, at = finish(child), newest("run")

def limited():  # files may grow to 200 KB: a checkpoint does not fit
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

child = os.fork()
if child == 0:
    limited()
    os._exit(main([*argv, "run.dir=run", "run.on_existing=resume", "checkpoint.every_steps=1000"]))
full = finish(child)
after = newest("run")
last = max(pathlib.Path("run/checkpoints").glob("step-*.ckpt"))
content = bytearray(last.read_bytes())
content[len(content) // 2] ^= 1
last.write_bytes(content)
print("whole", whole, "stopped", stopped, "full", full, "kept", after == at, "inside", at % 6 != 0)
print("resumed", finish(start("run", "checkpoint.every_steps=1000")))
""")
    assert "whole 0 stopped 143 full 2 kept True inside True" in out
    assert "could not be written" in out
    assert "the last good one is" in out
    assert "is damaged (its sha256 is not the recorded one); the one before it is taken" in out
    assert "resumed 0" in out
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_another_recipe_is_refused_by_name(run, tmp_path):
    out = run("""
child = start("run")
wait_for(child, "run", 2)
os.kill(child, signal.SIGKILL)
finish(child)
print("refused", finish(start("run", "optimizer.lr=0.5", "ema.decay=0.5")))
""")
    assert "refused 2" in out
    assert "was started with other values of ema.decay, optimizer.lr" in out


def test_no_readable_checkpoint_is_an_error(tmp_path):
    assert newest_readable(tmp_path) == (None, [])
    (tmp_path / "step-00000001.ckpt").write_bytes(b"nothing")
    assert len(list_checkpoints(tmp_path)) == 1
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: .* start over in a new run\.dir"):
        newest_readable(tmp_path)


@pytest.mark.slow
def test_a_slurm_job_is_requeued_and_goes_on(run, tmp_path):
    """SLURM's warning saves, requeues, and the same command then finishes as the uninterrupted run."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\necho "$@" >> scontrol.txt\n')
    scontrol.chmod(0o755)
    out = run("""
whole = finish(start("whole"))
os.environ.update(SLURM_JOB_ID="4711", SLURM_JOB_NAME="train", SLURM_NTASKS="1", SLURM_NTASKS_PER_NODE="1",
    SLURM_NNODES="1", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_NODELIST="localhost",
    PATH=f"{pathlib.Path('bin').resolve()}:{os.environ['PATH']}")
child = start("run", "checkpoint.every_steps=1000")
wait_for(child, "run", 6)
os.kill(child, signal.SIGUSR1)
print("whole", whole, "stopped", finish(child), "again", finish(start("run", "checkpoint.every_steps=1000")))
""")
    assert "whole 0 stopped 143 again 0" in out
    assert "note: job 4711 is back in the queue" in out
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 4711\n"
    assert {path.suffix for path in (tmp_path / "run" / "checkpoints").iterdir()} == {".ckpt", ".sha256"}
    assert not list((tmp_path / "run").rglob("hpc_ckpt*"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")
