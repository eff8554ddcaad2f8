"""Fetch the emoji packages that EVA01-CLIP-nano is built from, with `npm pack`, at pinned versions.

    python -m scripts.nano.fetch WORK

Each package lands unpacked in ``WORK/packages/<slug>/``. The licence that the package states about its own
pictures is compared with the one written here, so that a changed licence stops the build. Needs `npm` on the
PATH, nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One npm package, what we take from it and under which licence its pictures (or words) are."""

    name: str
    """Name in the npm registry."""
    version: str
    """Exact version; another version may hold other pictures."""
    licence: str
    """SPDX name of the licence of what we use (of emoji-datasource: the pictures, not the code)."""
    source: str
    """Who made the pictures or words."""
    members: tuple[str, ...] = ("",)
    """Prefixes, inside the archive, of the files we unpack."""

    @property
    def slug(self) -> str:
        """Folder name: the package name without `@`, with `/` as `-`."""
        return self.name.removeprefix("@").replace("/", "-")


def _datasource(vendor: str, licence: str, source: str) -> Package:
    members = (f"img/{vendor}/64/", "emoji.json", "package.json", "README.md", "LICENSE")
    return Package(f"emoji-datasource-{vendor}", "16.0.0", licence, source, members)


PACKAGES: dict[str, Package] = {
    "twemoji": _datasource("twitter", "CC-BY-4.0", "Twemoji, Twitter, Inc and other contributors"),
    "noto": _datasource("google", "Apache-2.0", "Noto Emoji, Google Inc"),
    "noto_v1": Package("@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Noto Emoji (v1), Google Inc"),
    "fxemoji": Package("@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "FxEmojis, Mozilla"),
    "emojione": Package("@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "Emoji One 2, EmojiOne / EmojiTwo"),
    "fluent": Package("@iconify-json/fluent-emoji", "1.2.7", "MIT", "Fluent Emoji, Microsoft Corporation"),
    "fluent_flat": Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Fluent Emoji, Microsoft Corporation"),
    "fluent_3d": Package("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Fluent Emoji, Microsoft Corporation"),
    "streamline": Package("@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0", "Streamline Emojis, Streamline"),
    "emojilib": Package("emojilib", "4.0.3", "MIT", "emojilib, Mu-An Chiou"),
    "emojibase": Package(
        "emojibase-data", "17.0.0", "MIT", "emojibase, Miles Johnson", ("en/", "package.json", "LICENSE")
    ),
}
HELD_OUT = "twemoji"
"""The vendor that pre-training never sees."""
PRETRAINING = ("noto", "noto_v1", "fxemoji", "emojione", "fluent", "fluent_flat", "fluent_3d", "streamline")


def stated_licence(folder: Path) -> str:
    """The licence a package states: iconify's `info.json`, the datasource's README, or `package.json`."""
    info = folder / "info.json"
    if info.exists():
        return str(json.loads(info.read_text("utf-8"))["license"]["spdx"])
    vendor = next((p.name for p in (folder / "img").glob("*")), None) if (folder / "img").exists() else None
    if vendor is not None:
        readme = (folder / "README.md").read_text("utf-8")
        line = next(x for x in readme.splitlines() if x.startswith("* ") and vendor.title() in x and "under the" in x)
        return {"Apache License 2.0": "Apache-2.0", "Creative Commons Attribution 4.0": "CC-BY-4.0"}[
            next(k for k in ("Apache License 2.0", "Creative Commons Attribution 4.0") if k in line)
        ]
    return str(json.loads((folder / "package.json").read_text("utf-8"))["license"])


def fetch(package: Package, work: Path) -> Path:
    """Download and unpack one package; return its folder. A folder that is already there is only checked."""
    folder = work / "packages" / package.slug
    if not folder.exists():
        tarballs = work / "tarballs"
        tarballs.mkdir(parents=True, exist_ok=True)
        archive = tarballs / f"{package.slug}-{package.version}.tgz"
        if not archive.exists():
            spec = f"{package.name}@{package.version}"
            subprocess.run(["npm", "pack", "--silent", spec], cwd=tarballs, check=True, capture_output=True)
        unpack(archive, folder, package.members)
    version = json.loads((folder / "package.json").read_text("utf-8"))["version"]
    if version != package.version:
        raise ValueError(f"{package.name}: found version {version}, expected {package.version}; delete {folder}")
    licence = stated_licence(folder)
    if licence != package.licence:
        raise ValueError(f"{package.name}: states licence {licence}, expected {package.licence}; do not use it")
    return folder


def unpack(archive: Path, folder: Path, members: tuple[str, ...]) -> None:
    """Unpack the members of an npm archive whose path under `package/` starts with one of `members`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix("package/")
            if member.isfile() and name.startswith(members):
                member.name = name
                tar.extract(member, folder, filter="data")


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for downloads and everything made from them")
    work: Path = parser.parse_args().work
    for key, package in PACKAGES.items():
        folder = fetch(package, work)
        print(f"{key:12s} {package.name}@{package.version}  {package.licence:10s} -> {folder}")


if __name__ == "__main__":
    main()
