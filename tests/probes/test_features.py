"""`python -m probes.features`: extract, ls, verify and gc on a real store."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from probes.features import main
from probes.store import read_entry
from probes.store_care import COLUMNS
from probes.store_claims import Claims

REPO = Path(__file__).resolve().parents[2]
RECIPE = REPO / "recipes" / "custom" / "linear_folder.yaml"


@pytest.fixture
def argv(png_digits, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = [f"data.train={png_digits.train}", f"data.test={png_digits.test}", "data.workers=0"]
    small = ["trainer.global_batch=20", "trainer.micro_batch=10", "features.cache=store"]
    return ["extract", str(RECIPE), *tiny_model.overrides, *data, *small]


def shards() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(Path("store").rglob("*.safetensors"))}


def test_extract_list_damage_repair(argv, capsys):
    assert main(argv) == 0
    assert "train: 40 x 32" in capsys.readouterr().out
    whole = shards()
    assert len(whole) == 2, "train with its hold-out, test"

    assert main(["ls", "store"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(COLUMNS)
    assert [line.split()[1] for line in lines[1:]] == ["train", "test"]
    assert all(line.endswith("complete") and " cls " in line for line in lines[1:])
    assert main(["verify", "store"]) == 0
    assert "2 shard(s) of 2 entries: 0 damaged" in capsys.readouterr().out

    path = next(iter(whole))
    content = bytearray(whole[path])
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["verify", "store"]) == 1
    said = capsys.readouterr()
    assert "2 shard(s) of 2 entries: 1 damaged" in said.out
    assert f"{path} is damaged" in said.err
    assert "gc store --damaged --apply" in said.err

    assert main(["gc", "store", "--damaged"]) == 0
    assert f"would delete {path} (damaged)" in capsys.readouterr().out
    assert path.exists(), "a dry run"
    assert main(["gc", "store", "--damaged", "--apply"]) == 0
    assert not path.exists()
    assert main(["ls", "store"]) == 0
    assert "cls lacks 1 of 1 shards" in capsys.readouterr().out
    assert main(argv) == 0
    assert shards() == whole, "extracted again, bit by bit the same"


def test_gc_takes_what_killed_processes_left_and_spares_what_runs(argv, capsys):
    assert main(argv) == 0
    entry = read_entry(next(Path("store").glob("*/key.json")).parent)
    leftover = entry.folder / "cls" / ".00000.123-ab.partial"
    leftover.write_bytes(b"half a shard")
    capsys.readouterr()
    child, (read_end, write_end), (wait_end, done_end) = None, os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # another process that extracts this shard
        with Claims(entry.folder) as claims:
            claims.take(0)
            os.write(write_end, b".")
            os.read(wait_end, 1)
        os._exit(0)
    os.read(read_end, 1)
    assert main(["gc", "store", "--apply"]) == 0
    assert leftover.exists()
    os.write(done_end, b".")
    os.waitpid(child, 0)
    before = shards()
    assert main(["gc", "store", "--apply"]) == 0
    assert not leftover.exists()
    assert shards() == before


def test_gc_by_age(argv, capsys):
    assert main(argv) == 0
    old, *_ = sorted(path.parent for path in Path("store").glob("*/key.json"))
    past = time.time() - 40 * 86400
    for path in [old, *old.rglob("*")]:
        os.utime(path, (past, past))
    assert main(["gc", "store", "--older-than", "30", "--apply"]) == 0
    assert "nothing written for 40 days" in capsys.readouterr().out
    assert not old.exists()
    assert len(shards()) == 1


def test_mistakes_are_one_line(capsys, tmp_path, argv):
    assert main(["ls", str(tmp_path / "absent")]) == 2
    assert "no feature store at" in capsys.readouterr().err
    assert main([*argv, "features.poool=gap"]) == 2
    assert "unknown key features.poool; did you mean features.pool?" in capsys.readouterr().err
    (tmp_path / "store" / "entry").mkdir(parents=True)
    (tmp_path / "store" / "entry" / "key.json").write_text("{}")
    assert main(["verify", "store"]) == 1
    assert "key.json is damaged" in capsys.readouterr().err


def test_looking_after_a_store_needs_no_torch(argv, run_process, tmp_path):
    assert main(argv) == 0
    code = (
        "import sys\nfrom probes.features import main\n"
        "for argv in (['ls', 'store'], ['verify', 'store'], ['gc', 'store', '--damaged', '--older-than', '1']):\n"
        "    assert main(argv) == 0\n"
        "print([heavy for heavy in ('torch', 'numpy', 'safetensors') if heavy in sys.modules])"
    )
    outcome = run_process(["-c", code], tmp_path)
    assert outcome.code == 0, outcome.err
    assert "torch" not in outcome.out.splitlines()[-1]
