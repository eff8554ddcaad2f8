"""Runs on several processes without `run.dir`: one folder, told by the first, however the processes were started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from probes.recipe import Recipe
from probes.runs import RunFolder
from probes.sections import RecipeError

REPO = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
ASK = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from probes.recipe import Recipe
from probes.runs import RunFolder
import probes.runs
rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
time.sleep(1.2 * rank)  # another second on each process's clock
for recipe in ("one.yaml", "two.yaml"):
    run = RunFolder.create(Recipe(), recipe)
    print(f"told {rank} {run.path} {run.writes}", flush=True)
time.sleep(1.5 * (1 - rank))
"""


def told(output: str) -> dict[str, list[tuple[str, str]]]:
    """By process: its folders, and whether it writes."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in output.splitlines():
        if "told " in line:
            rank, path, writes = line.partition("told ")[2].split()
            found.setdefault(rank, []).append((path, writes))
    return found


def assert_one_folder_each(found: dict[str, list[tuple[str, str]]], tmp_path: Path) -> None:
    assert [path for path, _ in found["0"]] == [path for path, _ in found["1"]]
    assert [writes for _, writes in found["0"] + found["1"]] == ["True", "True", "False", "False"]
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {Path(path).name for path, _ in found["0"]}
    assert len(found["0"]) == 2


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **more}


@pytest.mark.slow
@pytest.mark.parametrize("agent_store", [True, False])
def test_torchruns_processes_hear_it_through_the_store(agent_store, tmp_path):
    (tmp_path / "ask.py").write_text(ASK)
    more = {} if agent_store else {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = [sys.executable, *TORCHRUN, "ask.py", str(REPO)]
    outcome = subprocess.run(
        command, cwd=tmp_path, env=environment(**more), capture_output=True, text=True, timeout=120, check=False
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert_one_folder_each(told(outcome.stdout), tmp_path)


@pytest.mark.slow
def test_slurms_processes_derive_it_from_job_and_step(tmp_path):
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    command = [sys.executable, "-c", ASK, str(REPO)]
    processes = [
        subprocess.Popen(
            command, cwd=tmp_path, env=environment(**slurm, SLURM_PROCID=rank), stdout=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    found = told("".join(process.communicate(timeout=60)[0] for process in processes))
    assert_one_folder_each(found, tmp_path)
    assert "job4711.2" in found["0"][0][0]


def test_processes_that_cannot_agree_are_told_to_name_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVA_CLIP_RUN_DIR", raising=False)
    monkeypatch.setenv("NODE_RANK", "1")  # a further node of Lightning's own launcher
    with pytest.raises(RecipeError, match=r"run\.dir is null, .* name one, such as run\.dir=logs/my-run"):
        RunFolder.create(Recipe(), "one.yaml")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
@pytest.mark.parametrize("command", ["finetune", "probes.linear"])
def test_two_processes_with_a_hold_out_reach_their_end(command, launcher, png_digits, tiny_model, tmp_path):
    """Both read the weights that the first wrote when they were selected."""
    recipe = {"finetune": "quickstart/finetune.yaml", "probes.linear": "custom/linear_folder.yaml"}[command]
    argv = [str(REPO / "recipes" / recipe), *tiny_model.overrides, "data.format=folder", "data.workers=0"]
    argv += [f"data.train={png_digits.train}", f"data.test={png_digits.test}", "data.holdout=0.25"]
    argv += ["trainer.global_batch=8", "trainer.micro_batch=4", "schedule.epochs=2", "schedule.warmup_epochs=1"]
    argv += ["trainer.devices=2", "trainer.strategy=ddp"]
    argv += ["head.start=fresh"] if command == "finetune" else ["features.mode=online"]
    start = TORCHRUN if launcher == "torchrun" else []
    outcome = subprocess.run(
        [sys.executable, *start, "-m", command, *argv],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    (run,) = (path for path in (tmp_path / "logs").iterdir() if path.name != "features")
    result = json.loads((run / "result.json").read_text())
    assert result["scores"][0]["name"] == "selected"
    assert result["scores"][0]["samples"] == 20
