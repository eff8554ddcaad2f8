"""Images or videos in class folders. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from probes.csv_source import SPLIT_NAMES
from probes.sections import RecipeError
from probes.source_contract import EXPECTED, Files, is_media, some


class FolderSource(Files):
    """One sub-folder per class, named after it; images may lie deeper. Hidden files are ignored.

    Args:
        path: the folder of class folders.
        media: "image" or "video", the kind of files that are read.

    Raises:
        RecipeError: no class folders, a class folder without images, or a link to nothing.
    """

    def __init__(self, path: str | Path, media: str = "image") -> None:
        super().__init__([str(path)], Path(path), media)
        if not self.root.is_dir():
            other = "csv" if self.root.suffix == ".csv" else "tar"
            hint = f" (or data.format={other})" if f".{other}" in self.root.name or self.root.suffix == ".tgz" else ""
            raise RecipeError(f"{path} is a file; expected {EXPECTED['folder']}{hint}")
        entries = sorted(entry.name for entry in self.root.iterdir() if not entry.name.startswith("."))
        classes = [name for name in entries if (self.root / name).is_dir()]
        if not classes:
            raise RecipeError(self._no_classes(entries))
        if "train" in classes and {name.lower() for name in classes} <= SPLIT_NAMES.keys():
            raise RecipeError(f"{path} holds splits ({', '.join(classes)}), not classes; name {self.root / 'train'}")
        empty = []
        for name in classes:
            found = _files_below(self.root / name, media)
            self.keys += [f"{name}/{inner}" for inner in found]
            self.labels += [name] * len(found)
            if not found:
                empty.append(str(self.root / name))
        if empty:
            raise RecipeError(
                f"{len(empty)} class folder(s) without {media}s: {some(empty)}; add {media}s or remove the folder"
            )

    def _no_classes(self, entries: list[str]) -> str:
        files = sum(is_media(name, self.media) for name in entries)
        if files:
            return (
                f"{self.root} holds {files} {self.media}(s) but no class folders; put the {self.media}s of each class "
                "into a sub-folder named after it, or list them in a CSV (data.format=csv)"
            )
        other = [kind for kind in ("csv", "tar") if any(f".{kind}" in name for name in entries)]
        hint = f"; it holds .{other[0]} files, so name them with data.format={other[0]}" if other else ""
        return f"{self.root} has no class folders; expected {EXPECTED['folder']}{hint}"


def _files_below(folder: Path, media: str) -> list[str]:
    """Sorted paths of the images (or videos) below a folder, relative to it; follows links, enters each folder once."""
    found, entered = [], set()
    for current, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(current)
        folders[:] = [] if real in entered else [name for name in folders if not name.startswith(".")]
        if real in entered:
            continue
        entered.add(real)
        for name in names:
            if not is_media(name, media):
                continue
            file = Path(current) / name
            if file.is_symlink() and not file.exists():
                raise RecipeError(f"{file} is a link to nothing ({file.readlink()}); restore its target or remove it")
            found.append(file.relative_to(folder).as_posix())
    return sorted(found)
