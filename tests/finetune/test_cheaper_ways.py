"""8-bit moments, compiled blocks and low-rank adapters, each through the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch

from finetune.__main__ import main

REPO = Path(__file__).resolve().parents[2]
RECIPE = str(REPO / "recipes" / "custom" / "finetune_folder.yaml")


@pytest.fixture
def tune(png_digits, tmp_path, monkeypatch):
    """`tune(name, *overrides)`: the folder of a short run on four classes of digits."""

    def run(name: str, *overrides: str) -> Path:
        monkeypatch.chdir(tmp_path)
        common = ["data.workers=0", "trainer.global_batch=8", "trainer.precision=fp32", "schedule.epochs=1"]
        common += ["schedule.warmup_epochs=0", "augment.policy=null", f"run.dir={tmp_path / name}"]
        common += ["optimizer.lr=1e-3", "optimizer.layer_decay=0.75"]
        assert main([RECIPE, f"data.train={png_digits.train}", "model.name=EVA01-CLIP-nano", *common, *overrides]) == 0
        return tmp_path / name

    return run


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]


def test_moments_in_8_bit_follow_those_in_32(tune):
    pytest.importorskip("bitsandbytes")
    exact, coarse = tune("exact"), tune("coarse", "optimizer.name=adamw_8bit")
    assert rows(coarse)[-1]["train_loss"] == pytest.approx(rows(exact)[-1]["train_loss"], rel=0.02)
    assert rows(coarse)[-1]["train_loss"] != rows(exact)[-1]["train_loss"]


def test_adapters_train_and_the_folder_opens_in_timm(tune):
    pytest.importorskip("peft")
    run = tune("lora", "tune.what=lora", "tune.lora_rank=2", "ema.decay=null", "optimizer.lr=0.01")
    result = json.loads((run / "result.json").read_text())
    assert result["facts"]["trained"].startswith("lora, ")
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    plain = timm.create_model(f"local-dir:{run}", pretrained=False)
    assert list(model.state_dict()) == list(plain.state_dict())  # no adapter is left
    start = tune("start", "tune.what=head", "ema.decay=null", "optimizer.lr=0.01")
    before = timm.create_model(f"local-dir:{start}", pretrained=True).state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if name.startswith("blocks.0.")} == {
        f"blocks.0.{layer}.weight" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_compiled_blocks_train_as_eager_ones(tune, drop_path):
    setting = f"regularisation.drop_path={drop_path}"
    eager, compiled = tune("eager", setting), tune("compiled", setting, "trainer.compile=true")
    assert rows(compiled)[-1]["train_loss"] == pytest.approx(rows(eager)[-1]["train_loss"], rel=1e-4)
