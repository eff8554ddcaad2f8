"""Fixtures shared by all tests: real small images, a tiny model, and the command run in-process or as a process."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core for each process of tests; read when torch is imported

REPO = Path(__file__).resolve().parents[1]
PIXELS = 32
TRAIN_PER_CLASS, TEST_PER_CLASS = 12, 5


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits as PNG files of 32 x 32 pixels: 12 to train and 5 to test of each class."""

    train: Path
    """Class folders."""
    test: Path
    """Class folders."""
    csv: Path
    """The same images as rows path,label,split."""
    classes: list[str]


@dataclass(frozen=True)
class TinyModel:
    """A model that runs in milliseconds."""

    name: str
    config: Path
    weights: Path
    """safetensors file of both towers."""

    @property
    def overrides(self) -> list[str]:
        return [f"model.name={self.name}", f"model.config={self.config}", f"model.weights={self.weights}"]


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


RunCli = Callable[[Sequence[object], Path], Outcome]
WriteDigits = Callable[[Path, int], Digits]


def _write_digits(folder: Path, num_classes: int) -> Digits:
    from sklearn.datasets import load_digits

    digits, names = load_digits(), ["zero", "one", "two", "three", "four"][:num_classes]
    rows = []
    for target, name in enumerate(names):
        chosen = np.flatnonzero(digits.target == target)[: TRAIN_PER_CLASS + TEST_PER_CLASS]
        for number, position in enumerate(chosen):
            split = "train" if number < TRAIN_PER_CLASS else "test"
            path = folder / split / name / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[position] * 15.9).astype(np.uint8)
            Image.fromarray(pixels).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(path)
            rows.append((path.relative_to(folder).as_posix(), name, split))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("path", "label", "split"), *rows])
    return Digits(folder / "train", folder / "test", folder / "labels.csv", sorted(names))


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def write_digits() -> WriteDigits:
    """Writes fresh digits that a test may damage: `write_digits(folder, num_classes)`."""
    return _write_digits


@pytest.fixture(scope="session")
def png_digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """Four classes; shared, so never change them."""
    return _write_digits(tmp_path_factory.mktemp("digits"), 4)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    import torch
    from safetensors.torch import save_file

    from eva_clip.models import build_model
    from eva_clip.specs import add_model_config

    config = tmp_path_factory.mktemp("tiny") / "tiny-32.json"
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "mlp_ratio": 2.0, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}), encoding="utf-8")
    name = add_model_config(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, _ = build_model(name)
    weights = config.with_name("tiny.safetensors")
    save_file(model.state_dict(), weights)
    return TinyModel(name, config, weights)


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCli:
    """`run_cli(argv, cwd)`: the linear probe's `main` in this process."""
    from probes.linear import main

    def run(argv: Sequence[object], cwd: Path) -> Outcome:
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def run_process() -> RunCli:
    """`run_process(argv, cwd)`: Python with these arguments as a process of its own, this checkout importable."""

    def run(argv: Sequence[object], cwd: Path) -> Outcome:
        command = [sys.executable, *map(str, argv)]
        environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run
