"""Reading and opening the feature store, beside `dd` on the same files in the same run.

    python -m benchmarks.store [--rounds 9]

20,000 x 1408 fp16 features are stored in shards as a recipe would store them. Every round reads all of them from the
page cache: with `dd` (one file of the same bytes, into /dev/null, blocks of 1 MiB, by the time that it prints
itself); in
blocks of one shard into a buffer that is used again; as the one tensor [20000, 1408] that methods get, in fresh memory;
and as the very first use does, which compares all checksums. Ratios are of two rates of one round. Opening is key,
headers and positions.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from probes.store import SHARD_ROWS, StoreEntry, create_entry, open_entry
from probes.store_key import Key
from probes.store_shard import read_features, read_shard, write_shard
from probes.store_table import EncoderFacts, FeatureTable
from probes.store_verified import VERIFIED_FILE

ROWS, WIDTH = 20_000, 1408
FACTS = EncoderFacts("", "", WIDTH, 224)
KEYS = [f"{row:05d}.jpg" for row in range(ROWS)]


def store_noise(cache: Path, key: Key) -> StoreEntry:
    """An entry of random features."""
    entry, generator = create_entry(cache, key, {"split": "train", "model": "noise"}), torch.Generator().manual_seed(0)
    for number in range(entry.num_shards):
        start, stop = entry.span(number)
        features = torch.randn(stop - start, WIDTH, generator=generator).half()
        write_shard(entry.path("cls", number), features, torch.arange(start, stop), start, stop)
    return entry


def open_table(cache: Path, key: Key) -> FeatureTable:
    """What `load_tables` does with an entry that is whole."""
    entry = open_entry(cache, key)
    assert entry is not None
    assert not entry.missing(["cls"])
    return FeatureTable("train", entry, [["cls"]], source_keys=KEYS, encoder=FACTS)


def join_files(entry: StoreEntry, path: Path) -> None:
    """One file of all shards' bytes."""
    with path.open("wb") as stream:
        for number in range(entry.num_shards):
            stream.write(entry.path("cls", number).read_bytes())


def dd_seconds(path: Path) -> float:
    """What `dd` says that it took to read a file, its start not counted."""
    command = ["dd", f"if={path}", "of=/dev/null", "bs=1M"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stderr
    found = re.search(r"copied, ([\d.e-]+) s", said)
    assert found, said
    return float(found.group(1))


def read_in_blocks(entry: StoreEntry, buffer: torch.Tensor) -> None:
    """All rows, block by block into one buffer."""
    for number in range(entry.num_shards):
        shard = read_shard(entry.path("cls", number))
        read_features(shard, buffer[: shard.rows].view(torch.uint8).flatten().numpy().data, check=False)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def seconds_unverified(entry: StoreEntry, work: Callable[[], object]) -> float:
    """Wall time of one call on a store that remembers no comparison."""
    (entry.folder / VERIFIED_FILE).unlink(missing_ok=True)
    return seconds(work)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds, after one that is thrown away")
    rounds = parser.parse_args().rounds
    key: Key = {"samples": {"count": ROWS}}
    gigabytes = ROWS * WIDTH * 2 / 1e9
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        entry, buffer = store_noise(cache, key), torch.empty(SHARD_ROWS, WIDTH, dtype=torch.float16)
        join_files(entry, cache / "joined")
        work: dict[str, Callable[[], float]] = {
            "`dd`": lambda: dd_seconds(cache / "joined"),
            "blocks of one shard": lambda: seconds(lambda: read_in_blocks(entry, buffer)),
            "one tensor": lambda: seconds(lambda: open_table(cache, key).features),
            "one tensor, very first use": lambda: seconds_unverified(entry, lambda: open_table(cache, key).features),
            "opening": lambda: seconds(lambda: open_table(cache, key)),
        }
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(rounds + 1):
            for name, measure in work.items():
                times[name].append(measure())
    print("| | median ms | min-max ms | GB/s | rate / `dd`, median (min-max) |\n|---|---|---|---|---|")
    for name, (_, *values) in times.items():
        row = f"| {name} | {1e3 * statistics.median(values):.1f} | {1e3 * min(values):.1f}-{1e3 * max(values):.1f} |"
        if name == "opening":
            print(row, "| |")
            continue
        ratios = [dd / own for dd, own in zip(times["`dd`"][1:], values, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(row, f"{gigabytes / statistics.median(values):.1f} | {ratio} |")


if __name__ == "__main__":
    main()
