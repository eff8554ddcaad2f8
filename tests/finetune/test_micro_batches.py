"""One recipe on micro-batches of 1, 2, 4 and 8 images, and on two processes: the same losses and the same weights."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from probes.sampling import EpochSampler

REPO = Path(__file__).resolve().parents[2]
EPOCHS = 2
COMMON = ["data.workers=0", "data.on_corrupt=skip", "trainer.global_batch=8", "trainer.precision=fp32"]
COMMON += [f"schedule.epochs={EPOCHS}", "schedule.warmup_epochs=0"]
FINETUNE = [str(REPO / "recipes" / "quickstart" / "finetune.yaml"), "head.start=fresh", "head.pool=gap"]
FINETUNE += ["regularisation.label_smoothing=0.1", "regularisation.class_weights=auto", "optimizer.name=sgd"]
FINETUNE += ["optimizer.lr=0.005", "optimizer.beta1=0.5", "ema.decay=0.5", "data.holdout=0.0"]
PROBE = [str(REPO / "recipes" / "custom" / "linear_folder.yaml"), "head.kind=linear", "head.class_weights=auto"]
PROBE += ["features.mode=online", "optimizer.name=sgd", "optimizer.lr=1.0", "data.holdout=0.0"]
CONTRASTIVE = [str(REPO / "recipes" / "quickstart" / "finetune.yaml"), "head.start=zero_shot", "head.pool=cls"]
CONTRASTIVE += ["head.objective=contrastive", "optimizer.name=sgd", "optimizer.lr=0.002", "optimizer.clip_grad=1.0"]
CONTRASTIVE += ["ema.decay=0.5", "data.holdout=0.0"]
COMMANDS = {
    ("finetune", "single"): ("finetune", FINETUNE),
    ("finetune", "multi"): ("finetune", FINETUNE),
    ("contrastive", "single"): ("finetune", CONTRASTIVE),
    ("probes.linear", "single"): ("probes.linear", PROBE),
    ("probes.linear", "multi"): ("probes.linear", PROBE),
}


@pytest.fixture
def pictures(write_digits, tmp_path):
    """Digits whose classes have 12, 12, 6 and 3 images to train; some cannot be read. Overrides by number of labels."""
    digits = write_digits(tmp_path / "data", 4)
    for name, count in (("two", 6), ("zero", 3)):
        for path in sorted((digits.train / name).iterdir())[count:]:
            path.unlink()
    for name in ("one/01.png", "one/02.png", "one/03.png", "three/05.png", "two/00.png"):
        (digits.train / name).write_bytes(b"no picture")
    with digits.csv.open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if (tmp_path / "data" / row["path"]).is_file()]
    parity = {"zero": "even", "two": "even", "one": "odd", "three": "odd"}
    table = tmp_path / "data" / "several.csv"
    lines = [f"{row['path']},{row['label']}|{parity[row['label']]},{row['split']}" for row in rows]
    table.write_text("\n".join(["path,label,split", *lines]) + "\n", encoding="utf-8")
    return {
        "single": ["data.format=folder", f"data.train={digits.train}", f"data.test={digits.test}"],
        "multi": ["data.format=csv", f"data.train={table}", "data.test=null", "data.labels=multi"],
    }


@pytest.fixture
def train(tiny_model, pictures, tmp_path, run_process):
    """`train(kind, *overrides)`: rows of the log, and the weights at the end."""
    from finetune.__main__ import main as finetune
    from probes.linear import main as linear

    def run(kind: tuple[str, str], *more: str, apart: bool = False):
        command, given = COMMANDS[kind]
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        argv = [*given, *tiny_model.overrides, *pictures[kind[1]], *COMMON, f"run.dir={folder}", *more]
        if apart:
            outcome = run_process(["-m", command, *argv], tmp_path)
            assert outcome.code == 0, outcome.err[-3000:]
        else:
            assert {"finetune": finetune, "probes.linear": linear}[command](argv) == 0
        rows = [json.loads(line) for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]
        files = ["last_raw", "last_ema"] if command == "finetune" else ["head"]
        return rows, {file: load_file(folder / f"{file}.safetensors") for file in files}

    return run


def assert_same(found, wanted) -> None:
    (rows, states), (wanted_rows, wanted_states) = found, wanted
    assert len(rows) == len(wanted_rows) == EPOCHS
    for row, wanted_row in zip(rows, wanted_rows, strict=True):
        for key in ("train_loss", "train_grad_norm", "test_loss"):
            assert row[key] == pytest.approx(wanted_row[key], rel=1e-5), key
    for file, state in states.items():
        for name, tensor in state.items():
            size = max(1.0, float(tensor.abs().max()))  # heads of texts have values around 100
            torch.testing.assert_close(
                tensor,
                wanted_states[file][name],
                rtol=1e-5,
                atol=1e-5 * size,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize("kind", COMMANDS, ids="-".join)
def test_losses_and_weights_do_not_depend_on_the_micro_batch(train, kind):
    whole = train(kind, "trainer.micro_batch=8")
    for size in (4, 2, 1):
        assert_same(train(kind, f"trainer.micro_batch={size}"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("kind", COMMANDS, ids="-".join)
def test_losses_and_weights_do_not_depend_on_the_processes(train, kind, size):
    """With micro-batches of one image, some processes have nothing to read while the others train."""
    whole = train(kind, "trainer.micro_batch=8")
    two = ["trainer.devices=2", "trainer.strategy=ddp", f"trainer.micro_batch={size}"]
    assert_same(train(kind, *two, apart=True), whole)


@pytest.mark.slow
def test_sharded_weights_take_part_without_an_image(train):
    whole = train(("finetune", "single"), "trainer.micro_batch=8")
    two = ["trainer.devices=2", "trainer.strategy=fsdp2", "trainer.micro_batch=1"]
    assert_same(train(("finetune", "single"), *two, apart=True), whole)


@pytest.mark.slow
def test_groups_without_two_readable_images_leave_batch_norm_alone(train, pictures):
    """On two processes: the running statistics count the groups of both that have two images, and no other."""
    more = ["head.kind=bn_linear", "trainer.devices=2", "trainer.strategy=ddp", "trainer.micro_batch=2"]
    _, states = train(("probes.linear", "single"), *more, apart=True)
    folder = Path(pictures["single"][1].removeprefix("data.train="))
    readable = [path.read_bytes() != b"no picture" for path in sorted(folder.rglob("*.png"))]
    order = EpochSampler(len(readable), 32, seed=0)
    groups = []
    for epoch in range(EPOCHS):
        order.set_epoch(epoch)
        seen = [readable[index] for _, index in order]
        for rank in range(2):
            groups += [seen[rank::2][start : start + 2] for start in range(0, 16, 2)]
    assert min(map(sum, groups)) < 2
    (tracked,) = (value for name, value in states["head"].items() if name.endswith("num_batches_tracked"))
    assert int(tracked) == sum(all(group) for group in groups)
    assert all(torch.isfinite(tensor).all() for tensor in states["head"].values())
