"""Kills, full disks and several processes on one store: what comes out is what one undisturbed process makes."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from probes.store_shard import read_shard, verify_shard

EXTRACT = """
import resource, signal, sys
from probes.extraction import load_tables
from probes.sections import *
from probes.splits import prepare_splits
train, config, weights, name = sys.argv[1:5]

def extract(cache, precision="fp32"):
    recipe = Recipe(
        model=ModelSection(name, weights, config=config),
        features=FeaturesSection(pool="cls+gap", mode="cached", cache=cache),
        data=DataSection(train=train, workers=0),
        trainer=TrainerSection(precision=precision),
    )
    load_tables(recipe, prepare_splits(recipe.data), shard_rows=2)
"""
"""Beginning of a program that defines `extract`; shards of 2 rows make 24 of the 48 digits."""


@pytest.fixture
def start(png_digits, tiny_model, repo, tmp_path):
    """Starts a program that goes on after `EXTRACT`."""

    def run(program: str, **streams) -> subprocess.Popen:
        arguments = [png_digits.train, tiny_model.config, tiny_model.weights, tiny_model.name]
        environment = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", EXTRACT + program, *map(str, arguments)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **streams)

    return run


def stored(cache: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All shards by their path in the store, each compared with its checksum on the way."""
    found = {}
    for path in sorted(cache.rglob("*.safetensors")):
        verify_shard(read_shard(path))
        found[str(path.relative_to(cache))] = load_file(path)
    return found


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert all(torch.equal(found[name][key], tensor) for key, tensor in tensors.items()), name


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.slow
def test_twenty_kills_at_random_moments(start, tmp_path):
    """Every kill strikes a fresh extraction; the next process goes on, and the store is the undisturbed one's."""
    program = """
import os
extract("warm", "bf16")  # all imports and first calls are done before a child is forked
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        extract(line.strip())
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
    process = start(program, stdin=subprocess.PIPE, stderr=None)

    def extract(cache: str, kill_after: float | None = None) -> tuple[float, int]:
        process.stdin.write(cache + "\n")
        process.stdin.flush()
        child, begin = read_number(process), time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it was done already
                os.kill(child, signal.SIGKILL)
        status = read_number(process)
        return time.monotonic() - begin, status

    assert extract("first")[1] == 0
    duration, status = extract("whole")
    assert status == 0
    expected = stored(tmp_path / "whole")
    assert len(expected) == 2 * 24
    moments, struck = random.Random(0), []
    for trial in range(20):
        cache = f"killed{trial}"
        _, status = extract(cache, moments.uniform(0.05, 1) * duration)
        part = stored(tmp_path / cache)  # what is there is whole
        assert all(
            torch.equal(tensor, expected[name][key]) for name, group in part.items() for key, tensor in group.items()
        )
        struck.append(len(part) if status == signal.SIGKILL else None)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / cache).rglob("*.safetensors")}
        assert extract(cache)[1] == 0
        assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items()), "finished work is kept"
        assert_same(stored(tmp_path / cache), expected)
    process.stdin.close()
    process.wait(timeout=60)
    in_between = [count for count in struck if count is not None and 0 < count < len(expected)]
    assert len(in_between) >= 5, f"the kills missed the extraction: {struck}"


def read_number(process: subprocess.Popen) -> int:
    """The next line that is a number; extraction prints lines of its own."""
    while True:
        line = process.stdout.readline()
        assert line, "the process ended"
        if line.strip().isdecimal():
            return int(line)


@pytest.mark.slow
def test_two_processes_share_the_work_and_agree(start, tmp_path):
    program = """
from probes import store_fill
write = store_fill.write_shard
def counted(*arguments):
    write(*arguments)
    print("wrote", flush=True)
store_fill.write_shard = counted
extract("store")
"""
    alone = start(program)
    code, out, err = finish(alone)
    assert code == 0, err
    assert out.count("wrote") == 2 * 24
    expected = stored(tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    processes = [start(program) for _ in range(3)]
    results = [finish(process) for process in processes]
    assert [code for code, _, _ in results] == [0, 0, 0], results
    assert sum(out.count("wrote") for _, out, _ in results) == 2 * 24, "no shard is made twice"
    assert_same(stored(tmp_path / "store"), expected)


@pytest.mark.slow
def test_a_file_that_cannot_grow_keeps_what_is_finished(start, tmp_path):
    """From the eleventh shard on no file may be larger than 300 bytes; the next process has no such limit."""
    limited = start("""
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from probes import store_fill
write, count = store_fill.write_shard, 0
def limit_later(*arguments):
    global count
    count += 1
    if count == 11:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
    write(*arguments)
store_fill.write_shard = limit_later
extract("store")
""")
    code, _, err = finish(limited)
    assert code == 1
    assert "File too large: a shard of features" in err
    assert "shards finished before are kept" in err
    part = stored(tmp_path / "store")
    assert len(part) == 10
    assert not list(tmp_path.rglob("*.partial"))
    assert finish(start('extract("store"); extract("other")'))[0] == 0
    assert_same(stored(tmp_path / "store"), stored(tmp_path / "other"))
    assert len(stored(tmp_path / "store")) == 48


@pytest.mark.slow
def test_a_full_disk(start, tmp_path):
    """A real one: a file system in memory of 64 KiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs more rights")
    try:
        code, _, err = finish(start('extract("disk/store")'))
        assert code == 1
        assert "No space left on device" in err
        assert 0 < len(stored(disk / "store")) < 48
        assert not list(disk.rglob("*.safetensors.partial"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert finish(start('extract("disk/store"); extract("other")'))[0] == 0
        assert_same(stored(disk / "store"), stored(tmp_path / "other"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
