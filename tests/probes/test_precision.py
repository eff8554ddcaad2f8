"""Precision settled for the device: what "auto" takes, what is refused or said, and where it is recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import probes.precision
from eva_clip.classifier import build_classifier
from eva_clip.specs import add_model_config
from finetune.sections import FinetuneRecipe
from probes import knn, linear, zeroshot
from probes.embedding import build_towers
from probes.heads import build_head, build_zero_shot_weights
from probes.method_sections import LogisticRecipe
from probes.module import LinearProbe
from probes.precision import Device, cpu_flags, find_device, has_bf16_instructions, mixed_precision, settle_precision
from probes.recipe import load_recipe
from probes.retrieval_sections import RetrievalRecipe
from probes.sections import ModelSection, OptimizerSection, Recipe, RecipeError
from probes.store_care import describe_entry, find_entries
from probes.zeroshot_sections import ZeroShotRecipe

REPO = Path(__file__).resolve().parents[2]
SLOW = Device("cpu", "a processor of 2015", native_bf16=False)
FAST = Device("cpu", "a processor of 2023", native_bf16=True)
OLD_GPU = Device("cuda", "a GPU of 2017", native_bf16=False)
NEW_GPU = Device("cuda", "a GPU of 2022", native_bf16=True)
SCHEMAS = [Recipe, FinetuneRecipe, ZeroShotRecipe, RetrievalRecipe, LogisticRecipe]


@pytest.fixture
def machine(monkeypatch):
    """Pretend that the device of this machine is another."""

    def pretend(device: Device) -> None:
        monkeypatch.setattr(probes.precision, "find_device", lambda: device)
        probes.precision._say_once.cache_clear()

    return pretend


def section(recipe: object) -> object:
    return getattr(recipe, "trainer", None) or recipe.compute


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize(("device", "taken"), [(SLOW, "fp32"), (FAST, "bf16"), (OLD_GPU, "fp32"), (NEW_GPU, "bf16")])
def test_auto_is_the_default_and_takes_what_is_native(schema, device, taken):
    recipe = schema()
    assert section(recipe).precision == "auto"
    settled, said = settle_precision(recipe, device)
    assert section(settled).precision == taken
    assert said.startswith(f"{taken} (auto; {device.name}, ")
    again, said = settle_precision(settled, device)
    assert again == settled
    assert said.startswith(f"{taken} (as asked; ")


@pytest.mark.parametrize(
    ("text", "native"),
    [
        ("model name\t: Intel Xeon\nflags\t\t: fpu avx2 avx512f avx512bw\n", False),
        ("model name\t: Intel Xeon\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("model name\t: Intel Xeon\nflags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("model name\t: Intel Core\nflags\t\t: fpu avx2 avx_ne_convert\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd i8mm bf16\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
    ],
    ids=["avx512", "avx512_bf16", "amx", "converts only", "arm with", "arm without"],
)
def test_linux_names_of_bf16_instructions(text, native, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(probes.precision, "CPU_INFO", tmp_path / "cpuinfo")
    assert has_bf16_instructions(cpu_flags()) is native
    monkeypatch.setattr(probes.precision, "CPU_INFO", tmp_path / "nothing")
    assert cpu_flags() == set()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU decides")
def test_this_machine_is_the_one_torch_sees(run_process, tmp_path):
    device = find_device()
    assert device.kind == "cpu"
    assert device.name
    if device.native_bf16:
        capabilities = torch.cpu.get_capabilities()
        assert any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    code = (  # oneDNN held back to AVX2 has no bf16 kernels, whatever the processor
        "import os; os.environ['ONEDNN_MAX_CPU_ISA'] = 'AVX2'\n"
        "import platform; from probes.precision import find_device\n"
        "print(find_device().native_bf16 and platform.machine() in ('x86_64', 'AMD64'))"
    )
    assert run_process(["-c", code], tmp_path).out == "False\n"


def test_bf16_in_software_says_what_it_costs(capsys, monkeypatch):
    recipe = Recipe()
    recipe.trainer.precision = "bf16"
    probes.precision._say_once.cache_clear()
    for device, notes in ((FAST, 0), (NEW_GPU, 0), (SLOW, 1), (SLOW, 0)):  # once a process
        assert settle_precision(recipe, device)[0].trainer.precision == "bf16"
        said = capsys.readouterr().out
        assert said.count("it takes 3 to 6 times as long as fp32; trainer.precision=auto takes fp32 here") == notes


@pytest.mark.parametrize("schema", SCHEMAS)
def test_fp16_without_a_gpu_is_refused_but_planned(schema):
    recipe = schema()
    section(recipe).precision = "fp16"
    with pytest.raises(RecipeError, match=r"precision is 'fp16' and there is no GPU.*precision=auto \(fp32 on this"):
        settle_precision(recipe, SLOW)
    assert section(settle_precision(recipe, SLOW, planned=True)[0]).precision == "fp16"
    assert settle_precision(recipe, OLD_GPU)[1].startswith("fp16 (as asked; a GPU of 2017")


@pytest.mark.parametrize(
    "name", ["imagenet1k/linear_224", "zeroshot/classification/cifar10", "imagenet1k/finetune_224"]
)
def test_recipes_of_published_fp16_runs_still_plan_on_a_processor(name, machine):
    machine(SLOW)
    import finetune.__main__

    schema, plan = {
        "linear_224": (Recipe, linear.plan),
        "cifar10": (ZeroShotRecipe, None),
        "finetune_224": (FinetuneRecipe, finetune.__main__.plan),
    }[name.rpartition("/")[2]]
    recipe = load_recipe(REPO / "recipes" / f"{name}.yaml", schema=schema)
    assert section(recipe).precision == "fp16"
    if plan is not None:
        assert plan(recipe)["precision"].startswith("fp16 (as asked")


@pytest.mark.parametrize("name", ["linear", "knn", "zeroshot"])
def test_fp16_leaves_no_run_folder_on_a_processor(name, machine, png_digits, tiny_model, tmp_path, monkeypatch, capsys):
    machine(SLOW)
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("data: {workers: 0}\n")
    key = "trainer" if name == "linear" else "compute"
    argv = ["recipe.yaml", *tiny_model.overrides, f"data.test={png_digits.test}", f"{key}.precision=fp16"]
    argv += ["run.dir=run"] if name == "zeroshot" else [f"data.train={png_digits.train}", "run.dir=run"]
    argv += ["trainer.global_batch=16", "trainer.micro_batch=16"] if name == "linear" else []
    assert {"linear": linear, "knn": knn, "zeroshot": zeroshot}[name].main(argv) == 2
    assert f"{key}.precision=auto" in capsys.readouterr().err
    assert not Path("run").exists()


def run_knn(digits, tiny_model, *more: str) -> int:
    Path("recipe.yaml").write_text("data: {workers: 0}\nfeatures: {cache: store}\n")
    data = [f"data.train={digits.train}", f"data.test={digits.test}"]
    return knn.main(["recipe.yaml", *tiny_model.overrides, *data, *more])


def test_result_recipe_and_store_hold_the_settled_one(machine, png_digits, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for device, taken, other in ((SLOW, "fp32", "bf16"), (FAST, "bf16", "fp32")):
        machine(device)
        assert run_knn(png_digits, tiny_model, f"run.dir={taken}") == 0
        facts = json.loads(Path(taken, "result.json").read_text())["facts"]
        assert facts["precision"].startswith(f"{taken} (auto; {device.name}, ")
        assert f"precision: {taken}\n" in Path(taken, "recipe.yaml").read_text()
        assert f"precision: {other}\n" not in Path(taken, "recipe.yaml").read_text()
    stored = [describe_entry(entry)["precision"] for entry in find_entries(Path("store"))[0]]
    assert sorted(stored) == ["bf16", "bf16", "fp32", "fp32"], "no machine takes the other's features"


def test_resumed_on_another_machine(machine, png_digits, tiny_model, tmp_path, monkeypatch, capsys):
    """A run that auto started in bf16 is not continued in fp32 unasked."""
    monkeypatch.chdir(tmp_path)
    machine(FAST)
    assert run_knn(png_digits, tiny_model, "run.dir=run") == 0
    Path("run/result.json").unlink()  # as if it was cut short
    machine(SLOW)
    again = ["run.dir=run", "run.on_existing=resume"]
    assert run_knn(png_digits, tiny_model, *again) == 2
    said = capsys.readouterr().err
    assert "other values of compute.precision" in said
    assert "compute.precision=bf16, which it was started in, continues it" in said
    assert run_knn(png_digits, tiny_model, *again, "compute.precision=bf16") == 0
    assert "3 to 6 times" in capsys.readouterr().out


# Heads compute in fp32


def tied(logits: torch.Tensor) -> int:
    """Rows of which the two highest logits are equal."""
    top = logits.topk(2, dim=1).values
    return int((top[:, 0] == top[:, 1]).sum())


def test_a_classifiers_logits_are_fp32_on_bf16_features(tiny_model):
    torch.manual_seed(0)
    model = build_classifier(add_model_config(tiny_model.config), 400).eval()
    torch.nn.init.normal_(model.head.weight, std=0.01)
    torch.nn.init.constant_(model.head.bias, 40.0)  # where steps of bf16 are 0.25
    images = torch.randn(64, 3, 32, 32)
    with torch.no_grad(), mixed_precision("bf16", images.device):
        features, logits = model.forward_features(images), model(images)
        coarse = model.head(features)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, features.float() @ model.head.weight.T + model.head.bias)
    assert tied(logits) == 0
    assert coarse.dtype == torch.bfloat16
    assert tied(coarse) > 0, "what such logits would do"


def test_a_probes_logits_are_fp32_under_autocast():
    torch.manual_seed(0)
    head = build_head("linear", 16, 300)
    module = LinearProbe(
        head, optimizer=OptimizerSection(), schedule=torch.ones(1).numpy(), num_classes=300, evaluation_names=[]
    )
    features = torch.randn(32, 16).bfloat16()
    with torch.no_grad(), mixed_precision("bf16", features.device):
        logits = module({"features": features})
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, features.float() @ head[0].weight.T + head[0].bias)


def test_the_logit_scale_of_half_towers_is_whole_and_texts_are_scaled_in_fp32(tiny_model):
    model = ModelSection(name=tiny_model.name, config=str(tiny_model.config), weights=str(tiny_model.weights))
    towers = build_towers(model, "bf16")
    assert towers.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert float(torch.tensor(math.log(1 / 0.07)).bfloat16().exp()) != pytest.approx(1 / 0.07, rel=2e-3)
    lengths = build_zero_shot_weights(towers, ["a cat", "a dog"], ["{}", "one {}"]).norm(dim=1)
    assert lengths.tolist() == pytest.approx([1, 1], abs=1e-6)
