"""Rasterise every vendor's emojis, and write captions for them.

    python -m scripts.nano.pictures WORK

Writes ``WORK/pictures.npz`` (`images` [N, 72, 72, 4] uint8 RGBA, `emoji` [N] and `vendor` [N] integer
columns) and ``WORK/emojis.json`` (the vendors in column order, and one record per emoji: code, name, label,
captions, ...). The held-out vendor is in the same file, under its own vendor number, for evaluation only.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image

from scripts.nano.captions import Emoji, emoji_code, load_emojis, match_icons
from scripts.nano.fetch import HELD_OUT, PACKAGES, PRETRAINING

STORED_SIZE = 72
"""Side in pixels of the stored pictures: a little more than the model's 64, for the random crops."""
CAPTIONS_PER_EMOJI = 8
Picture = npt.NDArray[np.uint8]


def raster(data: bytes, size: int = STORED_SIZE) -> Picture:
    """PNG, WebP or GIF bytes -> RGBA [size, size, 4], fitted into the square and centred on transparency."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(image.size)
    if image.size != (side, side):
        square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if side != size:  # Image.resize weighs colours by alpha for RGBA, so no dark seams appear
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


def _datasource(folder: Path, emojis: list[Emoji]) -> Iterator[tuple[str, Picture]]:
    for emoji in emojis:
        found = sorted(folder.glob(f"img/*/64/{emoji.image}"))
        if found:
            yield emoji.code, raster(found[0].read_bytes())


def _files_by_code(folder: Path, emojis: list[Emoji]) -> Iterator[tuple[str, Picture]]:
    files = {emoji_code(path.stem): path for path in sorted((folder / "assets").glob("*.webp"))}
    for emoji in emojis:
        if emoji.code in files:
            yield emoji.code, raster(files[emoji.code].read_bytes())


def _icons(folder: Path, emojis: list[Emoji]) -> Iterator[tuple[str, Picture]]:
    """Icons of an iconify set; an icon's own size, else the set's, is its view box."""
    data = json.loads((folder / "icons.json").read_text("utf-8"))
    icons: dict[str, dict[str, Any]] = data["icons"]
    aliases = {a: v["parent"] for a, v in data.get("aliases", {}).items() if set(v) <= {"parent"}}
    for code, name in match_icons([*icons, *aliases], emojis).items():
        while name in aliases:
            name = aliases[name]
        icon = icons[name]
        box = [
            icon.get(key, data.get(key, fallback))
            for key, fallback in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        ]
        scale = STORED_SIZE / max(box[2:])
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{box[2] * scale}" height="{box[3] * scale}" viewBox="{" ".join(map(str, box))}">'
            f"{icon['body']}</svg>"
        )
        yield code, raster(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)))


def vendor_pictures(key: str, work: Path, emojis: list[Emoji]) -> Iterator[tuple[str, Picture]]:
    """(emoji code, RGBA picture) for every emoji that this vendor draws."""
    folder = work / "packages" / PACKAGES[key].slug
    if (folder / "icons.json").exists():
        return _icons(folder, emojis)
    return _files_by_code(folder, emojis) if (folder / "assets").exists() else _datasource(folder, emojis)


def captions(emoji: Emoji, rng: random.Random) -> list[str]:
    """`CAPTIONS_PER_EMOJI` captions; first the bare name, then other names and keywords."""
    name = emoji.name.replace(":", "")
    names = [name, *(a for a in emoji.aliases if len(a) > 2 and a.replace(" ", "").isalpha())]
    texts = [name]
    while len(texts) < CAPTIONS_PER_EMOJI:
        kind = len(texts) % 4
        words = rng.sample(emoji.keywords, min(len(emoji.keywords), rng.randint(1, 4)))
        if kind == 0 or not words:
            texts.append(rng.choice(names))
        elif kind in (1, 2):
            texts.append(", ".join([rng.choice(names), *words]))
        else:
            texts.append(", ".join(words))
    return texts


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder given to fetch.py")
    work: Path = parser.parse_args().work
    emojis = load_emojis(work)
    number = {emoji.code: i for i, emoji in enumerate(emojis)}
    vendors = [*PRETRAINING, HELD_OUT]
    images: list[Picture] = []
    emoji_column: list[int] = []
    vendor_column: list[int] = []
    for v, vendor in enumerate(vendors):
        start, before = time.perf_counter(), len(images)
        for code, picture in vendor_pictures(vendor, work, emojis):
            if picture[..., 3].max() > 0:
                images.append(picture)
                emoji_column.append(number[code])
                vendor_column.append(v)
        print(
            f"{vendor:12s} {len(images) - before:5d} pictures  {time.perf_counter() - start:5.1f} s",
            flush=True,
        )
    np.savez(
        work / "pictures.npz",
        images=np.stack(images),
        emoji=np.array(emoji_column),
        vendor=np.array(vendor_column),
    )
    rng = random.Random(0)
    records = [{**asdict(emoji), "captions": captions(emoji, rng)} for emoji in emojis]
    (work / "emojis.json").write_text(json.dumps({"vendors": vendors, "emojis": records}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
