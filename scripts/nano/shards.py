"""Write the quickstart's pictures as WebDataset shards: `twemoji_train`, `twemoji_test` and `noto`.

    python -m scripts.nano.shards WORK recipes/quickstart/pictures

A sample is `<key>.webp` (64 x 64 RGB on white, at most 96 colours) and `<key>.json` with `label`, `caption`
and `emoji`. The archives are gzip-compressed (tar headers would triple them otherwise) and bit-for-bit
reproducible: sorted members, no times, no owners. Classes are the Unicode subcategories with at least 20
pictures, without the catch-all `other-symbol`; each class of Twemoji is split 70/30 by a seeded shuffle.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

from PIL import Image

from scripts.nano.captions import Emoji, load_emojis
from scripts.nano.fetch import PACKAGES

IMAGE_SIZE = 64
COLOURS = 96
"""Colours of one picture; keeps all shards together below 4 MB, and moves a channel by 0.7 of 255 levels on average."""
MINIMUM_PER_CLASS = 20
CATCH_ALL = "other-symbol"
TEST_SHARE = 0.3
SEED = 0


def webp_on_white(path: Path) -> bytes:
    """A 64 x 64 RGBA PNG on a white ground, reduced to `COLOURS` colours, as lossless RGB WebP."""
    image = Image.open(path).convert("RGBA")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    ground = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(ground, image).convert("RGB")
    few = flat.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    buffer = io.BytesIO()
    few.save(buffer, "WEBP", lossless=True, quality=100, method=4)
    return buffer.getvalue()


def picture_paths(work: Path, key: str, emojis: list[Emoji]) -> dict[str, Path]:
    """Emoji code -> 64 px PNG of one `emoji-datasource` vendor."""
    vendor = {"twemoji": "twitter", "noto": "google"}[key]
    folder = work / "packages" / PACKAGES[key].slug / "img" / vendor / "64"
    return {emoji.code: folder / emoji.image for emoji in emojis if (folder / emoji.image).exists()}


def task_emojis(emojis: list[Emoji], *vendors: dict[str, Path]) -> list[Emoji]:
    """The emojis of the quickstart's classes that every vendor draws."""
    drawn = [e for e in emojis if all(e.code in paths for paths in vendors) and e.label != CATCH_ALL]
    counts = Counter(emoji.label for emoji in drawn)
    return [emoji for emoji in drawn if counts[emoji.label] >= MINIMUM_PER_CLASS]


def split(emojis: list[Emoji]) -> tuple[list[Emoji], list[Emoji]]:
    """Stratified, seeded (train, test); every class gives 30 % of its emojis, rounded, to test."""
    by_label: dict[str, list[Emoji]] = {}
    for emoji in sorted(emojis, key=lambda e: e.code):
        by_label.setdefault(emoji.label, []).append(emoji)
    rng = random.Random(SEED)
    train: list[Emoji] = []
    test: list[Emoji] = []
    for label in sorted(by_label):
        members = by_label[label]
        rng.shuffle(members)
        cut = round(TEST_SHARE * len(members))
        test += members[:cut]
        train += members[cut:]
    return train, test


def write_shard(path: Path, emojis: list[Emoji], paths: dict[str, Path]) -> None:
    """One `.tar.gz`, members sorted by key, modification times and owners zero."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for emoji in sorted(emojis, key=lambda e: e.code):
            record = {"label": emoji.label, "caption": emoji.name, "emoji": emoji.code}
            text = json.dumps(record, ensure_ascii=False).encode()
            for suffix, data in (("json", text), ("webp", webp_on_white(paths[emoji.code]))):
                member = tarfile.TarInfo(f"{emoji.code}.{suffix}")
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder given to fetch.py")
    parser.add_argument("out", type=Path, help="folder of the shards")
    arguments = parser.parse_args()
    emojis = load_emojis(arguments.work)
    twemoji, noto = (picture_paths(arguments.work, key, emojis) for key in ("twemoji", "noto"))
    chosen = task_emojis(emojis, twemoji, noto)
    train, test = split(chosen)
    arguments.out.mkdir(parents=True, exist_ok=True)
    shards = {"twemoji_train": (train, twemoji), "twemoji_test": (test, twemoji), "noto": (chosen, noto)}
    for name, (members, paths) in shards.items():
        path = arguments.out / f"{name}.tar.gz"
        write_shard(path, members, paths)
        megabytes = path.stat().st_size / 1e6
        classes = len({emoji.label for emoji in members})
        print(f"{path.name:22s} {len(members):5d} pictures  {classes} classes  {megabytes:.2f} MB")


if __name__ == "__main__":
    main()
